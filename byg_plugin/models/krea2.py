"""Krea 2 on diffusers' `Krea2Transformer2DModel`: packing, positions and text encoder. Its VAE is Qwen-Image's.

Legend: B batch, C latent channels (16), F = 1, H W latent height and width, L tokens = (H/2)(W/2), D = 4C.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from byg_plugin.models import qwen_files
from byg_plugin.models.image_family import compute_dtype
from byg_plugin.models.qwen_image import QwenVaeFamily
from byg_plugin.models.qwen_texts import TextEncoder
from byg_plugin.models.tokens import pack_length, sequence, unpack
from byg_plugin.objectives.base import Text
from byg_plugin.texts import padding_mask

# Attention and feed-forward linears of all blocks: 28 x 8 = 224 modules. The fusion of the text's layers, embedders and the head stay
# frozen.
DEFAULT_TARGETS = r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_gate|to_out\.0)|ff\.(gate|up|down))"
LAYERS = (2, 5, 8, 11, 14, 17, 20, 23, 26, 29, 32, 35)
"""Hidden states of the text encoder that the network sees; 0 would be the embedding."""


class Krea2Family(QwenVaeFamily):
    """Krea 2 as configured; see `models.base.Family`."""

    default_lora_targets = DEFAULT_TARGETS
    network = qwen_files.KREA2
    text_parts = {"qwen": "qwen3_vl"}
    keeps_suffix = True

    def load_text_encoders(self, device: torch.device) -> TextEncoder:
        """The language model of Qwen3-VL in the model's dtype."""
        from transformers import Qwen3VLModel

        return self._encoder(Qwen3VLModel, device)

    def encode_texts(self, encoders: TextEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
        """`qwen` (B, L, 12, 2560), hidden states of 12 layers, zeros after a text's end, and `mask` (B, L); on the CPU."""
        return self._rows(encoders, texts, LAYERS)

    def velocity(self, network: nn.Module, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        """One network call: noisy (B, C, 1, H, W), t (B,) in [0, 1], source of the same shape or None -> velocity, float32.

        Source tokens follow the noisy tokens, all share t. The network multiplies t by 1000 itself, in float32. All text is at one
        position.
        """
        self._check_source(noisy, source)
        h, w = noisy.shape[-2:]
        dtype = compute_dtype(noisy, network.img_in.weight)
        tokens, ids = sequence(noisy, source, self.source_id)
        rows = self._text_rows(network, text["qwen"]).to(noisy.device, dtype)
        prediction = network(
            hidden_states=tokens.to(dtype),
            encoder_hidden_states=rows,
            timestep=t.float(),
            position_ids=torch.cat([ids.new_zeros(rows.shape[1], 3), ids]),
            encoder_attention_mask=padding_mask(text, noisy.device),
            return_dict=False,
        )[0]
        return unpack(prediction[:, : pack_length(h, w)].float(), h, w)
