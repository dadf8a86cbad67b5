"""Krea 2 inside musubi-tuner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from byg_plugin import families
from byg_plugin.models.tokens import pack_length, sequence, unpack
from byg_plugin.musubi.family import Encoded, Module, TextEncoder, require_16_bits, require_known_attention, require_scaled_8_bits
from byg_plugin.musubi.qwen_image import QwenVaeOnMusubi, one_text, rows_and_mask, template_length
from byg_plugin.objectives.base import Text, Velocity

if TYPE_CHECKING:
    from byg_plugin.config.sections import ConditioningConfig


class Krea2OnMusubi(QwenVaeOnMusubi):
    """See `musubi.family.MusubiFamily`."""

    trainer = ("krea2_train_network", "Krea2NetworkTrainer")
    parser = "krea2_setup_parser"
    network = ("krea2.krea2_mmdit", "SingleStreamDiT")
    latents_script = "krea2_cache_latents.py"
    architecture = ("kr2", "krea2")
    text_dims = 3

    def check(self, options: Mapping[str, Any]) -> None:
        """What the host stops at, or takes in silence and does not do.

        Raises:
            ValueError: names the option.
        """
        require_16_bits(options, "Krea 2")
        require_known_attention(options, one_by_one=("xformers",))
        require_scaled_8_bits(options, "Krea 2")
        if options.get("turbo_dit"):
            raise ValueError("musubi.turbo_dit: a preview is an edit by the base that is trained: leave it out; edit.py takes others")
        if options.get("gradient_checkpointing_cpu_offload"):
            raise ValueError(
                "musubi.gradient_checkpointing_cpu_offload: the host's Krea 2 keeps its activations on the device: leave it out"
            )

    def left_out(self, options: Mapping[str, Any]) -> Sequence[str]:
        """All but the blocks: embedders, the fusion of the text's layers and the head stay frozen."""
        return (r"(?!blocks\.).*",)

    def call(self, module: Module, accelerator: Any, transformer: Any, conditioning: ConditioningConfig) -> Velocity:
        """See `krea2_call`."""
        return partial(krea2_call, accelerator, transformer, families.named("krea2").source_id(conditioning.position))

    def text_of_prompt(self, prompt: Mapping[str, Any], kind: str, tokens: int) -> Text | None:
        """The host keeps a prompt's own rows."""
        rows = prompt.get(f"{kind}krea2_vl_embed")
        return None if rows is None else one_text(rows)

    def load_text_encoder(self, module: Module, options: Mapping[str, Any], tokens: int, device: torch.device) -> TextEncoder:
        """12 hidden states of Qwen3-VL; a text that is too long is cut before the template's end."""
        utils = module("krea2.krea2_utils")
        encoder = utils.load_krea2_text_encoder(options["text_encoder"], dtype=torch.bfloat16, device=device, max_length=tokens)
        encoder.qwen.register_forward_pre_hook(_count_text_alone, with_kwargs=True)

        def encode(text: str) -> Encoded:
            rows, mask = utils.get_krea2_prompt_embeds(encoder, [text])
            return {"qwen": rows[0][mask[0]].to(torch.bfloat16).cpu()}

        return TextEncoder(encode=encode, length=partial(template_length, encoder.tokenizer))


def _count_text_alone(module: Any, args: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Positions of the template's end follow the text: the host pads between the two, and transformers 5 would count that."""
    counted = (inputs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
    return args, {**inputs, "position_ids": counted.expand(3, -1, -1)}


def krea2_call(accelerator: Any, transformer: Any, source_id: int, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
    """Velocity of the host's Krea 2: noisy (B, C, 1, H, W), t (B,), source like noisy or None -> like noisy, float32.

    Image tokens come first, all text is at one position.
    """
    h, w = noisy.shape[-2:]
    tokens, ids = sequence(noisy, source, source_id)
    rows, mask, _ = rows_and_mask(text, noisy.device)
    positions = torch.cat([ids, ids.new_zeros(rows.shape[1], 3)]).expand(len(noisy), -1, -1)
    with accelerator.autocast():
        out = transformer(
            img=tokens.float(), context=rows, t=t.float(), pos=positions, mask=torch.cat([mask.new_ones(tokens.shape[:2]), mask], dim=1)
        )
    return unpack(out[:, : pack_length(h, w)].float(), h, w)
