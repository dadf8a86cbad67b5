"""CLIP's directional similarity (Gal et al. 2022, Brooks et al. 2023) and CLIP-T, by a CLIP of transformers (weights of OpenAI: MIT).

- clip_directional: cosine of (edit - source) in image features and (target - source caption) in text features, all features of
  length 1. Captions, not instructions. 0 where a difference is zero: nothing was changed. Good edits have about 0.1.
- clip_text: cosine of the edit and the target caption.

Of clips the mean over frames. Preprocessing: see `weights.batches`. Captions beyond the model's 77 tokens are cut;
`clip_captions_cut` says how many of the two were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.metrics.base import Options, Scores
from byg_plugin.evaluation.metrics.weights import batches, digest_of, load

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's training


def image_features(model: Any, parts: Iterable[Tensor]) -> Tensor:
    """Features (F, D) of length 1 of normalised pixels, by a `CLIPModel`."""
    features = [model.visual_projection(model.vision_model(part).pooler_output) for part in parts]
    return torch.nn.functional.normalize(torch.cat(features), dim=-1)


def directional(source: Tensor, edit: Tensor, src_caption: Tensor, tgt_caption: Tensor) -> Tensor:
    """Cosine (F,) of the change of images (F, D) and of captions (D,); all of length 1."""
    return torch.nn.functional.cosine_similarity(edit - source, (tgt_caption - src_caption)[None], dim=-1)


class Clip:
    """See the module.

    Raises:
        ValueError: the model is not on this machine.
    """

    columns: ClassVar[Mapping[str, bool]] = {"clip_directional": True, "clip_text": True, "clip_captions_cut": False}
    texts: ClassVar[tuple[str, ...]] = ("src_caption", "tgt_caption")

    def __init__(self, options: Options):
        self._device = options.device
        self._model = load("CLIPModel", options.clip, "--clip", options.device)
        self._tokenizer = load("CLIPTokenizer", options.clip, "--clip", options.device)
        self.settings = {"model": digest_of(options.clip)}
        self._size = self._model.config.vision_config.image_size
        self._tokens = self._model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def images(self, frames: np.ndarray) -> Tensor:
        """(F, H, W, 3) uint8 -> (F, D) of length 1."""
        return image_features(self._model, batches(frames, self._size, MEAN, STD, self._device))

    @torch.no_grad()
    def captions(self, texts: Sequence[str]) -> tuple[Tensor, int]:
        """(texts, D) of length 1, and how many of them were cut."""
        cut = sum(len(self._tokenizer(text).input_ids) > self._tokens for text in texts)
        encoded = self._tokenizer(list(texts), padding=True, truncation=True, max_length=self._tokens, return_tensors="pt")
        encoded = {name: encoded[name].to(self._device) for name in ("input_ids", "attention_mask")}
        features = self._model.text_projection(self._model.text_model(**encoded).pooler_output)
        return torch.nn.functional.normalize(features, dim=-1), cut

    def __call__(self, seen: Seen) -> Scores:
        """Three columns."""
        assert seen.item.src_caption is not None and seen.item.tgt_caption is not None, "checked before the first item"
        (before, after), cut = self.captions([seen.item.src_caption, seen.item.tgt_caption])
        source, edit = self.images(seen.source), self.images(seen.edit)
        return {
            "clip_directional": float(directional(source, edit, before, after).mean()),
            "clip_text": float((edit @ after).mean()),
            "clip_captions_cut": float(cut),
        }
