"""VBench's temporal flickering (Huang et al. 2024), written anew: 1 - mean |frame - next frame| / 255. No model.

It rewards stillness, and was meant for clips that stand still: the source's own value stands beside the edit's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.metrics.base import Options, Scores, unit


def steadiness(frames: np.ndarray) -> float | None:
    """1 for a still clip (F, H, W, 3), 0 for black and white by turns; None for a single frame."""
    if len(frames) < 2:
        return None
    # Frame by frame: a whole clip in floats is eight times its size.
    return 1 - float(np.mean([np.abs(unit(one) - unit(following)).mean() for one, following in zip(frames, frames[1:], strict=False)]))


class Flicker:
    """See the module."""

    columns: ClassVar[Mapping[str, bool]] = {"flicker": True, "flicker_of_source": True}
    texts: ClassVar[tuple[str, ...]] = ()
    settings: Mapping[str, object] = {}

    def __init__(self, options: Options):
        pass

    def __call__(self, seen: Seen) -> Scores:
        """Two columns, of clips."""
        return {"flicker": steadiness(seen.edit), "flicker_of_source": steadiness(seen.source)}
