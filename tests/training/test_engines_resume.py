"""A run goes on with another engine and another number of processes; what ends one process costs nothing that is saved."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from byg_plugin.config.sections import Config
from byg_plugin.hosts.sharding import Sharding
from byg_plugin.models import make_family
from byg_plugin.training import checkpoint
from byg_plugin.training.launch import Launch
from byg_plugin.training.loop import Trainer
from byg_plugin.training.watchdog import EXIT_CODE
from tests.support import tiny, wan_runs
from tests.support.engine_runs import case, codes_of, difference, run_all
from tests.support.tiny_wan import A14B

pytestmark = pytest.mark.timeout(900)  # on a busy machine
# (processes, engine) of the first half and of the second.
CHANGES = [
    ((2, "zero2"), (1, "plain")),
    ((1, "plain"), (2, "fsdp2")),
    ((2, "fsdp2"), (4, "zero3")),
    ((2, "zero3"), (2, "zero2")),
    ((1, "plain"), (4, "zero1")),
]
if not find_spec("deepspeed"):
    CHANGES = [((1, "plain"), (2, "fsdp2")), ((2, "fsdp2"), (4, "plain")), ((4, "fsdp2"), (1, "plain"))]


def config(family: str, out: Path, steps: int, **train: Any) -> Config:
    sections: dict[str, dict[str, Any]] = {
        "objective": {"rollout_steps": 2, "identity_warmup_steps": 1, "identity_probability": 0.0, "ema_decay": 0.8},
        "train": {"global_batch_size": 4, "save_every": 0, "lr_warmup_steps": 0, "lr_schedule": "constant", "lr": 1e-3, "seed": 3},
    }
    sections["train"] |= {"steps": steps, **train}
    return tiny.run_config(out, **sections) if family == "flux" else wan_runs.run_config(out, family, **sections)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per family: a whole run, and halves by every engine that go on with the next."""
    root = tmp_path_factory.mktemp("resume")

    def out(family: str, index: int) -> Path:
        return root / f"{family}-{index}"

    families = ("flux", A14B)
    run_all([case(config(family, root / family, 4), "plain") for family in families], 1, root / "logs")
    for half in (0, 1):
        steps, resume = ((2, None), (4, "latest"))[half]
        for processes in (1, 2, 4):
            chosen = [(index, change[half][1]) for index, change in enumerate(CHANGES) if change[half][0] == processes]
            cases = [case(config(f, out(f, index), steps), engine, resume=resume) for f in families for index, engine in chosen]
            if cases:
                run_all(cases, processes, root / "logs")
    return root


@pytest.mark.parametrize("index", range(len(CHANGES)), ids=[f"{a}-to-{b}" for a, b in CHANGES])
@pytest.mark.parametrize("family", ["flux", A14B])
def test_a_run_goes_on_with_another_engine_and_number_of_processes(root: Path, family: str, index: int):
    assert difference(root / f"{family}-{index}", root / family) <= 5e-6


def ended(out: Path, how: Callable[[], object], rank: int, **train: Any) -> tuple[list[int], list[str]]:
    """Two processes under FSDP2, of which one meets `how` after step 2."""
    return codes_of(2, partial(met, config("flux", out, 6, **train), how, rank), out.parent / "logs", timeout=120)


def met(made: Config, how: Callable[[], object], rank: int) -> None:
    accelerator = Accelerator(cpu=True)

    def on_step(trainer: Trainer) -> None:
        if trainer.step == 2 and accelerator.process_index == rank:
            how()

    launch = Launch(sharding=Sharding(kind="fsdp2"))
    Trainer(made, make_family(made), accelerator, on_step=on_step, launch=launch).run()


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_ends_the_others_and_loses_nothing_saved(tmp_path: Path):
    started = time.monotonic()
    codes, outputs = ended(tmp_path / "out", killed, 1, save_every=2)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGALRM), outputs
    assert time.monotonic() - started < 100
    run_all([case(config("flux", tmp_path / "out", 4, save_every=2), "plain", resume="latest")], 1, tmp_path / "logs")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out/checkpoints")] == ["step-000002", "step-000004"]


def test_a_process_that_stands_still_ends_the_others_with_the_step_saved(tmp_path: Path):
    """The one that waits says for what, and saves the last whole step."""
    codes, outputs = ended(tmp_path / "out", partial(time.sleep, 40), 1, collective_timeout=0.25)
    assert codes[0] == EXIT_CODE, outputs
    assert "process 0 has waited 0.25 minutes (train.collective_timeout) for the others: the passes of step 3, in " in outputs[0]
    assert "step 2 is saved now: go on with --resume latest" in outputs[0]
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out/checkpoints")] == ["step-000002"]
