"""Validation while training: deterministic, without dropout, and not repeated after a kill."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import torch

from tests.support.tiny import curve, in_child, make_trainer, run_config
from tests.support.training_runs import assert_same_run, kill, killed_after_save

VALIDATED = {"dataset": {"validation_items": 1}, "train": {"validate_every": 2}}


def test_validation_is_deterministic_and_disturbs_nothing(tmp_path: Path):
    for name, validate in (("with", 2), ("again", 2), ("without", 0)):
        changes = {"dataset": {"validation_items": 1}, "train": {"validate_every": validate}, "lora": {"dropout": 0.3}}
        make_trainer(run_config(tmp_path / name, **changes)).run()
    assert_same_run(tmp_path / "with", tmp_path / "without")
    lines = curve(tmp_path / "with", "validation.jsonl")
    assert lines == curve(tmp_path / "again", "validation.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert {"validation/loss", "validation/cycle", "validation/cosine_fwd"} <= lines[0].keys()
    assert len({line["validation/loss"] for line in lines}) == 3
    assert not (tmp_path / "without/validation.jsonl").exists()


def test_validation_has_no_dropout(tmp_path: Path):
    trainer = make_trainer(run_config(tmp_path / "out", **VALIDATED, lora={"dropout": 0.5}))
    for parameter in trainer.host.parameters.values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.2)
    trainer._validate()
    trainer._validate()
    one, two = curve(tmp_path / "out", "validation.jsonl")
    assert one == two


def test_a_kill_between_save_and_validation_costs_no_validation(tmp_path: Path):
    make_trainer(run_config(tmp_path / "whole", **VALIDATED)).run()
    config = run_config(tmp_path / "out", **VALIDATED)

    def work() -> None:
        trainer = make_trainer(config)
        killed_after_save(trainer, 4)
        trainer.run()

    assert in_child(work) == -signal.SIGKILL
    make_trainer(config, "latest").run()
    assert curve(tmp_path / "out", "validation.jsonl") == curve(tmp_path / "whole", "validation.jsonl")
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_kill_after_validation_repeats_no_line(tmp_path: Path):
    make_trainer(run_config(tmp_path / "whole", **VALIDATED)).run()
    config = run_config(tmp_path / "out", **VALIDATED)

    def work() -> None:
        trainer = make_trainer(config)
        original = trainer._validate
        trainer._validate = lambda: (original(), kill() if trainer.step == 4 else None)  # type: ignore[method-assign]
        trainer.run()

    assert in_child(work) == -signal.SIGKILL
    # The newer checkpoint is lost too: its validation line is about to be made again.
    shutil.rmtree(tmp_path / "out/checkpoints/step-000004")
    make_trainer(config, "latest").run()
    assert curve(tmp_path / "out", "validation.jsonl") == curve(tmp_path / "whole", "validation.jsonl")
