"""Euler sampling of an edit: the one sampler of previews and `edit.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from byg_plugin import flow, timesteps
from byg_plugin.models.base import Family, Text
from byg_plugin.objectives.base import Velocity


def sampling_nodes(family: Family, steps: int, schedule: str, latent_shape: tuple[int, ...]) -> Tensor:
    """(steps + 1,) times from 1 to 0, float32 on the CPU; `shifted` applies the family's inference shift."""
    nodes = timesteps.uniform_nodes(steps)
    return family.shifted_nodes(nodes, latent_shape) if schedule == "shifted" else nodes


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    text: Text,
    source: Tensor | None,
    nodes: Tensor,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Integrate the velocity from noise (B, C, F, H, W) at t = 1 to latents at t = 0.

    Args:
        velocity: the field, e.g. of `Host.live()`.
        noise: the starting point.
        text: encoded instructions (or captions, for the base).
        source: source latents, or None for the base model.
        nodes: (n + 1,) falling from 1 to 0.
        on_step: called after every step (progress).
    """
    x = noise
    for s, s_next in zip(nodes[:-1].tolist(), nodes[1:].tolist(), strict=True):
        t, t_next = (torch.full((len(x),), value, device=x.device) for value in (s, s_next))
        x = flow.euler_step(x, velocity(x, t, text, source), t, t_next)
        if on_step is not None:
            on_step()
    return x


def seeded_noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Standard normal noise that depends on the seed alone, not on the device (drawn on the CPU)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
