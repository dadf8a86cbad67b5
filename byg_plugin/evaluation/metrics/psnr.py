"""Peak signal-to-noise ratio, 10 log10(1 / mean squared error) dB over colours in 0..1; identical pixels count as 100 dB. No model."""

from __future__ import annotations

import numpy as np

from byg_plugin.evaluation.metrics.base import Compared, unit

MOST = 100.0  # dB; the formula's value of identical images is infinite, which no mean survives


def psnr(one: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float:
    """dB over the pixels (H, W) of `where`, three colours."""
    squares = (unit(one) - unit(other)) ** 2
    error = float(squares.mean() if where is None else squares[where].mean())
    return min(MOST, -10 * np.log10(error)) if error else MOST


class Psnr(Compared, name="psnr", more_is_better=True):
    """See the module."""

    def distance(self, one: np.ndarray, other: np.ndarray, where: np.ndarray | None) -> float:
        """See `psnr`."""
        return psnr(one, other, where)
