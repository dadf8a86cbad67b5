"""Rollouts of second order: convergence on a known field, uneven nodes, the experts' boundary, and Euler as it was."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin import flow, timesteps
from byg_plugin.objectives.base import Batch
from tests.support.objective_runs import objective
from tests.support.toy_fields import RecordedFields, toy_batch


def known(noisy: Tensor, t: Tensor, text: Any, source: Tensor | None) -> Tensor:
    """dy/dt = 2 y: from y at 1 to y exp(2 (t - 1))."""
    return 2 * noisy


def rolled(solver: str, batch: Batch, field: Any = known) -> tuple[Tensor, Tensor]:
    fields = RecordedFields(field, field, field)
    y_t, y_0 = objective(rollout_solver=solver)._rollout(fields, batch, reverse=True)
    assert y_0 is not None
    return y_t, y_0


def error(solver: str, steps: int, shift: float = 1.0) -> float:
    batch = toy_batch((0.13, 0.52, 0.87), steps=steps)
    assert batch.nodes is not None
    batch = dataclasses.replace(batch, nodes=timesteps.shift(batch.nodes, shift))
    y_t, y_0 = rolled(solver, batch)
    exact_t = batch.noise * torch.exp(2 * (flow.expand(batch.t, batch.noise) - 1))
    exact_0 = batch.noise * math.exp(-2)
    return max(((found - exact).norm() / exact.norm()).item() for found, exact in ((y_t, exact_t), (y_0, exact_0)))


@pytest.mark.parametrize("shift", [1.0, 1.6])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2)])
def test_the_error_falls_with_its_order(solver: str, order: int, shift: float):
    """Of nodes with t moved in, which are uneven."""
    orders = [math.log2(error(solver, n, shift) / error(solver, 2 * n, shift)) for n in (40, 80, 160)]
    assert all(abs(found - order) < 0.35 for found in orders), orders


def test_it_calls_the_field_as_often_and_at_the_same_times():
    seen: dict[str, list[Tensor]] = {"euler": [], "ab2": []}
    for solver, times in seen.items():

        def field(noisy: Tensor, t: Tensor, text: Any, source: Tensor | None, times: list[Tensor] = times) -> Tensor:
            times.append(t.clone())
            return known(noisy, t, text, source)

        rolled(solver, toy_batch(steps=5), field)
    assert len(seen["euler"]) == len(seen["ab2"]) == 5
    assert all(map(torch.equal, seen["euler"], seen["ab2"]))


def test_it_is_adams_bashforth_written_by_hand():
    batch = toy_batch((0.6,), steps=4)
    y_t, y_0 = rolled("ab2", batch, lambda noisy, t, text, source: noisy**2 - flow.expand(t, noisy))
    nodes, y, f_before, h_before, states = [1.0, 0.75, 0.6, 0.25, 0.0], batch.noise, None, 1.0, []
    for s, s_next in zip(nodes, nodes[1:], strict=False):
        f, h = y**2 - s, s - s_next
        slope = f if f_before is None else f + min(h / h_before, 2.0) / 2 * (f - f_before)
        y, f_before, h_before = y - h * slope, f, h
        states.append(y)
    torch.testing.assert_close(y_0, states[-1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y_t, states[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [1.0, 1.0 - 1e-9, 0.0, 1e-9])
def test_a_step_without_length_is_no_trouble(t: float):
    batch = toy_batch((t,), steps=5)
    (y_t, y_0), (_, euler) = rolled("ab2", batch), rolled("euler", batch)
    exact = batch.noise * math.exp(-2)
    assert torch.isfinite(y_t).all() and (y_0 - exact).norm() < (euler - exact).norm()


def test_the_experts_boundary_starts_it_anew():
    """A field that jumps there: what came before says nothing of what follows."""
    nodes = toy_batch(steps=40).nodes
    batch = dataclasses.replace(toy_batch((0.31, 0.83), steps=40), nodes=nodes, boundary=0.5)

    def jumping(noisy: Tensor, t: Tensor, text: Any, source: Tensor | None) -> Tensor:
        return torch.where(flow.expand(t, noisy) >= 0.5, 8 * torch.ones_like(noisy), -8 * torch.ones_like(noisy))

    with_restart, without = (rolled("ab2", one, jumping)[1] for one in (batch, dataclasses.replace(batch, boundary=None)))
    euler = rolled("euler", batch, jumping)[1]
    torch.testing.assert_close(with_restart, euler, rtol=1e-12, atol=1e-12)  # constant on each side
    assert not torch.allclose(without, euler, atol=1e-3)
