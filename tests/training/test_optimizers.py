"""The learning rate's schedule and the optimizers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from byg_plugin.training.optimizers import learning_rate
from tests.support.tiny import curve, make_trainer, run_config


def test_learning_rate_closed_form(tmp_path: Path, reference: Path):
    config = run_config(tmp_path, train={"steps": 12, "lr_warmup_steps": 4, "lr": 1.0})
    rates = [learning_rate(config.train, step) for step in range(13)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0 and rates[8] == pytest.approx(0.5) and rates[12] == pytest.approx(0.0)
    assert rates[6] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    constant = run_config(tmp_path, train={"steps": 12, "lr_warmup_steps": 0, "lr_schedule": "constant", "lr": 0.3})
    assert {learning_rate(constant.train, step) for step in range(12)} == {0.3}
    used = run_config(tmp_path)
    assert [line["lr"] for line in curve(reference)] == [learning_rate(used.train, step) for step in range(6)]


def test_the_optimizer_uses_the_schedule(tmp_path: Path):
    trainer = make_trainer(run_config(tmp_path / "out"))
    used: list[float] = []
    optimizer = trainer.engine.optimizers["edit"]
    step = optimizer.step
    optimizer.step = lambda *a: (used.append(optimizer.param_groups[0]["lr"]), step(*a))  # type: ignore[method-assign]
    trainer.run()
    assert used == [learning_rate(trainer.config.train, k) for k in range(6)]


def test_muon_s_first_update_is_as_long_as_adamw_s_would_be(tmp_path: Path):
    """Orthogonal and scaled to a root mean square of 0.2 of the learning rate, whatever the gradient's size."""
    lr = 1e-2
    train = {"optimizer": "muon", "steps": 1, "weight_decay": 0.0, "lr": lr, "lr_warmup_steps": 0, "lr_schedule": "constant"}
    trainer = make_trainer(run_config(tmp_path / "out", train=train))
    before = {name: p.detach().clone() for name, p in trainer.host.parameters.items()}
    trainer.run()
    moved = [p.detach() - before[n] for n, p in trainer.host.parameters.items() if n.endswith("lora_B.weight")]
    sizes = torch.tensor([delta.square().mean().sqrt() for delta in moved if delta.any()])
    assert len(sizes) > 4
    assert ((sizes / lr > 0.05) & (sizes / lr < 0.25)).all(), sizes / lr
