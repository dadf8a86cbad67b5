"""The law of t, and schedules that visit it."""

from __future__ import annotations

import math

import pytest
import torch

from byg_plugin import timesteps


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shift_keeps_the_ends_and_one_is_the_identity():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(timesteps.shift(t, 1.0), t)
    for s in (0.3, 3.0):
        moved = timesteps.shift(t, s)
        assert moved[0] == 0 and abs(moved[-1].item() - 1) < 1e-15
        assert (moved.diff() > 0).all()


def test_shift_above_one_moves_towards_noise():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert (timesteps.shift(t, 3.0) > t).all()
    assert (timesteps.shift(t, 1 / 3) < t).all()
    assert timesteps.shift(torch.tensor(0.5), 3.0).item() == 0.75  # 1.5 / (1 + 1)
    torch.testing.assert_close(timesteps.shift(timesteps.shift(t, 3.0), 1 / 3), t)


@pytest.mark.parametrize("s", [1.0, 3.0])
def test_uniform_t_has_the_quantiles_of_a_shifted_uniform(s):
    t = timesteps.sample_t(40_000, rng(), s=s)
    assert t.shape == (40_000,) and t.dtype == torch.float32
    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(torch.quantile(t, levels), timesteps.shift(levels, s), rtol=0, atol=0.015)


def test_logit_normal_t_has_a_normal_logit():
    logit = torch.logit(timesteps.sample_t(40_000, rng(), distribution="logit_normal").double())
    assert abs(logit.mean().item()) < 0.02
    assert abs(logit.std().item() - 1) < 0.02


def test_the_shift_of_a_logit_normal_moves_the_logit_by_log_s():
    logit = torch.logit(timesteps.sample_t(40_000, rng(), distribution="logit_normal", s=4.0).double())
    assert abs(logit.mean().item() - math.log(4.0)) < 0.02


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_the_range_is_filled_and_never_left(distribution):
    t = timesteps.sample_t(20_000, rng(), distribution=distribution, s=2.0, t_min=0.2, t_max=0.7)
    assert t.min() >= 0.2 and t.max() <= 0.7
    assert t.min() < 0.25 and t.max() > 0.67


def test_t_depends_on_the_generator_alone():
    torch.manual_seed(1)
    first = timesteps.sample_t(5, rng(7))
    torch.manual_seed(2)
    assert torch.equal(first, timesteps.sample_t(5, rng(7)))
    assert not torch.equal(first, timesteps.sample_t(5, rng(8)))
    assert len(first.unique()) == 5


def test_uniform_nodes_fall_from_one_to_zero():
    nodes = timesteps.uniform_nodes(10)
    assert nodes[0] == 1 and nodes[-1] == 0 and len(nodes) == 11
    torch.testing.assert_close(nodes.diff(), torch.full((10,), -0.1))


# --- nodes_through ---

TIMES = torch.tensor([0.0, 0.01, 0.13, 0.5, 0.77, 0.99, 1.0], dtype=torch.float64)
SCHEDULES = {
    "uniform 10": torch.linspace(1, 0, 11, dtype=torch.float64),
    "uniform 2": torch.linspace(1, 0, 3, dtype=torch.float64),
    "uniform 3": torch.linspace(1, 0, 4, dtype=torch.float64),
    "shifted": timesteps.shift(torch.linspace(1, 0, 9, dtype=torch.float64), 3.0),
}


