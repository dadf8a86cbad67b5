"""Motion fidelity (Yatim et al. 2024), written anew from the paper: do points of the edit move as points of the source do.

The likeness of two tracks is the mean over frames of the cosine of their steps. Each track counts with its likeness to the one of the
other clip that is most like it, so places need not agree; the score is the mean of both directions, in [-1, 1]. A step shorter than 0.1
pixels is no motion: with another such step its cosine is 1, with a motion 0. The published code differs: it divides by zero there,
leaves tracks of one index out and has one direction alone; the paper's formula is the sum of the two.

Any tracker can be given from Python: `Motion(options, tracker)`. `--cotracker` names weights of CoTracker3 (offline), a grid of 55 x 55
points of the first frame. **CoTracker, code and weights, is CC-BY-NC 4.0: not for commercial use.** It is no part of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch

from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.metrics.base import Options, Scores
from byg_plugin.evaluation.metrics.weights import tensors_of
from byg_plugin.user_files import file_digest

Tracker = Callable[[np.ndarray], np.ndarray]
"""Of a clip (F, H, W, 3) uint8 the places (F, N, 2) of some points, in pixels."""
_STILL = 0.1  # pixels of a step
_GRID = 55
_WINDOW = 60  # frames, of the published offline model
_SOURCE = "https://huggingface.co/facebook/cotracker3/resolve/main/scaled_offline.pth"
_CONVERT = (
    "import torch; from safetensors.torch import save_file; "
    'save_file(torch.load("scaled_offline.pth", weights_only=True), "cotracker.safetensors")'
)


def likeness(source: np.ndarray, edit: np.ndarray) -> np.ndarray:
    """Mean cosine of steps (n, m) of each two tracks of (F, n, 2) and (F, m, 2)."""
    total = np.zeros((source.shape[1], edit.shape[1]))
    for one, other in zip(np.diff(source, axis=0), np.diff(edit, axis=0), strict=True):
        (towards, still), (other_towards, other_still) = _direction(one), _direction(other)
        total += towards @ other_towards.T + np.outer(still, other_still)
    return total / (len(source) - 1)


def fidelity(source: np.ndarray, edit: np.ndarray) -> float:
    """The score of tracks (F, n, 2) and (F, m, 2) of two clips; F > 1."""
    found = likeness(source, edit)
    return float(found.max(axis=1).mean() + found.max(axis=0).mean()) / 2


def _direction(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps (n, 2) of length 1, or 0 where there is no motion, and (n,) whether there is none."""
    lengths = np.linalg.norm(steps, axis=-1)
    still = lengths < _STILL
    return np.where(still[:, None], 0.0, steps / np.maximum(lengths, _STILL)[:, None]), still


class Motion:
    """See the module.

    Raises:
        ValueError: CoTracker is not installed, or its weights are not on this machine.
    """

    columns: ClassVar[Mapping[str, bool]] = {"motion_fidelity": True}
    texts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Options, tracker: Tracker | None = None):
        self._tracker = tracker or _cotracker(options)
        named = getattr(tracker, "__qualname__", "another") if tracker else options.cotracker and file_digest(options.cotracker)
        self.settings: Mapping[str, Any] = {"tracker": named}

    def __call__(self, seen: Seen) -> Scores:
        """One column, of clips."""
        if len(seen.edit) < 2:
            return {"motion_fidelity": None}
        return {"motion_fidelity": fidelity(self._tracker(seen.source), self._tracker(seen.edit))}


def _cotracker(options: Options) -> Tracker:
    tensors = tensors_of(options.cotracker, "--cotracker", f"{_SOURCE} (CC-BY-NC 4.0)", _CONVERT)
    if find_spec("cotracker") is None:
        line = "pip install git+https://github.com/facebookresearch/co-tracker"
        raise ValueError(f"--metrics motion needs CoTracker (CC-BY-NC 4.0), which is not installed: {line}")
    from cotracker.predictor import CoTrackerPredictor

    predictor = CoTrackerPredictor(checkpoint=None, offline=True, window_len=_WINDOW)
    try:
        predictor.model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"--cotracker {options.cotracker}: is not CoTracker3's offline model ({str(error).splitlines()[0]})") from error
    predictor = predictor.to(options.device).eval()

    @torch.no_grad()
    def track(frames: np.ndarray) -> np.ndarray:
        video = torch.from_numpy(frames.copy()).permute(0, 3, 1, 2)[None].float().to(options.device)
        return predictor(video, grid_size=_GRID)[0][0].cpu().numpy()

    return track
