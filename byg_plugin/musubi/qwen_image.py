"""Qwen-Image inside musubi-tuner, and what Krea 2 has of it: the autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from byg_plugin import families
from byg_plugin.models.one_call import first_arguments, image_positions
from byg_plugin.models.qwen_texts import DROPPED, token_ids
from byg_plugin.models.tokens import image_grids, pack, pack_length, unpack
from byg_plugin.musubi.family import (
    Encoded,
    Module,
    MusubiFamily,
    Padding,
    TextEncoder,
    require_16_bits,
    require_known_attention,
    require_scaled_8_bits,
)
from byg_plugin.objectives.base import Text, Velocity
from byg_plugin.texts import MASK, padding_mask

if TYPE_CHECKING:
    from byg_plugin.config.sections import ConditioningConfig

_LAYERS = 60


class QwenVaeOnMusubi(MusubiFamily):
    """A family with Qwen-Image's autoencoder, whose latents are cached to zero mean and unit variance, as ours are."""

    padding: Padding = "masked"
    text_parts = ("qwen",)

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        """One frame."""
        return vae.encode_pixels_to_latents(pixels).float()

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """The host decodes to [0, 1], without a frame axis."""
        return vae.decode_to_pixels(latents).unsqueeze(2) * 2 - 1


class QwenImageOnMusubi(QwenVaeOnMusubi):
    """See `musubi.family.MusubiFamily`."""

    trainer = ("qwen_image_train_network", "QwenImageNetworkTrainer")
    parser = "qwen_image_setup_parser"
    network = ("qwen_image.qwen_image_model", "QwenImageTransformer2DModel")
    latents_script = "qwen_image_cache_latents.py"
    architecture = ("qi", "qwen_image")

    def check(self, options: Mapping[str, Any]) -> None:
        """See `require_16_bits`, `require_known_attention` and `require_scaled_8_bits`."""
        require_16_bits(options, "Qwen-Image")
        # Its attention takes no mask in these modes, without a word.
        require_known_attention(options, one_by_one=("flash_attn", "xformers"))
        require_scaled_8_bits(options, "Qwen-Image")

    def left_out(self, options: Mapping[str, Any]) -> Sequence[str]:
        """Modulation, and of the last block what only the text's own output depends on: it has no gradient."""
        last = (options.get("num_layers") or _LAYERS) - 1
        return (
            r".*\.(img|txt)_mod\..*",
            rf"transformer_blocks\.{last}\.(attn\.(add_q_proj|to_add_out)|txt_mlp\..*)",
        )

    def call(self, module: Module, accelerator: Any, transformer: Any, conditioning: ConditioningConfig) -> Velocity:
        """See `qwen_image_call`."""
        return partial(qwen_image_call, accelerator, transformer, families.named("qwen-image").source_id(conditioning.position))

    def text_of_prompt(self, prompt: Mapping[str, Any], kind: str, tokens: int) -> Text | None:
        """All rows are text; without a negative prompt, the host has one blank."""
        return one_text(prompt[f"{kind}vl_embed"][0, :tokens])

    def load_text_encoder(self, module: Module, options: Mapping[str, Any], tokens: int, device: torch.device) -> TextEncoder:
        """Qwen2.5-VL with Qwen-Image's template."""
        utils = module("qwen_image.qwen_image_utils")
        dtype = torch.float8_e4m3fn if options.get("fp8_vl") else torch.bfloat16
        tokenizer, encoder = utils.load_qwen2_5_vl(options["text_encoder"], dtype=dtype, device=device, disable_mmap=True)

        def encode(text: str) -> Encoded:
            rows, mask = utils.get_qwen_prompt_embeds(tokenizer, encoder, text)
            return {"qwen": rows[0][mask[0].bool()][:tokens].to(torch.bfloat16).cpu()}

        return TextEncoder(encode=encode, length=partial(template_length, tokenizer))


def template_length(tokenizer: Any, text: str) -> int:
    """Tokens of a text with what follows it in Qwen-Image's template, uncut; what is before it the networks do not see."""
    return len(token_ids(tokenizer, [text], None, keeps_suffix=False)[0]) - DROPPED


def one_text(rows: Tensor) -> Text:
    """(L, ...) -> a batch of one text without padding."""
    return {"qwen": rows[None], MASK: torch.ones(1, len(rows), dtype=torch.bool, device=rows.device)}


def rows_and_mask(text: Text, device: torch.device) -> tuple[Tensor, Tensor, list[int]]:
    """Rows (B, L, ...) and mask (B, L) up to the end of the longest text, and the texts' lengths."""
    lengths = text[MASK].sum(dim=1).tolist()
    longest = max(lengths)
    return text["qwen"][:, :longest].to(device).float(), text[MASK][:, :longest].to(device), lengths


def qwen_image_call(
    accelerator: Any, transformer: Any, source_id: int, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None
) -> Tensor:
    """Velocity of the host's Qwen-Image: noisy (B, C, 1, H, W), t (B,), source like noisy or None -> like noisy, float32."""
    h, w = noisy.shape[-2:]
    network = accelerator.unwrap_model(transformer)
    tokens = pack(noisy) if source is None else torch.cat([pack(noisy), pack(source)], dim=1)
    images, doubled = image_grids(h, w, None if source is None else source_id)
    rows, mask, lengths = rows_and_mask(text, noisy.device)
    exact = first_arguments(network.time_text_embed, t.float())
    with accelerator.autocast(), exact, image_positions(network, doubled=doubled):
        out = transformer(
            hidden_states=tokens.float(),
            encoder_hidden_states=rows,
            encoder_hidden_states_mask=padding_mask({MASK: mask}, noisy.device),
            timestep=t.float(),
            img_shapes=[images],
            txt_seq_lens=lengths,
        )
    return unpack(out[:, : pack_length(h, w)].float(), h, w)
