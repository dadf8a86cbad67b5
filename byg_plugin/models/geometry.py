"""A family's sizes and times, from its `FamilySpec` alone: no weights, so that a host with networks of its own uses it too."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from byg_plugin import timesteps
from byg_plugin.families import FamilySpec
from byg_plugin.families.spec import ShiftByTokens, ShiftByTokensAndSteps
from byg_plugin.models.tokens import pack, unpack


class SpecGeometry:
    """Implements `families.geometry.Geometry`.

    Args:
        spec: of the family.
        boundary: t in (0, 1) from which the high-noise expert serves; None: the published one.
    """

    def __init__(self, spec: FamilySpec, boundary: float | None = None):
        assert boundary is None or spec.has_experts, "a boundary is between two experts"
        assert boundary is None or 0 < boundary < 1, "a boundary of 0 or 1 leaves an expert nothing to do"
        self.spec = spec
        self._boundary = spec.boundary if boundary is None else boundary

    @property
    def name(self) -> str:
        """Value of `model.family`."""
        return self.spec.name

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the networks: one, or the high-noise and the low-noise expert."""
        return self.spec.experts

    @property
    def boundary(self) -> float | None:
        """t from which the first expert serves, below it the second; None for a family of one network."""
        return self._boundary

    def expert_of(self, t: Tensor) -> str:
        """The one expert that serves these t."""
        if self.boundary is None:
            return self.experts[0]
        high = timesteps.is_high(t, self.boundary)
        assert bool(high.all()) or not bool(high.any()), "t on both sides of the boundary: split the batch first"
        return self.experts[not bool(high[0])]

    def clip_frames(self, frames: int) -> int:
        """The largest number of frames not above `frames` that the family takes: n times its multiple and one, or one alone."""
        multiple = self.spec.frame_multiple
        return 1 if multiple is None else (frames - 1) // multiple * multiple + 1

    def shifted_nodes(self, nodes: Tensor, latent_shape: Sequence[int]) -> Tensor:
        """The published inference shift applied to nodes in [0, 1] (1 = noise); end points stay. `latent_shape` ends with height, width."""
        shifted = timesteps.shift(nodes, _factor(self.spec.shift, latent_shape, len(nodes) - 1))
        terminal = self.spec.shift.terminal if isinstance(self.spec.shift, ShiftByTokens) else None
        return shifted if terminal is None else timesteps.stretch(shifted, terminal)

    def guide(self, v: Tensor, v_negative: Tensor, scale: float) -> Tensor:
        """See `families.geometry.Geometry`."""
        guided = v_negative + ((1.0 - self.spec.unguided) + scale) * (v - v_negative)
        if not self.spec.guidance_keeps_length:
            return guided
        combined, plain = pack(guided), pack(v)
        lengths = [tokens.norm(dim=-1, keepdim=True) for tokens in (plain, combined)]
        return unpack(combined * (lengths[0] / lengths[1].clamp_min(torch.finfo(v.dtype).tiny)), *v.shape[-2:])


def _factor(shift: float | ShiftByTokens | ShiftByTokensAndSteps, latent_shape: Sequence[int], steps: int) -> float:
    height, width = latent_shape[-2:]
    if isinstance(shift, ShiftByTokensAndSteps):
        return math.exp(_mu_of_steps(shift, height * width, steps))
    if not isinstance(shift, ShiftByTokens):
        return shift
    tokens = (height // shift.patch) * (width // shift.patch)
    (first, last), (low, high) = shift.tokens, shift.mu
    return math.exp(low + (high - low) * (tokens - first) / (last - first))


def _mu_of_steps(shift: ShiftByTokensAndSteps, tokens: int, steps: int) -> float:
    (few, low), (many, high) = ((number, slope * tokens + offset) for number, (slope, offset) in shift.lines.items())
    return high if tokens > shift.most_tokens else low + (high - low) * (steps - few) / (many - few)
