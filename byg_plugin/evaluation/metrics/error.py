"""Mean absolute error of colours in 0..1, to the source, outside the mask and to the ground truth. No model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.metrics.base import Options, Scores, compared, unit


def mean_error(one: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float:
    """Mean of |a - b| over the pixels (H, W) of `where`, three colours, in 0..1."""
    difference = np.abs(unit(one) - unit(other))
    return float(difference.mean() if where is None else difference[where].mean())


class Error:
    """See the module."""

    columns: ClassVar[Mapping[str, bool]] = {"error_source": False, "error_outside": False, "error_truth": False}
    texts: ClassVar[tuple[str, ...]] = ()
    settings: Mapping[str, object] = {}

    def __init__(self, options: Options):
        pass

    def __call__(self, seen: Seen) -> Scores:
        """Three columns."""
        return compared("error", seen, mean_error)
