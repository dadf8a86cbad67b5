"""The plain engine: one optimizer step, checked before it moves anything, and agreement over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from byg_plugin.config.sections import TrainConfig
from byg_plugin.training.engines.plain import PlainEngine
from tests.support.engine_runs import in_processes

CPU = torch.device("cpu")


def engine(**train: Any) -> tuple[PlainEngine, dict[str, nn.Parameter]]:
    """Two adapters of one weight each, and the weights."""
    weights = {name: nn.Parameter(torch.full((2, 2), 1.0)) for name in ("edit", "critic")}
    options = {"steps": 9, "optimizer": "adamw", "weight_decay": 0.0, "max_grad_norm": 1.0} | train
    return PlainEngine(TrainConfig(**options), {name: {"w": weight} for name, weight in weights.items()}, 2, CPU), weights


def test_a_step_clips_each_adapter_alone_and_leaves_no_gradient():
    it, weights = engine()
    seen: dict[str, torch.Tensor] = {}

    def check(norms: Any) -> None:
        seen.update({name: weight.grad.clone() for name, weight in weights.items()})

    assert it.backward(weights["edit"].sum() * 100, last=False) == 0.5
    it.backward(weights["critic"].sum() * 0.1, last=True)
    norms = it.step(0.25, check)
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx({"edit": 100.0, "critic": 0.1})
    assert seen["edit"].norm().item() == pytest.approx(1.0, rel=1e-4) and seen["critic"].norm().item() == pytest.approx(0.1)
    assert all(weight.grad is None for weight in weights.values())
    torch.testing.assert_close(weights["edit"].detach(), torch.full((2, 2), 0.75))  # Adam's first step is as long as the rate


def test_what_the_check_raises_leaves_everything_as_it_was():
    it, weights = engine()
    it.backward(weights["edit"].sum(), last=True)

    def check(norms: Any) -> None:
        raise FloatingPointError("stop")

    with pytest.raises(FloatingPointError, match="stop"):
        it.step(0.25, check)
    assert torch.equal(weights["edit"].detach(), torch.ones(2, 2)) and weights["edit"].grad is None
    assert not any(state["state"] for state in it.state().values())


def test_an_adapter_without_a_gradient_does_not_move():
    it, weights = engine(weight_decay=0.5)
    it.backward(weights["edit"].sum(), last=True)
    norms = it.step(0.25, lambda norms: None)
    assert norms["critic"] == 0 and torch.equal(weights["critic"].detach(), torch.ones(2, 2))
    assert {name: len(state["state"]) for name, state in it.state().items()} == {"edit": 1, "critic": 0}


def test_a_loaded_state_keeps_this_run_s_options():
    one, weights = engine()
    one.backward(weights["edit"].sum(), last=True)
    one.step(0.25, lambda norms: None)
    other, _ = engine(weight_decay=0.125)
    other.load_state(one.state())
    state = other.state()["edit"]
    assert state["param_groups"][0]["weight_decay"] == 0.125
    assert torch.equal(state["state"][0]["exp_avg"], one.state()["edit"]["state"][0]["exp_avg"])


def agree() -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    it, weights = engine(max_grad_norm=0.0)
    weights["critic"].data.fill_(float(rank + 5))
    it.broadcast()
    assert weights["critic"][0, 0] == 5
    assert it.any(rank == 1) and not it.any(False)
    assert it.mean({"b": torch.tensor(float(rank)), "a": torch.tensor(3)}) == {"a": 3.0, "b": 0.5}
    it.backward(weights["edit"].sum() * (2.0 if rank else 4.0), last=True)
    norms = it.step(0.25, lambda norms: None)
    assert norms["edit"].item() == 3.0 and norms["critic"] == 0, norms  # 4 gradients of (1 + 2) / 2
    torch.distributed.destroy_process_group()


def test_two_processes_agree(tmp_path: Path):
    in_processes(2, agree, tmp_path)
