"""FLUX.2 klein base inside musubi-tuner."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from byg_plugin import families
from byg_plugin.models import tokens as packing
from byg_plugin.musubi.family import (
    Encoded,
    Module,
    MusubiFamily,
    Padding,
    TextEncoder,
    chat_length,
    require_16_bits,
    require_known_attention,
    require_tokens,
)
from byg_plugin.objectives.base import Text, Velocity

if TYPE_CHECKING:
    from byg_plugin.config.sections import ConditioningConfig


class Flux2OnMusubi(MusubiFamily):
    """See `musubi.family.MusubiFamily`. The host's latents are ours: 128 channels, normalised."""

    trainer = ("flux_2_train_network", "Flux2NetworkTrainer")
    parser = "flux2_setup_parser"
    network = ("flux_2.flux2_models", "Flux2")
    latents_script = "flux_2_cache_latents.py"
    text_parts = ("qwen",)
    padding: Padding = "none"
    size: str

    def check(self, options: Mapping[str, Any]) -> None:
        """See `require_16_bits` and `require_known_attention`."""
        require_16_bits(options, "FLUX.2")
        require_known_attention(options)

    def call(self, module: Module, accelerator: Any, transformer: Any, conditioning: ConditioningConfig) -> Velocity:
        """See `flux2_call`."""
        return partial(flux2_call, accelerator, transformer, families.named(f"flux2-klein-{self.size}").source_id(conditioning.position))

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        """One frame."""
        return vae.encode(pixels[:, :, 0].to(vae.dtype)).float().unsqueeze(2)

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """See `encode_pixels`."""
        return vae.decode(latents[:, :, 0].to(vae.dtype)).unsqueeze(2)

    def text_of_prompt(self, prompt: Mapping[str, Any], kind: str, tokens: int) -> Text | None:
        """Both texts are 512 tokens long, padding and all."""
        return {"qwen": prompt[f"{kind}ctx_vec"]}

    def load_text_encoder(self, module: Module, options: Mapping[str, Any], tokens: int, device: torch.device) -> TextEncoder:
        """Three hidden states of Qwen3 side by side, by the host's own embedder.

        Raises:
            ValueError: see `require_tokens`.
        """
        utils = module("flux_2.flux2_utils")
        require_tokens(tokens, utils.MAX_LENGTH, "FLUX.2")
        info = utils.FLUX2_MODEL_INFO[f"klein-base-{self.size}"]
        dtype = torch.float8_e4m3fn if options.get("fp8_text_encoder") else torch.bfloat16
        embedder = utils.load_text_embedder(info, options["text_encoder"], dtype=dtype, device=device, disable_mmap=True)

        def encode(text: str) -> Encoded:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype.itemsize == 1):
                return {"qwen": embedder([text])[0].to(torch.bfloat16).cpu()}

        return TextEncoder(encode=encode, length=partial(chat_length, embedder.tokenizer, thinking=False))


class Klein4BOnMusubi(Flux2OnMusubi):
    """The 4B."""

    size = "4b"
    architecture = ("f2k4b", "flux_2_klein_4b")


class Klein9BOnMusubi(Flux2OnMusubi):
    """The 9B."""

    size = "9b"
    architecture = ("f2k9b", "flux_2_klein_9b")


def flux2_call(accelerator: Any, transformer: Any, source_id: int, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
    """Velocity of the host's FLUX.2: noisy (B, C, 1, H, W), t (B,), source like noisy or None -> like noisy, float32."""
    h, w = noisy.shape[-2:]
    tokens, ids = packing.latent_sequence(noisy, source, source_id)
    rows = text["qwen"].to(noisy.device).float()
    with accelerator.autocast():
        out = transformer(
            x=tokens.float(),
            x_ids=ids.expand(len(noisy), -1, -1),
            timesteps=t.float(),
            ctx=rows,
            ctx_ids=packing.text_ids(rows.shape[1], noisy.device).expand(len(noisy), -1, -1),
            guidance=torch.ones_like(t, dtype=torch.float32),  # not read: klein has no such input
        )
    return packing.tokens_to_latents(out[:, : h * w].float(), h, w)
