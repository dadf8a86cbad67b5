"""VBench's dynamic degree (Huang et al. 2024), written anew: 1 where a clip moves, 0 where it does not; the mean is the share that does.

Frames are taken at about 8 a second. A pair of them moves where the longest 5 % of its flow's vectors are on average longer than
6 min(H, W) / 256 pixels; a clip moves where a quarter of as many pairs as it has frames do. VBench calls a clip of two such frames
moving without looking at them; here the pair must move. The source's own value stands beside the edit's.

The flow is RAFT's (Teed and Deng 2020, BSD-3) from the installed torchvision (BSD-3), 20 updates, with the weights C_T_V1, which are
the original authors' for FlyingThings3D as VBench takes them. Another flow can be given from Python: `Dynamic(options, flow)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from byg_plugin.data.clips import clip_info
from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.metrics.base import Options, Scores

Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of two frames (H, W, 3) uint8 the flow (h, w, 2) in pixels; h and w may be padded."""
_RATE = 8.0  # frames a second
_LIMIT, _SIDE = 6.0, 256.0  # pixels of a vector, of a shorter side
_STRONGEST = 0.05
_UPDATES = 20
_LEAST = 128  # pixels of a side that RAFT takes
_WEIGHTS = "raft_large_C_T_V1-22a6c225.pth"


def strongest(flow: np.ndarray) -> float:
    """Mean length, in pixels, of the longest 5 % of a flow's vectors (h, w, 2)."""
    lengths = np.sort(np.linalg.norm(flow, axis=-1).ravel())
    return float(lengths[-max(1, int(len(lengths) * _STRONGEST)) :].mean())


def moves(frames: np.ndarray, fps: float, flow: Flow) -> float | None:
    """1 or 0 for a clip (F, H, W, 3) of `fps` frames a second; None for one that has no two frames at 8 a second."""
    taken = frames[:: max(1, round(fps / _RATE))]
    if len(taken) < 2:
        return None
    limit = _LIMIT * min(frames.shape[1:3]) / _SIDE
    needed = max(1, round(4 * len(taken) / 16))
    found = 0
    for one, following in zip(taken, taken[1:], strict=False):
        found += strongest(flow(one, following)) > limit
        if found >= needed:
            return 1.0
    return 0.0


class Dynamic:
    """See the module.

    Raises:
        ValueError: torchvision is not installed, or its weights are not on this machine.
    """

    columns: ClassVar[Mapping[str, bool]] = {"dynamic_degree": True, "dynamic_degree_of_source": True}
    texts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Options, flow: Flow | None = None):
        self._flow = flow or _raft(options.device)
        self.settings: Mapping[str, Any] = {"flow": getattr(flow, "__qualname__", "another") if flow else _WEIGHTS}

    def __call__(self, seen: Seen) -> Scores:
        """Two columns, of clips."""
        if not seen.is_clip:
            return dict.fromkeys(self.columns)
        fps = clip_info(seen.item.edit).fps
        return {"dynamic_degree": moves(seen.edit, fps, self._flow), "dynamic_degree_of_source": moves(seen.source, fps, self._flow)}


def _raft(device: str) -> Flow:
    if find_spec("torchvision") is None:
        raise ValueError("--metrics dynamic needs torchvision, which is not installed: pip install torchvision")
    weights = Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS
    if not weights.is_file():
        line = "python -c 'from torchvision.models.optical_flow import raft_large; raft_large(weights=\"C_T_V1\")'"
        raise ValueError(f"--metrics dynamic needs {weights}, which is not on this machine; fetch it with: {line}")
    from torchvision.models.optical_flow import raft_large

    model = raft_large(weights="C_T_V1", progress=False).to(device).eval()

    @torch.no_grad()
    def flow(one: np.ndarray, following: np.ndarray) -> np.ndarray:
        if min(one.shape[:2]) < _LEAST:
            raise ValueError(f"dynamic needs sides of {_LEAST} pixels, not {one.shape[1]} x {one.shape[0]}; leave it out of --metrics")
        found = model(_padded(one).to(device), _padded(following).to(device), num_flow_updates=_UPDATES)[-1]
        return found[0].permute(1, 2, 0).cpu().numpy()

    return flow


def _padded(frame: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 as (1, 3, h, w) in [-1, 1], of sides that 8 divides; edges are repeated on both sides."""
    pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    down, across = (-side % 8 for side in frame.shape[:2])
    margins = (across // 2, across - across // 2, down // 2, down - down // 2)
    return torch.nn.functional.pad(pixels, margins, mode="replicate")
