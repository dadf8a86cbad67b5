"""Configuration: every error names key, value and remedy; every recipe parses and says where its values come from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pydantic
import pytest

from byg_plugin.config.loading import load_config, parse_config, reference
from byg_plugin.config.sections import Config
from byg_plugin.data.buckets import bucket_for
from tests.support import ROOT

CONFIGS = ROOT / "configs"
RECIPES = sorted(CONFIGS.glob("*.toml"))

MINIMAL = """
[model]
path = "models/flux"
[dataset]
tuples = "tuples.jsonl"
cache_dir = "cache"
[train]
steps = 10
[output]
dir = "out"
"""


@pytest.fixture
def minimal(tmp_path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def raw(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The minimal configuration as a dictionary, with sections merged in."""
    whole: dict[str, dict[str, Any]] = {
        "model": {"path": "models/flux"},
        "dataset": {"tuples": "tuples.jsonl", "cache_dir": "cache"},
        "train": {"steps": 10},
        "output": {"dir": "out"},
    }
    for name, values in sections.items():
        whole[name] = whole.get(name, {}) | values
    return whole


def message_of(whole: Any) -> str:
    with pytest.raises(ValueError) as caught:
        parse_config(whole)
    assert not isinstance(caught.value, pydantic.ValidationError), "a user is not to read pydantic's own text"
    return str(caught.value)


def test_the_minimal_file_gives_the_papers_defaults(minimal):
    config = load_config(minimal)
    objective = config.objective
    assert (objective.lambda_cycle, objective.lambda_prior, objective.lambda_id) == (1.0, 1.0, 0.2)
    assert (objective.rollout_steps, objective.identity_warmup_steps, objective.identity_probability) == (10, 200, 0.15)
    assert (objective.t_distribution, objective.t_min, objective.t_max) == ("uniform", 0.0, 1.0)
    assert (config.lora.rank, config.train.lr, config.train.weight_decay, config.train.global_batch_size) == (64, 3e-4, 1e-2, 8)
    assert config.lora.scale_numerator == 64.0


def test_a_configuration_is_frozen(minimal):
    config = load_config(minimal)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.train.steps = 3