@pytest.mark.parametrize("nodes", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_visits_its_t_exactly_and_keeps_the_ends(nodes):
    schedule, index = timesteps.nodes_through(nodes, TIMES)
    assert schedule.shape == (len(TIMES), len(nodes))
    assert torch.equal(schedule[torch.arange(len(TIMES)), index], TIMES)
    assert (schedule[:, 0] == 1).all() and (schedule[:, -1] == 0).all()
    assert (index >= 1).all() and (index <= len(nodes) - 2).all()
    assert (schedule.diff(dim=1) <= 0).all(), "a rollout never goes back in time"


@pytest.mark.parametrize("nodes", SCHEDULES.values(), ids=SCHEDULES)
def test_only_the_nearest_interior_node_moves(nodes):
    before = nodes.clone()
    schedule, index = timesteps.nodes_through(nodes, TIMES)
    for i, t in enumerate(TIMES.tolist()):
        interior = nodes[1:-1]
        assert abs(interior[index[i] - 1] - t) == (interior - t).abs().min()
        others = torch.arange(len(nodes)) != index[i]
        assert torch.equal(schedule[i, others], nodes[others])
    assert torch.equal(nodes, before), "the shared nodes must not be written to"


def test_a_t_on_a_node_changes_nothing():
    nodes = SCHEDULES["uniform 10"]
    schedule, index = timesteps.nodes_through(nodes, nodes[3:4])
    assert torch.equal(schedule[0], nodes) and index.tolist() == [3]


@pytest.mark.parametrize("nodes", [torch.tensor([1.0, 0.0]), torch.tensor([1.0]), torch.ones(2, 5)])
def test_a_rollout_of_less_than_two_steps_is_refused(nodes):
    with pytest.raises(ValueError, match="at least 2 steps"):
        timesteps.nodes_through(nodes, torch.tensor([0.5]))


# --- two experts ---

LAWS = [
    {"distribution": "logit_normal", "s": 12.0},
    {"distribution": "uniform", "s": 3.0},
    {"distribution": "logit_normal", "s": 5.0, "t_min": 0.1, "t_max": 0.95},
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("boundary", [0.875, 0.5])
def test_probability_of_a_side_is_what_many_draws_show(law: dict, boundary: float):
    probability = timesteps.probability_above(boundary, **law)
    drawn = timesteps.sample_t(200_000, torch.Generator().manual_seed(0), **law)
    assert (drawn >= boundary).float().mean().item() == pytest.approx(probability, abs=4e-3)
    assert 0.05 < probability < 1


def test_the_papers_share_of_the_high_noise_expert():
    # logit(t / (t + (1 - t) 12)) at t = 0.875 is log(7 / 12): P(z >= -0.539).
    assert timesteps.probability_above(0.875, distribution="logit_normal", s=12.0) == pytest.approx(0.70505, abs=1e-4)
    assert timesteps.probability_above(0.2) == pytest.approx(0.8)
    assert timesteps.probability_above(0.2, t_min=0.5) == 1.0 and timesteps.probability_above(0.9, t_max=0.5) == 0.0


@pytest.mark.parametrize("law", LAWS)
def test_side_first_and_then_t_has_the_same_law(law: dict):
    """A Kolmogorov-Smirnov distance against the plain draw, and every t on its side."""
    rng, boundary, count = torch.Generator().manual_seed(1), 0.875, 100_000
    above = round(count * timesteps.probability_above(boundary, **law))
    high = timesteps.sample_t_beside(above, rng, boundary, True, **law)
    low = timesteps.sample_t_beside(count - above, rng, boundary, False, **law)
    assert timesteps.is_high(high, boundary).all() and not timesteps.is_high(low, boundary).any()
    assert high.dtype == torch.float32 and high.max() <= law.get("t_max", 1.0) and low.min() >= law.get("t_min", 0.0)
    mixed, plain = torch.cat([low, high]).sort().values, timesteps.sample_t(count, rng, **law).sort().values
    grid = torch.linspace(0, 1, 999)
    distance = (torch.searchsorted(mixed, grid) - torch.searchsorted(plain, grid)).abs().max().item() / count
    assert distance < 1.63 * (2 / count) ** 0.5  # the 1 % level


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("high", "drawn"), [(False, 1 - 2**-53), (True, 0.0)], ids=["low", "high"])
def test_rounding_carries_no_t_over_the_boundary(monkeypatch: pytest.MonkeyPatch, law: dict, high: bool, drawn: float):
    """The draw nearest to the boundary: in float32 it would be the boundary itself, which the other expert serves."""
    monkeypatch.setattr(torch, "rand", lambda size, **options: torch.full((size,), drawn, dtype=torch.float64))
    for boundary in (0.875, 0.9, 0.4):
        t = timesteps.sample_t_beside(4, torch.Generator(), boundary, high, **law)
        assert (timesteps.is_high(t, boundary) == high).all() and t[0].item() == pytest.approx(boundary, abs=1e-6)


def test_the_boundary_itself_is_high_in_every_precision():
    for boundary in (0.875, 0.9, 1 / 3):
        t = torch.tensor([boundary], dtype=torch.float32)
        assert timesteps.is_high(t, boundary).all() and not timesteps.is_high(torch.nextafter(t, torch.zeros(1)), boundary).any()


def test_stretched_nodes_are_the_schedulers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.02, use_dynamic_shifting=True)
    nodes = timesteps.uniform_nodes(7)
    scheduler.set_timesteps(sigmas=nodes[:-1].tolist(), mu=0.7)
    ours = timesteps.stretch(timesteps.shift(nodes, math.exp(0.7)), 0.02)
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=1e-5, atol=1e-6)
    assert ours[0] == 1 and ours[-1] == 0
    assert timesteps.stretch(timesteps.uniform_nodes(1), 0.02).tolist() == [1.0, 0.0]
