"""Qwen-Image on diffusers' `QwenImageTransformer2DModel`: packing, positions, text encoder and VAE.

Legend: B batch, C latent channels (16), F = 1, H W latent height and width, L tokens = (H/2)(W/2), D = 4C.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from byg_plugin.models import normalised_vae, qwen_files, qwen_texts
from byg_plugin.models.image_family import ImageFamily, compute_dtype
from byg_plugin.models.one_call import first_arguments, image_positions
from byg_plugin.models.qwen_texts import TextEncoder
from byg_plugin.models.tokens import image_grids, pack, pack_length, unpack
from byg_plugin.objectives.base import Text
from byg_plugin.texts import padding_mask


class QwenVaeFamily(ImageFamily):
    """A family with Qwen-Image's autoencoder, whose images are clips of one frame."""

    vae = qwen_files.VAE

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """(B, 3, 1, H, W) in [-1, 1] -> (B, 16, 1, H/8, W/8), the posterior's mode to zero mean and unit variance."""
        return normalised_vae.encode(vae, pixels)

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """The inverse of `encode_pixels`, clamped to [-1, 1]."""
        return normalised_vae.decode(vae, latents)

    # --- texts ---

    keeps_suffix: bool
    """Whether a long text is cut before the template's end."""

    def longer_than_limit(self, encoders: TextEncoder, texts: Sequence[str]) -> list[bool]:
        """See `models.base.Family`."""
        ids = qwen_texts.token_ids(encoders.tokenizer, texts, None, keeps_suffix=self.keeps_suffix)
        return [len(one) > qwen_texts.DROPPED + self._config.conditioning.max_text_tokens for one in ids]

    def _rows(self, encoders: TextEncoder, texts: Sequence[str], layers: Sequence[int]) -> dict[str, Tensor]:
        limit = self._config.conditioning.max_text_tokens
        ids = qwen_texts.token_ids(encoders.tokenizer, texts, limit, keeps_suffix=self.keeps_suffix)
        return qwen_texts.hidden_rows(encoders, ids, layers)

    def _encoder(self, kind: Any, device: torch.device) -> TextEncoder:
        path, dtype = self._config.model.part("qwen"), getattr(torch, self._config.model.dtype)
        model, tokenizer = qwen_files.load_text_encoder(kind, path, self.text_parts["qwen"], dtype=dtype)
        return TextEncoder(model.to(device).eval().requires_grad_(False), tokenizer)


class QwenImageFamily(QwenVaeFamily):
    """Qwen-Image as configured; see `models.base.Family`."""

    network = qwen_files.QWEN_IMAGE
    text_parts = {"qwen": "qwen25_vl"}
    keeps_suffix = False

    @cached_property
    def default_lora_targets(self) -> str:  # type: ignore[override]
        """Attention and MLP linears of both streams: 60 x 12 - 4 = 716 modules.

        Of the last block, nothing that only the text's own output depends on: it has no gradient. Modulation, embedders and the head
        stay frozen.
        """
        blocks = self.network.config_of(self._config.model.part("transformer"))["num_layers"]
        return (
            r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0|add_k_proj|add_v_proj)|img_mlp\.net\.(0\.proj|2))"
            rf"|transformer_blocks\.(?!{blocks - 1}\.)\d+\.(attn\.(add_q_proj|to_add_out)|txt_mlp\.net\.(0\.proj|2))"
        )

    def load_text_encoders(self, device: torch.device) -> TextEncoder:
        """The language model of Qwen2.5-VL in the model's dtype."""
        from transformers import Qwen2_5_VLForConditionalGeneration

        return self._encoder(Qwen2_5_VLForConditionalGeneration, device)

    def encode_texts(self, encoders: TextEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
        """`qwen` (B, L, 3584), the last hidden states, zeros after a text's end, and `mask` (B, L); on the CPU."""
        rows = self._rows(encoders, texts, (-1,))
        return {**rows, "qwen": rows["qwen"][:, :, 0]}

    def velocity(self, network: nn.Module, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        """One network call: noisy (B, C, 1, H, W), t (B,) in [0, 1], source of the same shape or None -> velocity, float32.

        Source tokens follow the noisy tokens, all share t. The network multiplies t by 1000 itself.
        """
        self._check_source(noisy, source)
        h, w = noisy.shape[-2:]
        dtype = compute_dtype(noisy, network.img_in.weight)
        tokens = pack(noisy) if source is None else torch.cat([pack(noisy), pack(source)], dim=1)
        images, doubled = image_grids(h, w, None if source is None else self.source_id)
        with first_arguments(network.time_text_embed, t.float()), image_positions(network, doubled=doubled):
            prediction = network(
                hidden_states=tokens.to(dtype),
                timestep=t,
                encoder_hidden_states=self._text_rows(network, text["qwen"]).to(noisy.device, dtype),
                encoder_hidden_states_mask=padding_mask(text, noisy.device),
                img_shapes=[images] * len(noisy),
                return_dict=False,
            )[0]
        return unpack(prediction[:, : pack_length(h, w)].float(), h, w)
