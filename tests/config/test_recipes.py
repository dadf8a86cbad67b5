"""Every recipe parses and says where its values come from."""

from __future__ import annotations

import re

import pytest

from byg_plugin.config.loading import load_config
from byg_plugin.data.buckets import bucket_for
from tests.support.config_files import CONFIGS

RECIPES = sorted(CONFIGS.glob("*.toml"))


def test_there_are_recipes():
    assert RECIPES, f"no .toml in {CONFIGS}"


# Those of the data tools have sections of their own and are read in tests/dataset_tools/test_docs.py.
@pytest.mark.parametrize("path", [path for path in RECIPES if not path.name.startswith("data_")], ids=lambda path: path.name)
def test_every_recipe_parses(path):
    # The demos' places are made, and set, by their commands.
    overrides = [f"{key}=x" for key in ("dataset.tuples", "dataset.cache_dir", "output.dir")] if path.name.startswith("demo") else []
    assert load_config(path, overrides).train.steps > 0


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_value_of_a_recipe_says_whether_it_is_the_papers(path):
    """In a comment behind the value, or on the line above a value that fills its own line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    values = [(above, line) for above, line in zip(["", *lines], lines, strict=False) if re.match(r"\s*\w+\s*=", line)]
    assert values
    says = re.compile(r"#.*\bpaper\b")
    silent = [line for above, line in values if not says.search(line) and not (above.startswith("#") and says.search(above))]
    assert not silent, "\n".join(silent)


def test_the_image_recipe_is_the_papers():
    config = load_config(CONFIGS / "flux_image.toml")
    objective, train = config.objective, config.train
    assert (config.lora.rank, train.lr, train.optimizer, train.weight_decay) == (64, 3e-4, "adamw", 1e-2)
    assert (train.global_batch_size, train.steps) == (8, 30_000)
    assert (objective.name, objective.lambda_cycle, objective.lambda_prior, objective.lambda_id) == ("unpaired_cycle", 1.0, 1.0, 0.2)
    assert (objective.identity_warmup_steps, objective.identity_probability, objective.rollout_steps) == (200, 0.15, 10)
    assert (objective.t_distribution, objective.t_shift, objective.t_min, objective.t_max) == ("uniform", 1.0, 0.0, 1.0)
    assert (objective.rollout_schedule, config.sample.steps) == ("uniform", 20)
    assert all((objective.routing, objective.bootstrap, objective.cycle, objective.directional, objective.prior))


def test_the_kontext_recipe_differs_in_the_positions():
    plain, kontext = (load_config(CONFIGS / f"{name}.toml") for name in ("flux_image", "flux_image_kontext"))
    assert (plain.conditioning.position, kontext.conditioning.position) == ("same", "kontext")
    assert (kontext.objective, kontext.lora) == (plain.objective, plain.lora)
    outputs = {"output": plain.output, "dataset": plain.dataset, "conditioning": plain.conditioning}
    assert kontext.model_copy(update=outputs) == plain


def test_the_video_recipe_is_the_papers():
    config = load_config(CONFIGS / "wan22_video.toml")
    objective, train = config.objective, config.train
    assert (config.model.family, config.lora.rank, train.lr, train.steps, train.global_batch_size) == ("wan2.2-t2v-a14b", 64, 1e-4, 750, 8)
    assert (objective.t_distribution, objective.t_shift, objective.ema_decay, objective.identity_probability) == (
        "logit_normal",
        12.0,
        0.0,
        0.1,
    )
    assert config.conditioning.position == "same" and config.dataset.frames == 81
    # 320 x 576 is a bucket, and the one of 16:9.
    assert bucket_for((1280, 720), config.dataset, 16) == (576, 320)
    assert bucket_for((448, 256), load_config(CONFIGS / "wan22_video_24gb.toml").dataset, 16) == (448, 256)
    assert bucket_for((1280, 720), load_config(CONFIGS / "wan22_5b.toml").dataset, 32) == (832, 480)
