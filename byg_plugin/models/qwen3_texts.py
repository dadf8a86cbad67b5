"""Texts by Qwen3 as a chat of one turn, as FLUX.2 klein and Z-Image have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import nn

from byg_plugin.models import qwen_files
from byg_plugin.models.image_family import ImageFamily
from byg_plugin.models.qwen_texts import TextEncoder

_USER, _ASSISTANT = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"
_NO_THOUGHTS = "<think>\n\n</think>\n\n"


class Qwen3TextFamily(ImageFamily):
    """The text side of a family with Qwen3. What becomes of the hidden states is the family's own."""

    text_parts = {"qwen": "qwen3"}
    thinking: ClassVar[bool]
    """Whether the model would think before it answers; where not, the template ends with empty thoughts."""
    last_layer: ClassVar[int | None]
    """The highest hidden state that is used, 0 being the embedding; None: one counted from the end, so that every layer is needed."""

    def load_text_encoders(self, device: torch.device) -> TextEncoder:
        """Qwen3 in the model's dtype, without the layers behind the last one that is used."""
        from transformers import Qwen3Model

        path, dtype = self._config.model.part("qwen"), getattr(torch, self._config.model.dtype)
        loaded, tokenizer = qwen_files.load_text_encoder(Qwen3Model, path, self.text_parts["qwen"], dtype=dtype)
        model = cast(Qwen3Model, loaded)
        if self.last_layer is not None:
            # One more than that: the last hidden state of all is after the final norm.
            model.layers = model.layers[: self.last_layer + 1]
            model.config.num_hidden_layers = len(model.layers)
        return TextEncoder(cast(nn.Module, model).to(device).eval().requires_grad_(False), tokenizer)

    def chat_ids(self, encoders: TextEncoder, texts: Sequence[str], limit: int | None) -> list[list[int]]:
        """Ids of the filled-in template, cut to `limit` tokens; None: uncut."""
        template = _USER + _ASSISTANT + ("" if self.thinking else _NO_THOUGHTS)
        # verbose=False: the tokenizer would warn of its own model_max_length.
        ids = encoders.tokenizer([template.format(text) for text in texts], truncation=False, verbose=False).input_ids
        return [one[:limit] for one in ids]

    def longer_than_limit(self, encoders: TextEncoder, texts: Sequence[str]) -> list[bool]:
        """See `models.base.Family`."""
        return [len(one) > self._config.conditioning.max_text_tokens for one in self.chat_ids(encoders, texts, None)]
