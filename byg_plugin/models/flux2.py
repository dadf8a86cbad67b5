"""FLUX.2 klein on diffusers' `Flux2Transformer2DModel`: positions, text encoder and VAE.

Legend: B batch, C latent channels (128: those of 2 x 2 squares of the VAE's 32), F = 1, H W latent height and width (1/16 of the
picture's), L = HW tokens of one latent each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from byg_plugin.models import flux2_files, qwen_texts
from byg_plugin.models.image_family import compute_dtype
from byg_plugin.models.one_call import first_arguments
from byg_plugin.models.qwen3_texts import Qwen3TextFamily
from byg_plugin.models.qwen_texts import TextEncoder
from byg_plugin.models.tokens import join_squares, latent_sequence, split_squares, text_ids, tokens_to_latents
from byg_plugin.objectives.base import Text

# Attention and MLP linears of all blocks: 5 x 12 + 20 x 2 = 100 modules in the 4B, 8 x 12 + 24 x 2 = 144 in the 9B. Attention and MLP of
# a single block are fused. Modulation, embedders and the head stay frozen.
DEFAULT_TARGETS = (
    r"transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|transformer_blocks\.\d+\.(ff|ff_context)\.linear_(in|out)"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
LAYERS = (9, 18, 27)
"""Hidden states of the text encoder that the network sees, side by side; 0 would be the embedding."""


class Flux2Family(Qwen3TextFamily):
    """FLUX.2 klein base as configured; see `models.base.Family`."""

    default_lora_targets = DEFAULT_TARGETS
    network = flux2_files.TRANSFORMER
    vae = flux2_files.VAE
    thinking = False
    last_layer = max(LAYERS)

    # --- pixels and texts ---

    @torch.no_grad()
    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """(B, 3, 1, H, W) in [-1, 1] -> (B, 128, 1, H/16, W/16), the posterior's mode in squares, then to the statistics of its norm."""
        mode = vae.encode(pixels[:, :, 0].to(next(vae.parameters()))).latent_dist.mode().float()
        return normalise(vae, mode).unsqueeze(2)

    @torch.no_grad()
    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """The inverse of `encode_pixels`, clamped to [-1, 1]."""
        mean, std = _statistics(vae)
        raw = join_squares(latents[:, :, 0].float() * std + mean)
        return vae.decode(raw.to(next(vae.parameters()))).sample.float().clamp(-1, 1).unsqueeze(2)

    def encode_texts(self, encoders: TextEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
        """`qwen` (B, max_text_tokens, 7680; 12288 of the 9B): three layers side by side, of padding too; on the CPU.

        The network has no mask: it was trained with what Qwen3 makes of padding, row by row another.
        """
        length = self._config.conditioning.max_text_tokens
        rows, _ = qwen_texts.hidden_states(encoders, self.chat_ids(encoders, texts, length), LAYERS, length)
        return {"qwen": rows.flatten(2)}

    # --- the network ---

    def velocity(self, network: nn.Module, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        """One network call: noisy (B, C, 1, H, W), t (B,) in [0, 1], source of the same shape or None -> velocity, float32.

        Source tokens follow the noisy tokens, all share t. The network multiplies t by 1000 itself.
        """
        self._check_source(noisy, source)
        h, w = noisy.shape[-2:]
        dtype = compute_dtype(noisy, network.x_embedder.weight)
        rows = self._text_rows(network, text["qwen"]).to(noisy.device, dtype)
        tokens, ids = latent_sequence(noisy, source, self.source_id)
        # In the embedding's own unit, thousandths.
        with first_arguments(network.time_guidance_embed.time_proj, t.float() * 1000):
            prediction = network(
                hidden_states=tokens.to(dtype),
                timestep=t,
                encoder_hidden_states=rows,
                txt_ids=text_ids(rows.shape[1], noisy.device),
                img_ids=ids,
                return_dict=False,
            )[0]
        return tokens_to_latents(prediction[:, : h * w].float(), h, w)


def normalise(vae: nn.Module, mode: Tensor) -> Tensor:
    """The posterior's mode (B, 32, 2H, 2W) -> latents (B, 128, H, W): in squares, then to the statistics of the VAE's norm."""
    mean, std = _statistics(vae)
    return (split_squares(mode) - mean) / std


def _statistics(vae: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, 128, 1, 1) of the latents in squares, in float32."""
    mean, variance = (value.float().view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()
