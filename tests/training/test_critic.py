"""NP-Edit with a critic of a real class: trained, logged, resumed, summed up, and refused before the base is read."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from byg_plugin import train_network
from byg_plugin.config.sections import Config
from byg_plugin.data.dataset import CachedTuples
from byg_plugin.models import make_family
from byg_plugin.objectives.unpaired_cycle_config import UnpairedCycleConfig
from byg_plugin.training import loop
from byg_plugin.training.loop import Trainer
from tests.support.np_edit_training import np_config, np_trainer
from tests.support.tiny import curve
from tests.support.tiny_critics import critic_folder
from tests.support.training_runs import assert_same_run

pytestmark = pytest.mark.timeout(600)


def config(out: Path, **critic: Any) -> Config:
    values = {"path": str(critic_folder("qwen3_vl")), "dtype": "float32", "least_accuracy": 0.0, "scale_steps": 4} | critic
    return np_config(out, critic=values, objective={"identity_probability": 0.0})


def trainer(one: Config, resume: str | None = None) -> Trainer:
    return Trainer(one, make_family(one), Accelerator(cpu=True), resume)


def test_a_run_asks_it_and_a_resumed_one_goes_on_the_same(tmp_path: Path):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    trainer(config(whole)).run()
    asked = [line for line in curve(whole) if "vlm" in line]
    assert asked and all({"vlm_made", "vlm_made_right", "vlm_kept", "vlm_kept_right"} <= line.keys() for line in asked)
    assert len({line["vlm_made"] for line in asked}) == len(asked), "the editor moves"
    stopping = trainer(config(halved))

    def stop(it: Trainer) -> None:
        it._stop = it.step == 4

    stopping.on_step = stop
    with pytest.raises(Exception, match="interrupted"):
        stopping.run()
    trainer(config(halved), "latest").run()
    assert_same_run(whole, halved)


def command(one: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    raw = json.loads(one.to_json())
    raw["model"] = {key: raw["model"][key] for key in ("path", "dtype", "device", "gradient_checkpointing")}
    lines = [f"[{name}]\n" + "".join(_line(key, value) for key, value in section.items()) for name, section in raw.items() if section]
    (tmp_path / "config.toml").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train", "--config", str(tmp_path / "config.toml"), *arguments])
    train_network.main()


def _line(key: str, value: Any) -> str:
    return "" if value is None else f"{key} = {json.dumps(value)}\n"


def test_the_dry_run_sums_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    command(config(tmp_path / "out"), tmp_path, monkeypatch, "--dry-run")
    said = capsys.readouterr().out
    assert "critic: qwen3_vl on the networks' device, shown 64 x 64 pixels" in said
    assert "critic's weights" in said and "weights of the critic's VAE (float32)" in said and "or, if larger, the critic's graph" in said
    command(config(tmp_path / "out", device="cpu"), tmp_path, monkeypatch, "--dry-run")
    assert capsys.readouterr().out == said, "named or not, it is the networks' device"
    command(config(tmp_path / "out", device="cuda:1"), tmp_path, monkeypatch, "--dry-run")
    said = capsys.readouterr().out
    assert "critic: qwen3_vl on cuda:1" in said and "critic's weights" not in said


def test_a_blind_critic_ends_the_run_before_the_base_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = config(tmp_path / "out", least_accuracy=0.75)
    monkeypatch.setattr(type(make_family(one)), "load_transformers", None)
    with pytest.raises(ValueError, match="of 32 known questions rightly"):
        command(one, tmp_path, monkeypatch)


def test_no_critic_ends_the_run_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = config(tmp_path / "out", path=None)
    monkeypatch.setattr(loop, "CachedTuples", None)
    with pytest.raises(ValueError, match='objective.name = "np_edit" asks a critic: set critic.path'):
        command(one, tmp_path, monkeypatch)


@pytest.mark.parametrize("where", ["train", "validation"])
def test_an_instruction_that_it_cannot_read_ends_the_run_before_a_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    guilty: list[str] = []

    def spoiled(config: Config, family: Any, split: str) -> CachedTuples:
        made = CachedTuples(config, family, split)
        if split == where:
            made.tuples[-1:] = [replace(made.tuples[-1], instruction="turn <|image|> blue")]
            guilty.append(made.tuples[-1].id)
        return made

    monkeypatch.setattr(loop, "CachedTuples", spoiled)
    monkeypatch.setattr(loop, "make_critic", lambda *a: pytest.fail("weights were read"))
    critic = config(tmp_path / "out").critic.model_dump(exclude_defaults=True)
    with pytest.raises(ValueError, match=r"the instruction of tuple (\S+) holds '<\|image\|>'") as caught:
        trainer(np_config(tmp_path / "out", critic=critic, dataset={"validation_items": 1}))
    assert f"tuple {guilty[0]} holds" in str(caught.value)


def test_who_is_not_asked_about_may_say_anything(tmp_path: Path):
    """A critic of removals reads no other instruction."""
    made = np_trainer(np_config(tmp_path / "out"))
    assert len(made._judged()) == len(made.data.tuples)
    removals = UnpairedCycleConfig(critique_types=["remove"])
    made.config = made.config.model_copy(update={"objective": removals})
    assert made._judged() == []
    made.data.tuples[1:2] = [replace(made.data.tuples[1], edit_type="remove")]
    assert made._judged() == [(made.data.tuples[1].id, made.data.tuples[1].instruction)]
