"""DINO similarity: cosine of the class tokens of edit and source, frame by frame, mean over frames.

A ViT of transformers by folder or hub id: v1 (Caron et al. 2021, as the paper cites; default ViT-S/16, Apache-2.0), v2 (Apache-2.0)
or v3 (its own licence). The paper names neither variant nor crop. Pictures are squashed (`weights.batches`) to the
model's size, v2 and v3 to 224.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.metrics.base import Options, Scores
from byg_plugin.evaluation.metrics.weights import batches, digest_of, load

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_KINDS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
_SIZE = 224  # pixels; v2's own 518 is for dense features


class Dino:
    """See the module.

    Raises:
        ValueError: the model is not on this machine, or is none of DINO's.
    """

    columns: ClassVar[Mapping[str, bool]] = {"dino": True}
    texts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Options):
        self._device = options.device
        self._model = load("AutoModel", options.dino, "--dino", options.device)
        kind = self._model.config.model_type
        if kind not in _KINDS:
            raise ValueError(f"--dino {options.dino}: is a {kind}; give one of {', '.join(_KINDS)}, e.g. facebook/dino-vits16")
        self.settings = {"model": digest_of(options.dino)}
        size, patch = self._model.config.image_size, self._model.config.patch_size
        self._size = size if kind == "vit" else _SIZE // patch * patch

    @torch.no_grad()
    def images(self, frames: np.ndarray) -> Tensor:
        """(F, H, W, 3) uint8 -> (F, D) of length 1."""
        parts = batches(frames, self._size, _MEAN, _STD, self._device)
        return torch.nn.functional.normalize(torch.cat([self._model(part).last_hidden_state[:, 0] for part in parts]), dim=-1)

    def __call__(self, seen: Seen) -> Scores:
        """One column."""
        return {"dino": float((self.images(seen.source) * self.images(seen.edit)).sum(-1).mean())}