# --- files ---


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"--config {tmp_path / 'nothing.toml'}: no such file")):
        load_config(tmp_path / "nothing.toml")


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", [b'{"model": {}}', b"[model\npath = 1", b"steps = 10 steps", b"\xff\xfe\x00binary"])
def test_a_file_that_is_not_toml_is_named(tmp_path, content):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not valid TOML") as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path, minimal):
    path = tmp_path / "bom.toml"
    path.write_text(MINIMAL.lstrip(), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf[")
    assert load_config(path) == load_config(minimal)


def test_the_file_is_named_before_its_errors(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL + "[lora]\nrnk = 4\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:")


# --- keys ---


@pytest.mark.parametrize(
    "section, key, nearest",
    [
        ("lora", "rnk", "lora.rank"),
        ("train", "stepps", "train.steps"),
        ("objective", "lamda_cycle", "objective.lambda_cycle"),
        ("objective", "identity_prob", "objective.identity_probability"),
        ("dataset", "resolutions", "dataset.resolution"),
        ("train", "learning_rate", "train.lr"),
        ("lora", "network_dim", "lora.rank"),
        ("train", "rank", "lora.rank"),
        ("objective", "lr", "train.lr"),
        ("conditioning", "guidance_scale", "conditioning.guidance"),
    ],
)
def test_an_unknown_key_is_named_with_its_value_and_the_nearest_key(section, key, nearest):
    message = message_of(raw(**{section: {key: 12345}}))
    assert f"{section}.{key}" in message and "12345" in message
    assert f"did you mean {nearest}?" in message


def test_a_key_like_no_other_lists_the_sections_keys():
    message = message_of(raw(lora={"zzzzzz": 1}))
    assert "lora.zzzzzz" in message
    assert all(key in message for key in ("rank", "alpha", "dropout", "targets", "init_from"))


@pytest.mark.parametrize("section, nearest", [("objectve", "objective"), ("samples", "sample"), ("datasets", "dataset")])
def test_an_unknown_section_is_named_with_the_nearest(section, nearest):
    message = message_of(raw(**{section: {"a": 1}}))
    assert section in message and f"did you mean {nearest}?" in message


@pytest.mark.parametrize("section", ["model", "dataset", "train", "output"])
def test_a_missing_section_or_key_is_named(section):
    if section != "model":  # every key of [model] has a default
        without_key = raw() | {section: {}}
        assert f"{section}." in message_of(without_key) and "is missing" in message_of(without_key)
    whole = raw()
    del whole[section]
    message = message_of(whole)
    assert section in message and "missing" in message and "add this section" in message


def test_all_errors_are_told_at_once():
    message = message_of(raw(lora={"rank": 0, "alhpa": 1}, train={"lr": "fast"}))
    assert all(text in message for text in ("lora.rank", "lora.alpha", "train.lr"))
    assert message.count("\n  - ") == 3


# --- values ---


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("train", "steps", "100"),
        ("train", "steps", 1.5),
        ("train", "steps", True),
        ("train", "steps", 0),
        ("train", "steps", -3),
        ("train", "lr", "3e-4"),
        ("train", "lr", True),
        ("train", "lr", 0.0),
        ("train", "lr", float("nan")),
        ("train", "lr", float("inf")),
        ("train", "betas", [0.9]),
        ("train", "betas", [0.9, 1.5]),
        ("train", "betas", ["0.9", "0.99"]),
        ("train", "optimizer", "sgd"),
        ("train", "mixed_precision", "fp8"),
        ("lora", "rank", 0),
        ("lora", "rank", -1),
        ("lora", "rank", 64.0),
        ("lora", "alpha", 0.0),
        ("lora", "dropout", 1.0),
        ("objective", "name", "cycle"),
        ("objective", "graph", "parallel"),
        ("objective", "lambda_cycle", -1.0),
        ("objective", "alpha", -0.1),
        ("objective", "ema_decay", 1.0),
        ("objective", "rollout_steps", 1),
        ("objective", "identity_probability", 1.5),
        ("objective", "t_max", 1.2),
        ("objective", "t_shift", 0.0),
        ("objective", "frozen_batch", 3),
        ("objective", "routing", "false"),
        ("objective", "routing", 0),
        ("dataset", "resolution", 0),
        ("dataset", "tuples", 3),
        ("conditioning", "position", "rope"),
        ("conditioning", "guidance", -1.0),
        ("model", "family", "wan"),
        ("model", "dtype", "fp16"),
        ("model", "attention", "sdpa"),
        ("output", "name", "../elsewhere"),
        ("output", "name", ""),
        ("output", "name", "training"),
        ("output", "name", "Training"),
        ("train", "seed", -1),
        ("train", "seed", 2**63),
        ("sample", "seed", 2**63),
    ],
)
def test_a_wrong_value_is_named_with_its_key(section, key, value):
    message = message_of(raw(**{section: {key: value}}))
    assert f"{section}.{key}" in message
    if not isinstance(value, list):
        assert repr(value) in message


@pytest.mark.parametrize("betas", [[0.9, 1.0], [1.0, 0.9], [-0.1, 0.9]])
def test_moment_decays_are_below_1(betas):
    assert "train.betas" in message_of(raw(train={"betas": betas}))


def test_the_largest_seed_is_what_a_generator_takes():
    config = parse_config(raw(train={"seed": 2**63 - 1}, sample={"seed": 2**63 - 1}))
    assert config.train.seed == config.sample.seed == 2**63 - 1


def test_a_name_that_only_begins_like_the_checkpoints_file_is_taken():
    assert parse_config(raw(output={"name": "training_1"})).output.name == "training_1"


def test_a_wrong_value_comes_with_what_the_key_means():
    assert "Rank of every adapted linear" in message_of(raw(lora={"rank": 0}))
    assert "uniform" in message_of(raw(objective={"t_distribution": "normal"})), "the choices are the remedy"


@pytest.mark.parametrize("value", [3, "models", [1]])
def test_a_section_that_is_a_value_is_named(value):
    assert "model" in message_of(raw() | {"model": value})


def test_whole_numbers_are_taken_where_a_number_is_wanted():
    config = parse_config(raw(objective={"lambda_id": 1}, train={"betas": [0, 0.9]}))
    assert config.objective.lambda_id == 1.0 and config.train.betas == (0.0, 0.9)


# --- combinations ---


@pytest.mark.parametrize("t_min, t_max", [(0.5, 0.5), (0.9, 0.1)])
def test_an_empty_range_of_t_is_refused(t_min, t_max):
    message = message_of(raw(objective={"t_min": t_min, "t_max": t_max}))
    assert f"objective.t_min = {t_min}" in message and f"objective.t_max = {t_max}" in message and "empty" in message


@pytest.mark.parametrize(
    "sections, parts",
    [
        ({"objective": {"graph": "joint", "merge_identity": True}}, ["objective.merge_identity", "sequential"]),
        ({"train": {"global_batch_size": 8, "batch_size": 3}}, ["train.global_batch_size = 8", "train.batch_size = 3"]),
        ({"train": {"validate_every": 5}}, ["train.validate_every", "dataset.validation_items"]),
        ({"model": {"quantization": "nf4", "dtype": "float32"}}, ["model.quantization = 'nf4'", "model.dtype = 'bfloat16'"]),
        ({"model": {"quantization": "int8", "dtype": "float32"}}, ["model.quantization = 'int8'", "model.dtype = 'bfloat16'"]),
    ],
)
def test_impossible_combinations_are_refused_with_the_remedy(sections, parts):
    message = message_of(raw(**sections))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "objective",
    [
        {"lambda_cycle": 0.0, "lambda_prior": 0.0, "lambda_id": 0.0},
        {"cycle": False, "prior": False, "lambda_id": 0.0},
    ],
)
def test_an_objective_without_a_term_is_refused_before_a_model_loads(objective):
    assert "lambda_id" in message_of(raw(objective=objective))


