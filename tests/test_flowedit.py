"""FlowEdit: by a transcription of Algorithm 1 written by hand, and by cases that have a closed form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from byg_plugin import timesteps
from byg_plugin.flowedit import Field, flowedit

SHAPE = (2, 3, 1, 4, 5)


def noises(seed: int = 0) -> Callable[[], Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(SHAPE, generator=rng, dtype=torch.float64)


def field(seed: int) -> Field:
    """Bent in x and in t, other for every caption."""
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return lambda x, t: torch.tanh(x @ weight) * (1 + t.view(-1, 1, 1, 1, 1)) + weight.sum()


def by_hand(v_src: Field, v_tar: Field, x_src: Tensor, nodes: list[float], draw: Callable[[], Tensor], n: tuple[int, int, int]) -> Tensor:
    """Algorithm 1 of the paper, line by line, i counted down as there: t_i = nodes[T - i]."""
    n_max, n_min, n_avg = n
    steps = len(nodes) - 1
    at = {i: nodes[steps - i] for i in range(steps + 1)}
    z_fe = x_src.clone()
    for i in range(n_max, n_min, -1):
        total = torch.zeros_like(x_src)
        for _ in range(n_avg):
            z_src = (1 - at[i]) * x_src + at[i] * draw()
            z_tar = z_fe + z_src - x_src
            t = torch.tensor([at[i]] * len(x_src), dtype=torch.float64)
            total += v_tar(z_tar, t) - v_src(z_src, t)
        z_fe = z_fe + (at[i - 1] - at[i]) * total / n_avg
    if n_min == 0:
        return z_fe
    z_src = (1 - at[n_min]) * x_src + at[n_min] * draw()
    z_tar = z_fe + z_src - x_src
    for i in range(n_min, 0, -1):
        z_tar = z_tar + (at[i - 1] - at[i]) * v_tar(z_tar, torch.tensor([at[i]] * len(x_src), dtype=torch.float64))
    return z_tar


@pytest.mark.parametrize("n", [(24, 0, 1), (28, 0, 1), (20, 5, 1), (24, 3, 4), (6, 6, 2), (1, 0, 3), (28, 27, 1)])
def test_it_is_algorithm_1(n: tuple[int, int, int]):
    x_src, nodes = noises(9)(), timesteps.shift(timesteps.uniform_nodes(28), 3.0)
    n_max, n_min, n_avg = n
    found = flowedit(field(1), field(2), x_src, noises(), nodes, n_max=n_max, n_min=n_min, n_avg=n_avg)
    wanted = by_hand(field(1), field(2), x_src, nodes.tolist(), noises(), n)
    assert (found - wanted).abs().max() <= 1e-10 and (found - x_src).abs().max() > 1e-2


def test_one_caption_twice_leaves_the_source_to_the_last_bit():
    x_src = noises(9)().float()
    found = flowedit(field(1), field(1), x_src, noises(), timesteps.uniform_nodes(7), n_max=6, n_avg=2)
    assert torch.equal(found, x_src)


def test_two_constant_fields_move_the_source_by_their_difference_times_the_time_that_is_left():
    x_src, nodes = noises(9)(), timesteps.uniform_nodes(10)
    constant = [lambda x, t, c=c: torch.full_like(x, c) for c in (2.0, 5.0)]
    found = flowedit(*constant, x_src, noises(), nodes, n_max=4, n_avg=3)
    assert (found - (x_src - 0.4 * 3.0)).abs().max() < 1e-6  # the nodes are float32


def test_all_steps_sampling_is_the_targets_own_flow_from_the_noised_source():
    """The straight path's field to a fixed target: from any t its flow ends there, whatever the source."""
    goal, x_src = noises(3)(), noises(9)()
    to_goal: Field = lambda x, t: (x - goal) / t.view(-1, 1, 1, 1, 1)  # noqa: E731
    found = flowedit(field(1), to_goal, x_src, noises(), timesteps.uniform_nodes(5), n_max=3, n_min=3)
    assert (found - goal).abs().max() < 1e-12


def test_steps_are_counted_and_noise_is_drawn_only_where_it_is_used():
    calls, draw, drawn = [], noises(), []

    def counted() -> Tensor:
        drawn.append(1)
        return draw()

    options = {"n_max": 6, "n_min": 2, "n_avg": 3}
    flowedit(field(1), field(2), noises(9)(), counted, timesteps.uniform_nodes(8), **options, on_step=lambda: calls.append(1))
    assert len(calls) == 8 and len(drawn) == 4 * 3 + 1
