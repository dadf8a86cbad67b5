"""FLUX.1 on diffusers' `FluxTransformer2DModel`: packing, position ids, guidance, text encoders and VAE.

Legend: B batch, C latent channels (16), F = 1, H W latent height and width, L tokens = (H/2)(W/2), D = 4C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from byg_plugin.models import flux_files
from byg_plugin.models.flux_vae import FluxVaeFamily
from byg_plugin.models.image_family import compute_dtype
from byg_plugin.models.one_call import first_arguments
from byg_plugin.models.tokens import pack_length, sequence, unpack
from byg_plugin.objectives.base import Text
from byg_plugin.texts import GUIDANCE

# Attention and MLP linears of all double and single blocks: 19 x 12 + 38 x 5 = 418 modules in FLUX.1-dev. Modulation,
# norms, embedders and the head stay frozen: no tool loads a LoRA of all of them.
DEFAULT_TARGETS = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)"
    r"|single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out)"
)


@dataclass(frozen=True)
class TextEncoders:
    """CLIP-L (pooled) and T5 (sequence) with their tokenizers."""

    clip: nn.Module
    clip_tokenizer: Any
    t5: nn.Module
    t5_tokenizer: Any


class FluxFamily(FluxVaeFamily):
    """FLUX.1-dev as configured; see `models.base.Family`."""

    default_lora_targets = DEFAULT_TARGETS
    network = flux_files.TRANSFORMER
    text_parts = {"clip": "clip", "t5": "t5"}

    def load_text_encoders(self, device: torch.device) -> TextEncoders:
        """CLIP-L and T5 in the model's dtype."""
        dtype = getattr(torch, self._config.model.dtype)
        clip, clip_tokenizer = flux_files.load_clip_l(self._config.model.part("clip"), dtype=dtype)
        t5, t5_tokenizer = flux_files.load_t5(self._config.model.part("t5"), dtype=dtype)
        return TextEncoders(
            clip.to(device).eval().requires_grad_(False),
            clip_tokenizer,
            t5.to(device).eval().requires_grad_(False),
            t5_tokenizer,
        )

    # --- texts ---

    @torch.no_grad()
    def encode_texts(self, encoders: TextEncoders, texts: Sequence[str]) -> dict[str, Tensor]:
        """`t5` (B, max_text_tokens, 4096) with padding unmasked as FLUX was trained, and `pooled` (B, 768); on the CPU."""
        device = next(encoders.t5.parameters()).device
        length = self._config.conditioning.max_text_tokens
        t5_ids = encoders.t5_tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        clip_ids = encoders.clip_tokenizer(
            list(texts), padding="max_length", max_length=encoders.clip.config.max_position_embeddings, truncation=True, return_tensors="pt"
        )
        sequence = encoders.t5(t5_ids.input_ids.to(device)).last_hidden_state
        pooled = encoders.clip(clip_ids.input_ids.to(device)).pooler_output
        return {"t5": sequence.cpu(), "pooled": pooled.cpu()}

    def longer_than_limit(self, encoders: TextEncoders, texts: Sequence[str]) -> list[bool]:
        """See `models.base.Family`. Of T5; CLIP's own 77 tokens are no setting, and FLUX takes only a pooled vector from it."""
        # verbose=False: the tokenizer would warn of its own model_max_length.
        ids = encoders.t5_tokenizer(list(texts), truncation=False, verbose=False).input_ids
        return [len(tokens) > self._config.conditioning.max_text_tokens for tokens in ids]

    # --- the network ---

    def velocity(self, network: nn.Module, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        """One network call: noisy (B, C, 1, H, W), t (B,) in [0, 1], source of the same shape or None -> velocity, float32.

        Source tokens follow the noisy tokens; all tokens share t (FLUX.1 has one time embedding a sample). The network
        multiplies t and guidance by 1000 itself.
        """
        self._check_source(noisy, source)
        h, w = noisy.shape[-2:]
        dtype = compute_dtype(noisy, network.x_embedder.bias)
        tokens, ids = sequence(noisy, source, self.source_id)
        guidance = None
        if network.config.guidance_embeds:
            configured = torch.full_like(t, self._config.conditioning.guidance, dtype=torch.float32)
            guidance = text.get(GUIDANCE, configured).to(configured)
        # In the embedding's own unit, thousandths.
        exact = [value.float() * 1000 for value in (t, guidance) if value is not None]
        with first_arguments(network.time_text_embed, *exact):
            prediction = network(
                hidden_states=tokens.to(dtype),
                timestep=t,
                guidance=guidance,
                encoder_hidden_states=text["t5"].to(noisy.device, dtype),
                pooled_projections=text["pooled"].to(noisy.device, dtype),
                txt_ids=torch.zeros(text["t5"].shape[1], 3, device=noisy.device),
                img_ids=ids,
                return_dict=False,
            )[0]
        return unpack(prediction[:, : pack_length(h, w)].float(), h, w)
