"""VBench's aesthetic quality (Huang et al. 2024), written anew: LAION's linear head on CLIP ViT-L/14, a tenth of it, mean over frames.

The model is `--clip` (its default is the one that the head was trained on; weights of OpenAI: MIT), the head `--aesthetic`
(LAION-AI/aesthetic-predictor, MIT). Frames are scaled to CLIP's side by their shorter one, without antialiasing, and cropped, as VBench
does it. About 0.4 to 0.7; the source's own value stands beside the edit's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.metrics.base import Options, Scores
from byg_plugin.evaluation.metrics.clip import MEAN, STD, image_features
from byg_plugin.evaluation.metrics.weights import batches, digest_of, load, tensors_of
from byg_plugin.user_files import file_digest

_SOURCE = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth"
_CONVERT = (
    "import torch; from safetensors.torch import save_file; "
    'save_file(torch.load("sa_0_4_vit_l_14_linear.pth", weights_only=True), "aesthetic.safetensors")'
)


class Aesthetic:
    """See the module.

    Raises:
        ValueError: the model or the head is not on this machine, or they do not fit.
    """

    columns: ClassVar[Mapping[str, bool]] = {"aesthetic": True, "aesthetic_of_source": True}
    texts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Options):
        head = tensors_of(options.aesthetic, "--aesthetic", _SOURCE, _CONVERT)
        assert options.aesthetic is not None, "read"
        self._model = load("CLIPModel", options.clip, "--clip", options.device)
        self._size = self._model.config.vision_config.image_size
        width = self._model.config.projection_dim
        shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
        if shapes != {"weight": (1, width), "bias": (1,)}:
            raise ValueError(
                f"--aesthetic {options.aesthetic}: holds {shapes}, and a head for --clip {options.clip} is weight (1, {width}), bias (1,)"
            )
        self._head = {name: tensor.float().to(options.device) for name, tensor in head.items()}
        self._device = options.device
        self.settings = {"model": digest_of(options.clip), "head": file_digest(options.aesthetic)}

    @torch.no_grad()
    def quality(self, frames: np.ndarray) -> Tensor:
        """(F, H, W, 3) uint8 -> (F,)."""
        features = image_features(self._model, batches(frames, self._size, MEAN, STD, self._device, crop=True))
        return torch.nn.functional.linear(features, self._head["weight"], self._head["bias"])[:, 0] / 10

    def __call__(self, seen: Seen) -> Scores:
        """Two columns."""
        return {"aesthetic": float(self.quality(seen.edit).mean()), "aesthetic_of_source": float(self.quality(seen.source).mean())}
