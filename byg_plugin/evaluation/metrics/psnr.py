"""Peak signal-to-noise ratio, 10 log10(1 / mean squared error) dB over colours in 0..1; identical pixels count as 100 dB. No model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.metrics.base import Options, Scores, compared, unit

MOST = 100.0  # dB; the formula's value of identical images is infinite, which no mean survives


def psnr(one: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float:
    """dB over the pixels (H, W) of `where`, three colours."""
    squares = (unit(one) - unit(other)) ** 2
    error = float(squares.mean() if where is None else squares[where].mean())
    return min(MOST, -10 * np.log10(error)) if error else MOST


class Psnr:
    """See the module."""

    columns: ClassVar[Mapping[str, bool]] = {"psnr_source": True, "psnr_outside": True, "psnr_truth": True}
    texts: ClassVar[tuple[str, ...]] = ()
    settings: Mapping[str, object] = {}

    def __init__(self, options: Options):
        pass

    def __call__(self, seen: Seen) -> Scores:
        """Three columns."""
        return compared("psnr", seen, psnr)