def test_accumulation_divides_the_global_batch():
    config = parse_config(raw(train={"global_batch_size": 12, "batch_size": 2}))
    assert [config.accumulation(processes) for processes in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ValueError, match=r"global_batch_size = 12 .* 4 processes .*batch_size = 2.*change"):
        config.accumulation(4)


def test_a_part_without_a_place_names_both_keys():
    config = parse_config(raw() | {"model": {"vae": "ae.safetensors"}})
    assert config.model.part("vae") == "ae.safetensors"
    with pytest.raises(ValueError, match=r"model\.transformer is not set.*model\.path"):
        config.model.part("transformer")
    assert parse_config(raw()).model.part("vae") == "models/flux"


# --- --set ---


@pytest.mark.parametrize(
    "override, value",
    [
        ("train.steps=100", 100),
        ("train.steps = 100", 100),
        ("train.lr=1e-3", 1e-3),
        ("train.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("objective.routing=false", False),
        ("objective.graph=joint", "joint"),
        ('objective.graph="joint"', "joint"),
        ("lora.targets=.*attn\\.to_[qkv]", ".*attn\\.to_[qkv]"),
        ("output.dir=runs/a=b", "runs/a=b"),
        ("lora.alpha=32", 32.0),
    ],
)
def test_set_overrides_the_file_with_the_right_type(minimal, override, value):
    section, name = override.partition("=")[0].strip().split(".")
    found = getattr(getattr(load_config(minimal, [override]), section), name)
    assert found == value and type(found) is type(value)


def test_set_works_for_sections_the_file_lacks_and_the_last_one_wins(minimal):
    config = load_config(minimal, ["lora.rank=8", "lora.rank=16", "sample.every=5"])
    assert (config.lora.rank, config.sample.every, config.train.steps) == (16, 5, 10)


@pytest.mark.parametrize("override", ["train.steps", "steps=5", "train=5", "=5", ".steps=5", "train.=5", ""])
def test_a_malformed_set_is_shown_with_the_form_it_should_have(minimal, override):
    with pytest.raises(ValueError) as caught:
        load_config(minimal, [override])
    message = str(caught.value)
    assert override.partition("=")[0].strip(".") in message
    assert "section.key=value" in message or "missing" in message or "unknown" in message


@pytest.mark.parametrize(
    "override, parts",
    [
        ("train.step=5", ["train.step", "did you mean train.steps?"]),
        ("trian.steps=5", ["trian", "did you mean train?"]),
        ("train.steps=many", ["train.steps", "'many'"]),
        ("lora.rank=0", ["lora.rank = 0"]),
        ("train.steps=", ["train.steps"]),
        ("a.b.c=1", ["a"]),
    ],
)
def test_a_set_is_validated_like_the_file(minimal, override, parts):
    with pytest.raises(ValueError) as caught:
        load_config(minimal, [override])
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_set_into_a_value_is_refused(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("model = 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--set model\.path=x: \[model\] is not a section"):
        load_config(path, ["model.path=x"])


# --- what is written down ---


def test_the_resolved_configuration_reads_back_as_the_same(minimal):
    config = load_config(minimal, ["lora.rank=8", "train.betas=[0.5, 0.6]"])
    again = json.loads(config.to_json())
    again = {section: {key: value for key, value in values.items() if value is not None} for section, values in again.items()}
    assert parse_config(again) == config


def test_every_option_has_a_sentence_and_is_in_the_reference():
    text = reference()
    for section, field in Config.model_fields.items():
        assert f"### [{section}]" in text
        for key, option in getattr(field.annotation, "model_fields", {}).items():
            assert option.description and option.description[0].isalnum() and len(option.description) > 8, f"{section}.{key}"
            assert f"| `{key}` |" in text and option.description in text


# --- the recipes ---


def test_there_are_recipes():
    assert RECIPES, f"no .toml in {CONFIGS}"


# Those of the data tools have sections of their own and are read in test_tools_docs.py.
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


# --- families ---


def wan(**sections):
    raw = {
        "model": {"family": "wan2.2-t2v-a14b", "path": "x"},
        "dataset": {"tuples": "x", "cache_dir": "x"},
        "train": {"steps": 1},
        "output": {"dir": "x"},
    }
    for name, values in sections.items():
        raw.setdefault(name, {}).update(values)
    return parse_config(raw)


def test_video_has_its_own_defaults_and_a_named_key_wins():
    config = wan()
    assert (config.objective.t_shift, config.objective.rollout_schedule, config.objective.identity_probability) == (12.0, "shifted", 0.1)
    assert (config.dataset.frames, config.fps, config.sample.steps) == (81, 16, 40)
    assert (config.cfg_at(True), config.cfg_at(False)) == (4.0, 3.0) and "三条腿" in config.negative
    named = wan(objective={"t_shift": 1.0}, dataset={"frames": 5, "fps": 8.0}, sample={"cfg_low_noise": 1.0, "negative": ""})
    assert (named.objective.t_shift, named.objective.t_distribution, named.dataset.frames, named.fps) == (1.0, "logit_normal", 5, 8.0)
    assert (named.cfg_at(True), named.cfg_at(False), named.negative) == (4.0, 1.0, "")
    assert wan(sample={"cfg_high_noise": 1.0, "cfg_low_noise": 1.0}).negative is None
    assert wan(model={"family": "wan2.2-ti2v-5b"}).fps == 24
    image = load_config(CONFIGS / "flux_image.toml")
    assert (image.dataset.frames, image.fps, image.negative, image.cfg_at(True)) == (1, None, None, 1.0)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"boundary": 1.0}}, "model.boundary = 1.0"),
        ({"model": {"boundary": 0.0}}, "model.boundary = 0.0"),
        ({"objective": {"t_shift": 0.0}}, "objective.t_shift = 0.0"),
        ({"objective": {"t_shift": -1.0}}, "objective.t_shift = -1.0"),
        ({"lora": {"experts": "low_noise"}}, "lora.experts = 'low_noise' trains one expert alone, but a rollout .* give lora.other_expert"),
        ({"lora": {"other_expert": "x.safetensors"}}, "lora.other_expert is for"),
        ({"model": {"offload_inactive_expert": True, "quantization": "nf4"}}, "cannot move weights stored as nf4"),
        ({"model": {"offload_inactive_expert": True}, "objective": {"rollout_weights": "merged"}}, "rollout_weights = 'merged'"),
        ({"model": {"family": "wan2.1-t2v-14b", "boundary": 0.5}}, "model.boundary is for families of two experts"),
        ({"model": {"family": "wan2.1-t2v-14b", "transformer_2": "x"}}, "model.transformer_2 is for families of two experts"),
        ({"model": {"family": "wan2.1-t2v-14b"}, "lora": {"experts": "shared"}}, "wan2.1-t2v-14b has one network"),
        ({"model": {"clip": "x"}}, "model.clip: .* no CLIP"),
        (
            {"conditioning": {"position": "kontext"}},
            "conditioning.position = 'kontext' is not for wan2.2-t2v-a14b: one of 'same', 'bernini'",
        ),
        ({"model": {"family": "flux"}, "conditioning": {"position": "bernini"}}, "'bernini' is not for flux"),
        ({"model": {"family": "flux"}, "sample": {"solver": "unipc"}}, "are Wan's"),
        ({"model": {"family": "flux"}, "dataset": {"frames": 5}}, "dataset.frames = 5: flux takes images"),
        ({"dataset": {"frames": 9, "min_frames": 13}}, "dataset.min_frames = 13 is above dataset.frames = 9"),
        ({"dataset": {"frames": 0}}, "dataset.frames = 0"),
    ],
)
def test_impossible_video_options_are_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        wan(**sections)
