"""The times of a sampler, as the trainer's `edit.py` makes them. t falls from 1, noise, to 0; flow models call t sigma."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MOST_STEPS = 1000


def sigmas(shift: Any, steps: int, height: int, width: int, *, shifted: bool = True) -> Tensor:
    """(steps + 1,) sigmas from 1 to 0, float32.

    Args:
        shift: of a family, see `families.json`.
        steps: of the sampler.
        height, width: of the latents, on which some families' shifts depend.
        shifted: whether the shift is applied.
    """
    nodes = torch.linspace(1, 0, steps + 1)
    if not shifted:
        return nodes
    s = shift_factor(shift, steps, height, width)
    nodes = nodes / (nodes + (1 - nodes) / s)
    terminal = shift.get("terminal") if isinstance(shift, dict) else None
    return nodes if terminal is None else _stretched(nodes, terminal)


def shift_factor(shift: Any, steps: int, height: int, width: int) -> float:
    """The factor s of t <- s t / (1 + (s - 1) t) at a number of steps and a size of latents."""
    if not isinstance(shift, dict):
        return float(shift)
    if "lines" in shift:
        return math.exp(_mu_of_steps(shift, height * width, steps))
    tokens = (height // shift["patch"]) * (width // shift["patch"])
    (first, last), (low, high) = shift["tokens"], shift["mu"]
    return math.exp(low + (high - low) * (tokens - first) / (last - first))


def split(nodes: Tensor, boundary: float) -> tuple[Tensor, Tensor]:
    """The sigmas of the high-noise and of the low-noise network; both contain the one where they meet.

    A step belongs to the network of the t that it starts at. Without a step of its own, a network gets one sigma: a sampler then
    does nothing.
    """
    steps = int((nodes[:-1] >= torch.tensor(boundary)).sum())
    return nodes[: steps + 1], nodes[steps:]


def _stretched(nodes: Tensor, terminal: float) -> Tensor:
    """The last time before 0 becomes `terminal`. Source: `shift_terminal` of diffusers' FlowMatchEulerDiscreteScheduler."""
    if len(nodes) < 3:
        return nodes
    inner = 1 - (1 - nodes[:-1]) * ((1 - terminal) / (1 - nodes[-2]))
    return torch.cat([inner, nodes[-1:]])


def _mu_of_steps(shift: dict[str, Any], tokens: int, steps: int) -> float:
    ((few, (slope, offset)), (many, (slope_many, offset_many))) = shift["lines"]
    low, high = slope * tokens + offset, slope_many * tokens + offset_many
    return high if tokens > shift["most_tokens"] else low + (high - low) * (steps - few) / (many - few)
