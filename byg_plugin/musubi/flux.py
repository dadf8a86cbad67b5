"""FLUX.1 inside musubi-tuner, by its Kontext trainer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from byg_plugin import families
from byg_plugin.models import tokens as packing
from byg_plugin.musubi.family import Encoded, Module, MusubiFamily, Padding, TextEncoder, require_known_attention, require_tokens
from byg_plugin.objectives.base import Text, Velocity

if TYPE_CHECKING:
    from byg_plugin.config.sections import ConditioningConfig


class FluxOnMusubi(MusubiFamily):
    """See `musubi.family.MusubiFamily`."""

    trainer = ("flux_kontext_train_network", "FluxKontextNetworkTrainer")
    parser = "flux_kontext_setup_parser"
    network = ("flux.flux_models", "Flux")
    latents_script = "flux_kontext_cache_latents.py"
    architecture = ("fk", "flux_kontext")
    text_parts = ("t5", "pooled")
    padding: Padding = "none"

    def check(self, options: Mapping[str, Any]) -> None:
        """See `require_known_attention`."""
        require_known_attention(options)

    def call(self, module: Module, accelerator: Any, transformer: Any, conditioning: ConditioningConfig) -> Velocity:
        """See `flux_call`."""
        return partial(flux_call, accelerator, transformer, families.named("flux").source_id(conditioning.position), conditioning.guidance)

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        """One frame."""
        return vae.encode(pixels[:, :, 0].to(vae.dtype)).float().unsqueeze(2)

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """See `encode_pixels`."""
        return vae.decode(latents[:, :, 0].to(vae.dtype)).unsqueeze(2)

    def text_of_prompt(self, prompt: Mapping[str, Any], kind: str, tokens: int) -> Text | None:
        """FLUX has no negative text: its guidance is an input of the network."""
        return None if kind else {"t5": prompt["t5_vec"], "pooled": prompt["clip_l_pooler"]}

    def load_text_encoder(self, module: Module, options: Mapping[str, Any], tokens: int, device: torch.device) -> TextEncoder:
        """T5 and the pooled vector of CLIP-L.

        Raises:
            ValueError: see `require_tokens`.
        """
        utils, models = module("flux.flux_utils"), module("flux.flux_models")
        require_tokens(tokens, models.T5XXL_MAX_LENGTH, "FLUX")
        dtype = torch.float8_e4m3fn if options.get("fp8_t5") else torch.bfloat16
        t5_tokenizer, t5 = utils.load_t5xxl(options["text_encoder1"], dtype=dtype, device=device, disable_mmap=True)
        clip_tokenizer, clip = utils.load_clip_l(options["text_encoder2"], dtype=torch.bfloat16, device=device, disable_mmap=True)

        def encode(text: str) -> Encoded:
            ids = [
                tokenizer([text], max_length=length, padding="max_length", truncation=True, return_tensors="pt")["input_ids"].to(device)
                for tokenizer, length in ((t5_tokenizer, models.T5XXL_MAX_LENGTH), (clip_tokenizer, 77))
            ]
            with torch.autocast(device.type, dtype=torch.bfloat16):
                sequence = t5(input_ids=ids[0], attention_mask=None, output_hidden_states=False)["last_hidden_state"]
                pooled = clip(ids[1])["pooler_output"]
            return {"t5": sequence[0].to(torch.bfloat16).cpu(), "pooled": pooled.to(torch.bfloat16).cpu()}

        # CLIP's own 77 tokens are no setting, and FLUX takes only a pooled vector from it.
        return TextEncoder(encode=encode, length=lambda text: len(t5_tokenizer(text, truncation=False, verbose=False).input_ids))


def flux_call(
    accelerator: Any, transformer: Any, source_id: int, guidance: float, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None
) -> Tensor:
    """Velocity of the host's FLUX: noisy (B, C, 1, H, W), t (B,), source like noisy or None -> like noisy, float32."""
    h, w = noisy.shape[-2:]
    tokens, ids = packing.sequence(noisy, source, source_id)
    t5 = text["t5"].to(noisy.device).float()
    with accelerator.autocast():
        out = transformer(
            img=tokens.float(),
            img_ids=ids.expand(len(noisy), -1, -1),
            txt=t5,
            txt_ids=torch.zeros(len(noisy), t5.shape[1], 3, device=noisy.device),
            timesteps=t.float(),
            y=text["pooled"].to(noisy.device).float(),
            guidance=torch.full_like(t, guidance, dtype=torch.float32),
        )
    return packing.unpack(out[:, : packing.pack_length(h, w)].float(), h, w)
