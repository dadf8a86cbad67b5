"""A process that waits too long for the others says where, saves the last whole step and ends."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from byg_plugin.training import loop, watchdog
from byg_plugin.training.watchdog import EXIT_CODE, Watchdog
from tests.support.engine_runs import codes_of
from tests.support.tiny import in_child, make_trainer, run_config, wake

SHORT = 0.5 / 60


def hang(what: str, rank: int = 0) -> None:
    def rescue(*, ends: bool) -> str:
        return "saved" if ends else "not yet"

    dog = Watchdog(SHORT, rank, rescue)
    with dog.running(), dog.waiting("the passes of step 3"), dog.waiting(what):
        time.sleep(30)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_waited_for_is_named_and_the_process_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int):
    monkeypatch.setattr(watchdog, "_GRACE", 0.1)
    assert in_child(lambda: hang("an agreement", rank), tmp_path / "said") == EXIT_CODE
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert f"process {rank} has waited" in said and "train.collective_timeout" in said and "for the others: an agreement" in said
    assert ("saved" in said) == (rank == 0), "one process saves"


def cannot_save() -> None:
    def rescue(*, ends: bool) -> str:
        raise OSError("no space left")

    dog = Watchdog(SHORT, 0, rescue)
    with dog.running(), dog.waiting("an agreement"):
        time.sleep(30)


def test_a_rescue_that_fails_ends_the_process_too(tmp_path: Path):
    started = time.monotonic()
    assert in_child(cannot_save, tmp_path / "said") == EXIT_CODE and time.monotonic() - started < 20
    assert "no space left" in (tmp_path / "said").read_text(encoding="utf-8")


def cannot_save_and_is_not_read() -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 2)
    cannot_save()


def test_a_process_whose_lines_nobody_reads_ends_too(tmp_path: Path):
    started = time.monotonic()
    assert in_child(cannot_save_and_is_not_read, tmp_path / "said") == EXIT_CODE and time.monotonic() - started < 20


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupted_process_that_works_on_is_saved_once_by_the_first(monkeypatch: pytest.MonkeyPatch, capfd: Any, rank: int):
    monkeypatch.setattr(watchdog, "_INTERRUPTED", 0.2)
    asked: list[int] = []

    def rescue(*, ends: bool) -> str:
        assert not ends
        asked.append(1)
        return "step 2 is saved now"

    dog = Watchdog(4 * SHORT, rank, rescue)
    with dog.running():
        time.sleep(0.8)
        assert not asked
        dog.interrupted()
        time.sleep(1.5)
    assert asked == [1] * (rank == 0) and capfd.readouterr().err.count("step 2 is saved now") == len(asked)


def fails_early() -> None:
    def rescue(*, ends: bool) -> str:
        if not ends:
            raise ValueError("no space left")
        return "saved"

    watchdog._INTERRUPTED = 0.1
    dog = Watchdog(SHORT, 0, rescue)
    with dog.running():
        dog.interrupted()
        time.sleep(1.0)
        with dog.waiting("an agreement"):
            time.sleep(30)


def test_an_early_rescue_that_fails_leaves_the_watchdog_alive(tmp_path: Path):
    assert in_child(fails_early, tmp_path / "said") == EXIT_CODE
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert "no space left" in said and said.rstrip().endswith("saved")


def test_a_step_that_the_rescue_has_saved_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = make_trainer(run_config(tmp_path / "out", train={"steps": 2, "save_every": 0}))
    asked: list[str] = []

    def slow(value: bool) -> bool:
        """The rescue comes while the others are asked."""
        asked.append(trainer._rescue(ends=False))
        return value

    monkeypatch.setattr(trainer.engine, "any", slow)
    trainer.run()
    assert {f"step {step} is saved now: go on with --resume latest" for step in (1, 2)} <= set(asked)
    assert (tmp_path / "out/byg_lora.safetensors").is_file()


def test_only_in_a_hang_is_saved_beside_the_devices_own_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the main thread works on, the step that it has just ended may not be through on the device yet."""
    trainer = make_trainer(run_config(tmp_path / "out", train={"steps": 2, "save_every": 0}))
    trainer.run()
    beside: list[torch.device] = []

    def stream(device: torch.device) -> Any:
        beside.append(device)
        return nullcontext()

    monkeypatch.setattr(loop, "_beside", stream)
    for step, ends in ((3, False), (4, True)):
        trainer.step = step
        assert trainer._rescue(ends=ends) == f"step {step} is saved now: go on with --resume latest"
        assert len(beside) == ends


