"""FLUX.1 on diffusers' `FluxTransformer2DModel`: packing, position ids, guidance, text encoders and VAE.

Legend: B batch, C latent channels (16), F = 1, H W latent height and width, L tokens = (H/2)(W/2), D = 4C.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from byg_plugin import families
from byg_plugin.models import files, flux_files
from byg_plugin.models.flux_tokens import PATCH, pack_length, sequence, unpack
from byg_plugin.models.geometry import SpecGeometry
from byg_plugin.objectives.base import Text

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config

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


class FluxFamily(SpecGeometry):
    """FLUX.1-dev as configured; see `models.base.Family`."""

    default_lora_targets = DEFAULT_TARGETS

    def __init__(self, config: Config):
        super().__init__(families.named(config.model.family))
        self._config = config
        self.position = config.conditioning.position
        self.guidance = config.conditioning.guidance

    # --- frozen parts ---

    def load_transformers(self, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
        """The one network, under the name `transformer`: frozen, on the CPU, in eval mode."""
        network = cast(nn.Module, flux_files.load_flux_transformer(self._config.model.part("transformer"), dtype=dtype))
        yield "transformer", network.eval().requires_grad_(False)

    def meta_transformers(self) -> dict[str, nn.Module]:
        """See `models.base.Family`."""
        return {"transformer": cast(nn.Module, flux_files.flux_transformer_on_meta(self._config.model.part("transformer")))}

    def sequence_tokens(self, height: int, width: int, frames: int = 1) -> int:
        """See `models.base.Family`."""
        return 2 * pack_length(height // self._vae_factor, width // self._vae_factor) + self._config.conditioning.max_text_tokens

    def load_vae(self, device: torch.device) -> nn.Module:
        """The autoencoder in float32: it is small beside the network, and its 16-bit decoder shows bands."""
        return flux_files.load_flux_vae(self._config.model.part("vae"), dtype=torch.float32).to(device).eval().requires_grad_(False)

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

    def fingerprint(self, part: str) -> str:
        """See `models.base.Family.fingerprint`; `part` is `vae` or `text`."""
        model = self._config.model
        if part == "vae":
            return f"flux-vae|mode|{files.weights_fingerprint(model.part('vae'), 'vae')}"
        assert part == "text", part
        return (
            f"flux-text|{self._config.conditioning.max_text_tokens}|{model.dtype}"
            f"|{files.weights_fingerprint(model.part('clip'), 'clip')}|{files.weights_fingerprint(model.part('t5'), 't5')}"
        )

    @cached_property
    def _vae_factor(self) -> int:
        return flux_files.vae_downsampling(self._config.model.part("vae"))

    def pixel_multiple(self) -> int:
        """VAE down-sampling x patch: 16 for FLUX.1."""
        return self._vae_factor * PATCH

    # --- pixels and texts ---

    @torch.no_grad()
    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """(B, 3, 1, H, W) in [-1, 1] -> (B, 16, 1, H/8, W/8), the posterior's mode, shifted and scaled to unit variance."""
        parameter = next(vae.parameters())
        mode = vae.encode(pixels[:, :, 0].to(parameter)).latent_dist.mode().float()
        return ((mode - vae.config.shift_factor) * vae.config.scaling_factor).unsqueeze(2)

    @torch.no_grad()
    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """The inverse of `encode_pixels`, clamped to [-1, 1]."""
        parameter = next(vae.parameters())
        raw = latents[:, :, 0].to(parameter) / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(raw).sample.float().clamp(-1, 1).unsqueeze(2)

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
        if source is not None and source.shape != noisy.shape:
            raise ValueError(f"source latents {tuple(source.shape)} and noisy latents {tuple(noisy.shape)} must have one shape")
        h, w = noisy.shape[-2:]
        dtype = torch.float32 if torch.is_autocast_enabled(noisy.device.type) else network.x_embedder.bias.dtype
        tokens, ids = sequence(noisy, source, self.position)
        guidance = torch.full_like(t, self.guidance, dtype=torch.float32) if network.config.guidance_embeds else None
        with _exact_times(network, t, guidance):
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

    def solver(self, steps: int, schedule: str, name: str) -> None:
        """FLUX is published with Euler."""
        return None


@contextmanager
def _exact_times(network: nn.Module, t: Tensor, guidance: Tensor | None) -> Iterator[None]:
    """Give the time embedding t and guidance in float32, in its unit (thousandths), for one call.

    diffusers rounds both to the tokens' dtype first: in bfloat16 a guidance of 3500 becomes 3504 and t = 0.77 becomes
    0.7695 beside an x_t made with 0.77.
    """
    exact = [value.float() * 1000 for value in (t, guidance) if value is not None]

    def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert len(args) == len(exact) + 1, "time_text_embed(timestep[, guidance], pooled)"
        return (*exact, args[-1])

    handle = network.time_text_embed.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()
