"""A batch whose samples are served by two experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from byg_plugin.objectives.base import Text
from byg_plugin.timesteps import is_high

OneExpert = Callable[[bool, Tensor, Tensor, Text, Tensor | None], Tensor]
"""(high noise, noisy, t, text, source) -> the velocity of the expert of that side."""


def by_expert(
    call: OneExpert, boundary: float, high_first: Callable[[], bool], noisy: Tensor, t: Tensor, text: Text, source: Tensor | None
) -> Tensor:
    """The velocity of each sample by the expert that serves its t; a batch on both sides of the boundary is split.

    Args:
        call: one expert's velocity.
        boundary: t from which the high-noise expert serves.
        high_first: whether the high-noise expert's part of a split batch comes first; asked only where there is one.
        noisy: (B, C, F, H, W).
        t: (B,) in [0, 1].
        text: of B.
        source: like noisy, or None.
    """
    high = is_high(t, boundary)
    if bool(high.all()) or not bool(high.any()):
        return call(bool(high[0]), noisy, t, text, source)
    first = high_first()
    out: Tensor | None = None
    for side in (first, not first):
        rows = high if side else ~high
        some = {name: value[rows.to(value.device)] for name, value in text.items()}
        velocity = call(side, noisy[rows], t[rows], some, None if source is None else source[rows])
        out = torch.zeros_like(noisy, dtype=velocity.dtype) if out is None else out
        out[rows] = velocity
    assert out is not None
    return out
