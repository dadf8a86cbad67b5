"""The rollout: exact on a straight path, its times, its cost, its noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin.objectives.base import Batch
from tests.support.objective_runs import Loop, edit_calls, objective
from tests.support.toy_fields import RecordedFields, ToyFields, numbers, toy_batch

EDGE_T = (0.0, 0.01, 0.13, 0.5, 0.99, 1.0)


def rolled_out(ema: Callable[[Tensor, Tensor], Tensor], batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
    """y_t and y_0 as the forward and the reverse pass see them."""
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    fields = RecordedFields(
        lambda noisy, t, text, source: weight * noisy + source,
        lambda noisy, t, text, source: ema(noisy, t),
        lambda noisy, t, text, source: torch.zeros_like(noisy),
    )
    objective(**options).step(fields, batch, Loop(fields))
    roles = edit_calls(fields, batch)
    return roles["forward"].noisy, roles["reverse"].source.detach()


@pytest.mark.parametrize("steps", [2, 7, 10])
def test_y_t_is_exact_on_a_straight_path_for_every_samples_t(steps):
    """A constant velocity is integrated exactly by Euler: y_t must be the path's point at that sample's own t."""
    batch = toy_batch(EDGE_T, steps=steps)
    target = numbers(*batch.source.shape, seed="target")
    y_t, y_0 = rolled_out(lambda noisy, t: batch.noise - target, batch)
    t = batch.t.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(y_t, (1 - t) * target + t * batch.noise, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(y_0, target, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("steps", [2, 7, 10])
def test_the_rollout_asks_the_velocity_at_the_nodes_times(steps):
    """v = s: each Euler step moves by s (s - s_next), so the sums tell at which times the field was asked."""
    batch = toy_batch(EDGE_T, steps=steps)
    y_t, y_0 = rolled_out(lambda noisy, t: t.view(-1, 1, 1, 1, 1).expand(noisy.shape), batch)
    for i, t in enumerate(EDGE_T):
        times = [1 - k / steps for k in range(steps + 1)]
        at = min(range(1, steps), key=lambda k: abs(times[k] - t))
        times[at] = t
        moves = [times[k] * (times[k] - times[k + 1]) for k in range(steps)]
        torch.testing.assert_close(y_t[i], batch.noise[i] - sum(moves[:at]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y_0[i], batch.noise[i] - sum(moves), rtol=1e-12, atol=1e-12)


def test_many_steps_reach_the_known_integral():
    """v = y s has the solution y(t) = noise exp((t^2 - 1) / 2); Euler's error falls with the step."""
    errors = []
    for steps in (50, 400):
        batch = toy_batch((0.01, 0.4, 0.99), steps=steps)
        y_t, y_0 = rolled_out(lambda noisy, t: noisy * t.view(-1, 1, 1, 1, 1), batch)
        t = batch.t.view(-1, 1, 1, 1, 1)
        at_t = (y_t - batch.noise * torch.exp((t**2 - 1) / 2)).abs().max().item()
        at_0 = (y_0 - batch.noise * math.exp(-0.5)).abs().max().item()
        errors.append(max(at_t, at_0))
    assert errors[1] < 0.2 * errors[0] and errors[1] < 5e-3


def test_the_rollout_costs_one_call_a_step_and_starts_at_the_noise(fields, batch):
    objective().step(fields, batch, Loop())
    calls = fields.of("ema")
    assert len(calls) == len(batch.nodes) - 1
    assert torch.equal(calls[0].noisy, batch.noise)
    for call in calls:
        assert torch.equal(call.text["tokens"], batch.instruction["tokens"]) and torch.equal(call.source, batch.source)


def test_without_routing_the_rollout_stops_where_the_last_sample_is(fields):
    batch = toy_batch((0.85, 0.6, 0.7), steps=10)
    objective(routing=False).step(fields, batch, Loop())
    assert len(fields.of("ema")) == 4


def test_the_same_noise_makes_x_t_and_starts_the_rollout(fields, batch):
    objective().step(fields, batch, Loop())
    t = batch.t.view(-1, 1, 1, 1, 1)
    x_t = (1 - t) * batch.source + t * batch.noise
    roles = edit_calls(fields, batch)
    for role in ("reverse", "identity"):
        torch.testing.assert_close(roles[role].noisy, x_t, rtol=1e-14, atol=1e-14)
    assert (roles["forward"].noisy - x_t).norm() > 1e-2


def test_without_bootstrap_the_forward_pass_sees_x_t_and_the_reverse_pass_still_y_0(batch):
    paper, ablated = ToyFields(), ToyFields()
    objective().step(paper, batch, Loop())
    objective(bootstrap=False).step(ablated, batch, Loop())
    with_it, without = edit_calls(paper, batch), edit_calls(ablated, batch)
    assert torch.equal(without["forward"].noisy, with_it["reverse"].noisy)
    assert torch.equal(without["reverse"].source, with_it["reverse"].source)
