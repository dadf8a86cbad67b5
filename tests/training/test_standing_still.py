"""Two processes of which one is late, fails alone or goes on from elsewhere: no run hangs, and none ends for nothing."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from byg_plugin.config.sections import Config
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.hosts.sharding import Sharding
from byg_plugin.models import make_family
from byg_plugin.training import preview
from byg_plugin.training.launch import Launch
from byg_plugin.training.loop import Trainer
from byg_plugin.training.watchdog import EXIT_CODE
from tests.support.engine_runs import codes_of
from tests.support.tiny import curve, run_config

pytestmark = pytest.mark.timeout(300)  # on a busy machine


def config(out: Path, minutes: float, every: int = 2) -> Config:
    train = {"steps": every or 1, "save_every": 0, "global_batch_size": 2, "validate_every": every, "lr": 1e-3}
    train |= {"collective_timeout": minutes}
    objective = {"rollout_steps": 2, "identity_warmup_steps": 0, "identity_probability": 0.0}
    return run_config(
        out, train=train, objective=objective, dataset={"validation_items": 1}, sample={"every": every, "items": 1, "steps": 2}
    )


def before(holder: Any, name: str, what: Callable[[], object]) -> None:
    """Do something before each call of a function."""
    plain = getattr(holder, name)

    def call(*args: Any, **options: Any) -> Any:
        what()
        return plain(*args, **options)

    setattr(holder, name, call)


def fail() -> None:
    raise RuntimeError("a read error of this process alone")


def work(made: Config, engine: str, where: str) -> None:
    logging.basicConfig(format="%(message)s", force=True)
    accelerator = Accelerator(cpu=True)
    if where == "passes":
        before(DiffusersHost, "_one_expert", partial(time.sleep, 1.0))
    elif accelerator.process_index == 1:
        before(*{"validation": (Trainer, "_validate"), "inputs": (preview, "_inputs"), "edits": (preview, "_edits")}[where], HOW[where])
    launch = Launch(sharding=Sharding(kind="fsdp2")) if engine == "fsdp2" else Launch()
    Trainer(made, make_family(made), accelerator, launch=launch).run()


HOW = {"validation": partial(time.sleep, 12), "inputs": fail, "edits": fail}


def ended(tmp_path: Path, engine: str, where: str, minutes: float, every: int = 2) -> tuple[list[int], list[str]]:
    return codes_of(2, partial(work, config(tmp_path / "out", minutes, every), engine, where), tmp_path / "logs", timeout=120)


def test_a_validation_that_one_is_late_for_ends_the_run_by_name(tmp_path: Path):
    codes, outputs = ended(tmp_path, "fsdp2", "validation", 0.1)
    assert codes[0] == EXIT_CODE, outputs
    assert "has waited 0.1 minutes (train.collective_timeout) for the others: the validation at step 2, in " in outputs[0]


def test_previews_whose_inputs_one_cannot_read_are_left_out_by_all(tmp_path: Path):
    codes, outputs = ended(tmp_path, "fsdp2", "inputs", 5)
    assert codes == [0, 0], outputs
    assert "preview at step 2 failed and training goes on: RuntimeError: a read error of this process alone" in outputs[1]
    assert curve(tmp_path / "out", "validation.jsonl")[0]["step"] == 2
    assert not list((tmp_path / "out/previews").glob("step-*"))


def test_a_pass_in_shards_that_one_cannot_make_ends_the_run(tmp_path: Path):
    started = time.monotonic()
    codes, outputs = ended(tmp_path, "fsdp2", "edits", 0.5)
    assert codes[1] == 1 and codes[0] not in (0, -14), outputs
    assert "RuntimeError: a read error of this process alone" in outputs[1] and "training goes on" not in outputs[1]
    assert time.monotonic() - started < 100


@pytest.mark.parametrize("engine", ["plain", "fsdp2"])
def test_passes_that_take_long_on_every_process_end_nothing(tmp_path: Path, engine: str):
    """A second a pass, and more before the first gradients than the patience of three."""
    codes, outputs = ended(tmp_path, engine, "passes", 0.05, every=0)
    assert codes == [0, 0], outputs
    lines = (tmp_path / "out/log.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 and min(json.loads(line)["seconds"] for line in lines) > 3