def test_an_exception_inside_a_step_leaves_nothing_to_save_and_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = make_trainer(run_config(tmp_path / "out", train={"steps": 3, "save_every": 1}))

    def broken(step: int) -> None:
        if step == 2:
            raise FloatingPointError("a weight is not finite")

    monkeypatch.setattr(trainer.diagnosis, "after_step", broken)
    with pytest.raises(FloatingPointError):
        trainer.run()
    assert not trainer._still.locked()
    shutil.rmtree(trainer.checkpoints / "step-000001")
    assert trainer._rescue(ends=True).startswith("step 1 could not be saved")


def test_a_single_process_waits_for_nobody(monkeypatch: pytest.MonkeyPatch):
    ended: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, what: ended.append(what))
    for others in (False, True):
        dog = Watchdog(SHORT, 0, lambda *, ends: "saved", others=others)
        with dog.running(), dog.waiting("the first process, which saves step 3"):
            time.sleep(1.2)
        assert bool(ended) == others


def alone_in_a_collective() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    if rank:
        time.sleep(10)
    dog = Watchdog(SHORT, rank, lambda *, ends: "saved")
    with dog.running(), dog.waiting("the gradients of an optimizer step"):
        torch.distributed.all_reduce(torch.zeros(2))


def test_the_collective_is_named(tmp_path: Path):
    codes, outputs = codes_of(2, alone_in_a_collective, tmp_path)
    assert codes[0] == EXIT_CODE
    assert "the gradients of an optimizer step, in all_reduce" in outputs[0]


def test_work_that_hears_from_the_others_in_time_goes_on(monkeypatch: pytest.MonkeyPatch):
    ended: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, what: ended.append(what))
    dog = Watchdog(SHORT, 0, lambda *, ends: "saved")
    with dog.running(), dog.waiting("the passes of step 3"):
        for _ in range(4):
            time.sleep(0.3)
            with dog.waiting("a backward pass"):
                pass
    assert not ended


def test_the_step_that_is_saved_is_the_last_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the wait is inside a rollout, with the averages in the weights' place."""
    from byg_plugin.training import checkpoint

    trainer = make_trainer(run_config(tmp_path / "out", train={"steps": 2, "save_every": 0}))
    trainer.run()
    saved = checkpoint.checkpoints(trainer.checkpoints)[-1]
    assert trainer._rescue(ends=True) == "step 2 is saved: go on with --resume latest"
    wake(trainer.host)
    live = {name: value.clone() for name, value in trainer.host.ema_weights.live().items()}
    average = {name: value.clone() for name, value in trainer.host.ema_weights.state().items()}
    trainer.step = 3
    monkeypatch.setattr(loop, "_MOVED", 0.1)
    with trainer._still:
        assert trainer._rescue(ends=True).startswith(f"step 3 could not be saved; the last good checkpoint is {saved}")
        assert trainer._rescue(ends=False) == "step 3 is not saved yet: training saves it when it is through with what it does"
    with monkeypatch.context() as patched:
        patched.setattr(type(trainer._own_engine), "whole", False)
        assert trainer._rescue(ends=True).startswith("step 3 could not be saved"), "the others have the rest of the optimizer"
    with trainer.host.ema():
        assert trainer._rescue(ends=True) == "step 3 is saved now: go on with --resume latest"
    state = checkpoint.load(checkpoint.checkpoints(trainer.checkpoints)[-1])
    assert all(torch.equal(state.adapters["edit"].lora[name], value) for name, value in live.items())
    assert all(torch.equal(state.adapters["edit"].ema[name], value) for name, value in average.items())
    assert not torch.equal(next(iter(live.values())), next(iter(average.values())))
