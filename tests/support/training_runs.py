"""Runs of the trainer on the tiny workspace, ended and compared."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from byg_plugin import train_network
from byg_plugin.config.sections import Config
from byg_plugin.models.flux import FluxFamily
from byg_plugin.training.loop import Trainer
from tests.support.tiny import curve


def tensors_of(out: Path, name: str = "byg_lora") -> dict[str, torch.Tensor]:
    return load_file(out / f"{name}.safetensors")


def assert_same_run(one: Path, other: Path, ema: bool = True) -> None:
    """Exactly the same loss curve and the same files, to the last bit."""
    assert curve(one) == curve(other)
    for name in ("byg_lora", "byg_lora-ema") if ema else ("byg_lora",):
        a, b = tensors_of(one, name), tensors_of(other, name)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def train(config: Config, resume: str | None = None) -> None:
    train_network.train(config, FluxFamily(config), torch.device("cpu"), resume)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_step(trainer: Trainer, step: int) -> None:
    """In the middle of a step: after the gradients, before the optimizer."""
    original = trainer.diagnosis.before_step

    def hook(*args: Any) -> None:
        if trainer.step == step:
            kill()
        original(*args)

    trainer.diagnosis.before_step = hook  # type: ignore[method-assign]


def killed_after_save(trainer: Trainer, step: int) -> None:
    """The checkpoint is there, what follows it (validation) is not."""
    original = trainer._save

    def hook() -> None:
        original()
        if trainer.step == step:
            kill()

    trainer._save = hook  # type: ignore[method-assign]
