"""Sampling of an edit, by Euler or the family's own solver, with or without guidance: for previews and `edit.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from byg_plugin import flow, timesteps
from byg_plugin.families.geometry import Geometry
from byg_plugin.finite import is_finite
from byg_plugin.models.base import Family
from byg_plugin.objectives.base import Text, Velocity
from byg_plugin.texts import GUIDANCE

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config


def sampling_nodes(geometry: Geometry, steps: int, schedule: str, latent_shape: tuple[int, ...]) -> Tensor:
    """(steps + 1,) times from 1 to 0, float32 on the CPU; `shifted` applies the family's inference shift."""
    nodes = timesteps.uniform_nodes(steps)
    return geometry.shifted_nodes(nodes, latent_shape) if schedule == "shifted" else nodes


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise: Tensor,
    text: Text,
    source: Tensor | None,
    nodes: Tensor,
    on_step: Callable[[], object] | None = None,
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


@torch.no_grad()
def sample_as_configured(
    config: Config,
    family: Family,
    velocity: Velocity,
    noise: Tensor,
    text: Text,
    source: Tensor | None,
    *,
    steps: int,
    schedule: str,
    negative: Text | None = None,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """An edit by the sampler of `[sample]`: the family's own solver unless it says Euler.

    Args:
        config: of `[sample]`: solver and guidance.
        family: whose solver, schedule and boundary.
        velocity: the field without guidance.
        noise: (B, C, F, H, W), the starting point.
        text: encoded instructions of B.
        source: source latents like noise, or None for the base model.
        steps: of the sampler.
        schedule: `uniform` or `shifted`.
        negative: the encoded negative text (one or B); None: no guidance.
        on_step: called after every step.
    """
    if negative is not None:
        boundary = family.boundary
        velocity = guided(velocity, negative, lambda t: config.cfg_at(boundary is None or bool(timesteps.is_high(t, boundary))), family)
    solver = None if config.sample.solver == "euler" else family.solver(steps, schedule, config.sample.solver)
    if solver is None:
        return sample(velocity, noise, text, source, sampling_nodes(family, steps, schedule, tuple(noise.shape)), on_step)
    x = noise
    for index, time in enumerate(solver.times.tolist()):
        t = torch.full((len(x),), time, device=x.device)
        x = solver.step(index, velocity(x, t, text, source), x)
        if on_step is not None:
            on_step()
    return x


def guided(velocity: Velocity, negative: Text, scale_at: Callable[[Tensor], float], geometry: Geometry) -> Velocity:
    """Classifier-free guidance in the family's formula; the source tokens are in both branches.

    Args:
        velocity: the field without guidance.
        negative: the encoded negative text (one or B).
        scale_at: t (1,) -> the scale there; `unguided` of the family: no second branch.
        geometry: whose formula.
    """

    def field(noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        assert bool((t == t[0]).all()), "a sampler gives all samples one t"
        scale = scale_at(t[:1])
        v = velocity(noisy, t, text, source)
        if scale == geometry.spec.unguided:
            return v
        expanded = {name: value.expand(len(noisy), *value.shape[1:]) for name, value in negative.items()}
        v_negative = velocity(noisy, t, expanded, source)
        return geometry.guide(v, v_negative, scale)

    return field


def at_guidance(
    velocity: Velocity, text: Text, scale: float, geometry: Geometry, negative: Text | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """(noisy, t) -> the velocity without source tokens under B texts at a guidance scale, of whichever kind the family's is.

    Args:
        velocity: the field without guidance.
        text: encoded texts of B.
        scale: in the family's own formula; of an embedding its value.
        geometry: whose kind and formula.
        negative: the encoded negative text; None where no scale asks for it.
    """
    if geometry.spec.guidance == "embedding":
        text = {**text, GUIDANCE: torch.full((len(next(iter(text.values()))),), scale)}
        return lambda noisy, t: velocity(noisy, t, text, None)
    field = velocity if negative is None else guided(velocity, negative, lambda t: scale, geometry)
    return lambda noisy, t: field(noisy, t, text, None)


def seeded_noise(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Standard normal noise that depends on the seed alone, not on the device (drawn on the CPU)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def finite(dtype: str, result: Tensor, what: str) -> Tensor:
    """The result of sampling or decoding, as it is.

    Raises:
        FloatingPointError: it holds NaN or infinite values; says what usually makes them.
    """
    if is_finite(result):
        return result
    half = 'model.dtype = "float16" overflows beyond 65504: use bfloat16; ' if dtype == "float16" else ""
    raise FloatingPointError(
        f"{what} are not finite (NaN or infinite), so there is no picture: {half}the LoRA's strength or a guidance scale is far beyond "
        "what the model was trained with, or the LoRA has diverged (try strength 0, then the published guidance)"
    )
