"""Structural similarity (Wang et al. 2004) by scikit-image (BSD-3): Gaussian window of sigma 1.5 (11 x 11), K 0.01 and 0.03.

Each colour by itself, then their mean; the paper has luminance alone. As there, windows that leave the picture do not count; outside a
mask those that touch what may change do not either. No model.
"""

from __future__ import annotations

import numpy as np

from byg_plugin.config.extras import require
from byg_plugin.evaluation.metrics.base import Compared, Options, unit

WINDOW = 11  # pixels; scikit-image's for sigma 1.5
_REACH = WINDOW // 2


def ssim(one: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float | None:
    """Mean over windows that lie in `where` (H, W); None where none does. -1 to 1, identical images 1.

    Raises:
        ValueError: a side is shorter than the window.
    """
    from skimage.metrics import structural_similarity

    if min(one.shape[:2]) < WINDOW:
        raise ValueError(f"ssim needs sides of {WINDOW} pixels or more, not {one.shape[1]} x {one.shape[0]}; leave it out of --metrics")
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0, "channel_axis": -1}
    _, values = structural_similarity(unit(one), unit(other), full=True, **settings)
    counted = np.ones(values.shape[:2], dtype=bool) if where is None else where
    windows = np.lib.stride_tricks.sliding_window_view(counted, (WINDOW, WINDOW)).all((-2, -1))
    inner = values[_REACH:-_REACH, _REACH:-_REACH]
    return float(inner[windows].mean()) if windows.any() else None


class Ssim(Compared, name="ssim", more_is_better=True):
    """See the module.

    Raises:
        ValueError: scikit-image is not installed.
    """

    def __init__(self, options: Options):
        require("skimage", "--metrics ssim", "eval")

    def distance(self, one: np.ndarray, other: np.ndarray, where: np.ndarray | None) -> float | None:
        """See `ssim`."""
        return ssim(one, other, where)
