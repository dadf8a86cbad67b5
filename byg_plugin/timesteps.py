"""The law of the training t, and the nodes of rollouts and samplers. All in the convention of `flow.py`."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor


def shift(t: Tensor, s: float) -> Tensor:
    """t <- s t / (1 + (s - 1) t): moves times towards noise for s > 1 (Esser et al. 2024).

    Written so that 0 and 1 stay what they are to the last bit.
    """
    return t / (t + (1 - t) / s)


def stretch(nodes: Tensor, terminal: float) -> Tensor:
    """(n + 1,) nodes from 1 to 0, the inner ones stretched away from 1 so that the last before 0 is `terminal`.

    Source: `shift_terminal` of diffusers' FlowMatchEulerDiscreteScheduler. One step alone has no inner node and stays.
    """
    if len(nodes) < 3:
        return nodes
    inner = 1 - (1 - nodes[:-1]) * ((1 - terminal) / (1 - nodes[-2]))
    return torch.cat([inner, nodes[-1:]])


def sample_t(
    batch: int,
    generator: torch.Generator,
    *,
    distribution: Literal["uniform", "logit_normal"] = "uniform",
    s: float = 1.0,
    t_min: float = 0.0,
    t_max: float = 1.0,
) -> Tensor:
    """(batch,) float32 training times in [t_min, t_max] on the generator's device.

    `uniform` is Algorithm 1; `logit_normal` is sigmoid(z), z ~ N(0, 1). The shift comes after the law, the range last
    (a linear map of [0, 1] onto it).
    """
    device = generator.device
    if distribution == "uniform":
        t = torch.rand(batch, generator=generator, device=device)
    else:
        t = torch.sigmoid(torch.randn(batch, generator=generator, device=device))
    return t_min + (t_max - t_min) * shift(t, s)


def is_high(t: Tensor, boundary: float) -> Tensor:
    """(B,) bool: which t are served by the high-noise expert. The boundary is rounded to t's dtype, as t itself was."""
    return t >= torch.tensor(boundary, dtype=t.dtype, device=t.device)


def probability_above(
    boundary: float,
    *,
    distribution: Literal["uniform", "logit_normal"] = "uniform",
    s: float = 1.0,
    t_min: float = 0.0,
    t_max: float = 1.0,
) -> float:
    """P(t >= boundary) under the law of `sample_t`, in closed form."""
    return 1.0 - _cumulative(boundary, distribution, s, t_min, t_max)


def _cumulative(t: float, distribution: str, s: float, t_min: float, t_max: float) -> float:
    """P(T < t): back through range and shift to the law."""
    u = min(max((t - t_min) / (t_max - t_min), 0.0), 1.0)
    u = u / (u + (1 - u) * s)
    if distribution == "uniform" or u in (0.0, 1.0):
        return u
    return NormalDist().cdf(math.log(u / (1 - u)))


def sample_t_beside(
    batch: int,
    generator: torch.Generator,
    boundary: float,
    high: bool,
    *,
    distribution: Literal["uniform", "logit_normal"] = "uniform",
    s: float = 1.0,
    t_min: float = 0.0,
    t_max: float = 1.0,
) -> Tensor:
    """(batch,) float32 from the law of `sample_t` given the side of the boundary, by the inverse of its distribution function.

    Nothing is drawn twice: with the side drawn first, with probability `probability_above`, t has exactly the law.
    """
    split = _cumulative(boundary, distribution, s, t_min, t_max)
    first, last = (split, 1.0) if high else (0.0, split)
    assert last > first, "no t on this side"
    p = first + (last - first) * torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)
    u = p if distribution == "uniform" else torch.sigmoid(torch.special.ndtri(p))
    t = (t_min + (t_max - t_min) * shift(u, s)).float()
    edge = torch.tensor(boundary, dtype=torch.float32, device=t.device)
    # Rounding must not carry a t over the boundary: the other expert would serve it.
    return t.clamp(min=edge) if high else torch.minimum(t, torch.nextafter(edge, torch.zeros_like(edge)))


def uniform_nodes(steps: int, device: torch.device | None = None) -> Tensor:
    """(steps + 1,) equidistant times from 1 (noise) to 0 (data), float32."""
    return torch.linspace(1, 0, steps + 1, device=device)


def nodes_through(nodes: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A schedule per sample that visits its t exactly.

    The nearest interior node moves onto t; the end points 1 and 0 never move, so y_0 costs no extra step.

    Args:
        nodes: (n + 1,) falling from 1 to 0, n >= 2.
        t: (B,) in [0, 1].

    Returns:
        (B, n + 1) nodes, and (B,) the index of t in them, in 1 .. n - 1.
    """
    if nodes.ndim != 1 or len(nodes) < 3:
        raise ValueError(f"a rollout needs at least 2 steps, got nodes of shape {tuple(nodes.shape)}")
    nodes = nodes.to(t)
    index = (nodes[1:-1][None] - t[:, None]).abs().argmin(dim=1) + 1
    schedule = nodes.repeat(len(t), 1)
    schedule[torch.arange(len(t), device=t.device), index] = t
    return schedule, index
