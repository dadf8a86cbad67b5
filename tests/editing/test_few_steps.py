"""Editing with a LoRA that was trained for few stochastic steps: its file says so, and nothing else is needed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from byg_plugin import sampling
from byg_plugin.editing import request
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.check import runtime
from byg_plugin.lora.files import read_lora, write_lora
from byg_plugin.randomness import generator
from tests.support.editing import command, difference, photo, pipeline
from tests.support.np_edit_training import np_config, np_trainer, np_workspace
from tests.support.tiny import wake


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the trainer, awake."""
    objective = {"identity_warmup_steps": 0, "fake_updates": 1, "sampling_steps": 3, "schedule": "uniform"}
    config = np_config(tmp_path_factory.mktemp("few") / "out", objective=objective, train={"steps": 2})
    trainer = np_trainer(config)
    wake(trainer.host)
    return trainer.run()


# --- the sampler ---


def test_each_step_predicts_the_data_and_noises_them_anew():
    data, noise = torch.full((2, 3, 1, 2, 2), 0.7), torch.randn(2, 3, 1, 2, 2)
    nodes, seen = torch.tensor([1.0, 0.6, 0.2, 0.0]), []

    def velocity(x: Tensor, t: Tensor, text: Any, source: Any) -> Tensor:
        seen.append((x, t))
        return (x - data) / t[0]  # the field of one picture: noise - data on the path

    made = sampling.sample_stochastic(velocity, noise, {}, None, nodes, [5, 9])
    torch.testing.assert_close(made, data)
    assert [t.tolist() for _, t in seen] == [[1.0] * 2, [pytest.approx(0.6)] * 2, [pytest.approx(0.2)] * 2]
    assert torch.equal(seen[0][0], noise)
    for step, t in ((1, 0.6), (2, 0.2)):
        for row, seed in enumerate((5, 9)):
            fresh = torch.randn(3, 1, 2, 2, generator=generator(seed, "fresh noise", step - 1))
            torch.testing.assert_close(seen[step][0][row], (1 - t) * data[row] + t * fresh, msg="fresh noise of the sample's own seed")


# --- the file ---


def test_the_file_says_what_was_trained_and_not_how_previews_are_made(tmp_path: Path):
    config = np_config(tmp_path, objective={"sampling_steps": 3, "schedule": "uniform"}, sample={"schedule": "shifted", "steps": 9})
    assert (config.sample.schedule, config.sample.steps) == ("shifted", 9)
    card = LoraCard.of(config, 1, "live")
    assert (card.sampler, card.steps, card.schedule) == ("stochastic", 3, "uniform")


def test_the_file_says_how_it_samples(few: Path):
    _, metadata = read_lora(few)
    card = LoraCard.from_metadata(metadata)
    assert (card.sampler, card.steps, card.schedule) == ("stochastic", 3, "uniform")
    config = pipeline(few).config
    assert (config.sample.solver, config.sample.steps, config.sample.schedule) == ("stochastic", 3, "uniform")


def test_what_the_file_says_stands_above_a_configuration(few: Path):
    other = np_config(few.parent / "other", objective={"sampling_steps": 4}, sample={"steps": 17, "solver": "euler"})
    assert (other.sample.steps, other.sample.solver) == (17, "euler")
    assert (made := pipeline(few, config=other).config.sample).solver == "stochastic" and made.steps == 3


def test_a_lora_of_another_objective_has_the_familys_own_sampler(tmp_path: Path):
    """Also beside the configuration of a few-step editor."""
    config = np_config(tmp_path / "out")
    card = LoraCard(family="flux", position="same", guidance=3.5, max_text_tokens=8, resolution=64)
    raw = request.sections_of(card, config, {})
    assert config.sample.solver == "stochastic" and not {"solver", "steps", "schedule"} & raw["sample"].keys()
    assert raw["sample"]["weights"] == config.sample.weights


def test_of_a_family_with_guidance_it_is_off():
    card = LoraCard(
        family="z-image", position="same", guidance=3.5, max_text_tokens=8, resolution=64, schedule="shifted", sampler="stochastic", steps=4
    )
    raw = request.sections_of(card, None, {"path": "x"})
    assert raw["sample"] == {"schedule": "shifted", "solver": "stochastic", "steps": 4, "cfg_high_noise": 0.0, "negative": None}
    with pytest.raises(ValueError, match=r"cfg_high_noise \(--cfg-high\) = 4.0: this LoRA edits in 4 steps without guidance"):
        request.refuse_guided(card, {"cfg_high_noise": 4.0})


def test_an_edit_is_the_sampler_s_and_depends_on_its_seed(few: Path):
    pipe = pipeline(few)
    edit = pipe(photo(), "add the snow", seed=4)
    assert difference(pipe(photo(), "add the snow", seed=4), edit) == 0
    assert difference(pipe(photo(), "add the snow", seed=5), edit) > 3
    assert difference(pipe(photo(), "add the snow", seed=4, steps=1), edit) > 3
    plain = pipeline(few, solver="euler")
    assert difference(plain(photo(), "add the snow", seed=4), edit) > 3, "Euler's is another one"


def test_a_batch_of_two_is_two_of_one(few: Path):
    pipe = pipeline(few)
    both = pipe.batch([photo(), photo(1)], ["add the snow", "add the dog"], seeds=[7, 8])
    alone = [pipe(photo(), "add the snow", seed=7), pipe(photo(1), "add the dog", seed=8)]
    assert all(difference(edit, one) <= 1 for (_, edit), one in zip(both, alone, strict=True))


def test_which_tools_run_it_is_said():
    card = LoraCard(family="flux", position="kontext", sampler="stochastic", steps=4)
    assert runtime("comfyui", card) == "with the nodes of comfyui/, which make its 4 steps: sampler lcm, cfg 1"
    assert runtime("diffusers", card) == "with byg_plugin.pipelines, which make its 4 steps"
    for tool, other in (("diffusers", replace(card, family="wan2.1-t2v-14b", position="same")), ("musubi", card)):
        assert runtime(tool, other) == "no: it edits in 4 stochastic steps, which byg_plugin's edit.py makes"
    assert not runtime("comfyui", replace(card, sampler=None)).startswith("no:")
    for unknown in (replace(card, sampler="future"), replace(card, steps=None)):
        assert all(runtime(tool, unknown).startswith("unknown: byg.sampler is ") for tool in ("diffusers", "comfyui", "musubi"))


def test_a_sampler_of_a_later_version_is_refused(few: Path, tmp_path: Path):
    for changed in ({"byg.sampler": "other"}, {"byg.sampler": "stochastic", "byg.steps": None}):
        _, metadata = read_lora(few)
        said = {key: value for key, value in (metadata | changed).items() if value is not None}
        write_lora(tmp_path / "x.safetensors", load_file(few), said)
        with pytest.raises(ValueError, match="byg.sampler"):
            pipeline(tmp_path / "x.safetensors")


def test_the_command_needs_no_option_for_it(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command(monkeypatch, few, "--source", np_workspace() / "photo0.png", "--instruction", "add the snow", "--out", tmp_path / "edits")
    (line,) = (tmp_path / "edits/edits.jsonl").read_text(encoding="utf-8").splitlines()
    settings = json.loads(line)["settings"]
    assert (settings["solver"], settings["steps"], settings["schedule"]) == ("stochastic", 3, "uniform")
