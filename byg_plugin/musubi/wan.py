"""Wan inside musubi-tuner."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from byg_plugin.musubi.family import Encoded, Module, MusubiFamily, Padding, TextEncoder, require_tokens
from byg_plugin.musubi.options import check_precision
from byg_plugin.objectives.base import Text, Velocity

if TYPE_CHECKING:
    from byg_plugin.config.sections import ConditioningConfig


class WanOnMusubi(MusubiFamily):
    """See `musubi.family.MusubiFamily`."""

    trainer = ("wan_train_network", "WanNetworkTrainer")
    parser = "wan_setup_parser"
    network = ("wan.modules.model", "WanModel")
    latents_script = "wan_cache_latents.py"
    architecture = ("wan", "wan")
    text_parts = ("umt5",)
    padding: Padding = "zeros"

    def lacking(self, trainer: Any, network: Any) -> list[str]:
        """The exchange of experts, and positions of the source's frames."""
        found = []
        if not callable(getattr(trainer, "swap_high_low_weights", None)):
            found.append(f"{trainer.__name__}.swap_high_low_weights, which exchanges Wan2.2's experts")
        if "f_indices" not in inspect.signature(network.forward).parameters:
            found.append("WanModel.forward(f_indices=...), which gives the source's tokens their positions")
        return found

    def check(self, options: Mapping[str, Any]) -> None:
        """See `musubi.options.check_precision`."""
        check_precision(options)

    def call(self, module: Module, accelerator: Any, transformer: Any, conditioning: ConditioningConfig) -> Velocity:
        """See `wan_call`."""
        return partial(wan_call, accelerator, transformer)

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        """The host's VAE takes and gives lists."""
        return torch.stack(list(vae.encode(pixels))).float()

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """See `encode_pixels`."""
        return torch.stack(list(vae.decode(latents)))

    def text_of_prompt(self, prompt: Mapping[str, Any], kind: str, tokens: int) -> Text | None:
        """Filled up with zeros to `tokens`."""
        rows = prompt.get(f"{kind}t5_embeds")
        if rows is None:
            return None
        return {"umt5": torch.cat([rows, rows.new_zeros(tokens - len(rows), rows.shape[1])])[None]}

    def load_text_encoder(self, module: Module, options: Mapping[str, Any], tokens: int, device: torch.device) -> TextEncoder:
        """UMT5, each text as long as it is.

        Raises:
            ValueError: see `require_tokens`.
        """
        shared = module("wan.configs.shared_config").wan_shared_cfg
        require_tokens(tokens, shared.text_len, "Wan")
        encoder = module("wan.modules.t5").T5EncoderModel(
            text_len=shared.text_len, dtype=shared.t5_dtype, device=device, weight_path=options["t5"], fp8=bool(options.get("fp8_t5"))
        )

        def encode(text: str) -> Encoded:
            with torch.autocast(device.type, dtype=shared.t5_dtype, enabled=bool(options.get("fp8_t5"))):
                return {"umt5": encoder([text], device)[0].to(shared.t5_dtype).cpu()}

        def length(text: str) -> int:
            return encoder.tokenizer(text, truncation=False, padding=False, verbose=False).shape[1]

        return TextEncoder(encode=encode, length=length)


def to_host_timestep(t: Tensor) -> Tensor:
    """t in [0, 1] -> the host's unit for Wan, thousandths, in float32. (Its own training adds 1 to them; its sampling does not.)"""
    return t.float() * 1000


def wan_call(accelerator: Any, transformer: Any, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
    """Velocity of the host's Wan: noisy (B, C, F, H, W), t (B,), source like noisy or None -> like noisy, float32.

    The source's frames follow the noisy ones and have their positions.
    """
    frames = noisy.shape[2]
    latents = noisy if source is None else torch.cat([noisy, source], dim=2)
    # Lists: the host hashes them.
    positions = None if source is None else [[*range(frames)] * 2 for _ in range(len(noisy))]
    length = latents.shape[2] * (latents.shape[3] // 2) * (latents.shape[4] // 2)
    with accelerator.autocast():
        out = transformer(
            latents.float(), t=to_host_timestep(t), context=text["umt5"].to(noisy.device).float(), seq_len=length, f_indices=positions
        )
    return torch.stack(list(out))[:, :, :frames].float()
