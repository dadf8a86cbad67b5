"""Mean absolute error of colours in 0..1, to the source, outside the mask and to the ground truth. No model."""

from __future__ import annotations

import numpy as np

from byg_plugin.evaluation.metrics.base import Compared, unit


def mean_error(one: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float:
    """Mean of |a - b| over the pixels (H, W) of `where`, three colours, in 0..1."""
    difference = np.abs(unit(one) - unit(other))
    return float(difference.mean() if where is None else difference[where].mean())


class Error(Compared, name="error", more_is_better=False):
    """See the module."""

    def distance(self, one: np.ndarray, other: np.ndarray, where: np.ndarray | None) -> float:
        """See `mean_error`."""
        return mean_error(one, other, where)
