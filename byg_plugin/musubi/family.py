"""A model family inside musubi-tuner: the call of the host's network, its text encoders and what its cache files are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import torch
from torch import Tensor

from byg_plugin import families
from byg_plugin.objectives.base import Text, Velocity

if TYPE_CHECKING:
    from byg_plugin.config.sections import ConditioningConfig

Encoded = Mapping[str, Tensor]
"""One text: named tensors of (tokens, width), or of (tokens, layers, width); a pooled one has one row."""
Padding = Literal["none", "zeros", "masked"]
Module = Callable[[str], Any]
"""A module of the host by its name."""


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A family's loaded encoders, with the host's settings."""

    encode: Callable[[str], Encoded]
    """One text, on the CPU. What is `masked` is cut at `conditioning.max_text_tokens`, others at the host's own length."""
    length: Callable[[str], int]
    """A text's tokens, uncut. Runs no encoder."""


class MusubiFamily(Protocol):
    """What differs between the host's trainers. Imports nothing of the host: its objects are handed in."""

    trainer: tuple[str, str]
    """Module and class of the host's network trainer."""
    parser: str
    """Function of that module that adds the trainer's options."""
    network: tuple[str, str]
    """Module and class of the host's network."""
    latents_script: str
    """The host's script that caches latents."""
    architecture: tuple[str, str]
    """What its cache files are called after, and say that they are for."""
    text_parts: tuple[str, ...]
    """Names of an encoded text's tensors."""
    text_dims: int = 2
    """Of an encoded text: rows and width; 3 where each row has several layers."""
    padding: Padding
    """`none`: all cached texts have one length. Else each ends with its own last token, and is filled up with zeros: to
    `conditioning.max_text_tokens`, or `masked`, to the longest of the batch."""

    def lacking(self, trainer: Any, network: Any) -> list[str]:
        """What an incompatible host's trainer and network class do not have, a line each, beyond what every family asks for."""
        return []

    def check(self, options: Mapping[str, Any]) -> None:
        """What the host would stop at late, in words of its own.

        Raises:
            ValueError: names the option.
        """

    def left_out(self, options: Mapping[str, Any]) -> Sequence[str]:
        """Layers that the host's LoRA has by default and the embedded host's has not: expressions for its `exclude_patterns`."""
        return ()

    def call(self, module: Module, accelerator: Any, transformer: Any, conditioning: ConditioningConfig) -> Velocity:
        """The host's network as a velocity field: noisy (B, C, F, H, W), t (B,), source like noisy or None -> like noisy, float32."""
        ...

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1] -> latents (B, C, F', H', W'), float32."""
        ...

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse of `encode_pixels`."""
        ...

    def text_of_prompt(self, prompt: Mapping[str, Any], kind: str, tokens: int) -> Text | None:
        """A sample prompt's encoding as the host made it, a batch of one; `kind`: "" or "negative_"; None: there is none."""
        ...

    def load_text_encoder(self, module: Module, options: Mapping[str, Any], tokens: int, device: torch.device) -> TextEncoder:
        """The host's encoders; `tokens` is `conditioning.max_text_tokens`."""
        ...


def chat_length(tokenizer: Any, text: str, *, thinking: bool) -> int:
    """Tokens of a chat of one turn with Qwen3, uncut, by the tokenizer's own template, as the host has it."""
    turns = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    return len(tokenizer(chat, truncation=False, verbose=False).input_ids)  # verbose: it would warn of its own model_max_length


def require_tokens(tokens: int, taken: int, model: str) -> None:
    """Of a model whose texts have one length; asked before the encoder is loaded, for a batch would be refused after everything else.

    Args:
        tokens: `conditioning.max_text_tokens`.
        taken: what the host makes of a text, or its network takes.
        model: for the message.

    Raises:
        ValueError: they differ.
    """
    if tokens != taken:
        raise ValueError(f"conditioning.max_text_tokens = {tokens}: musubi-tuner's {model} takes texts of {taken} tokens, set it so")


def require_16_bits(options: Mapping[str, Any], model: str) -> None:
    """Of a model that the host reads in 16 bits: its default precision would give it inputs in float32.

    Raises:
        ValueError: `mixed_precision` is not one of the two.
    """
    if options.get("mixed_precision") not in ("bf16", "fp16"):
        raise ValueError(
            f"musubi.mixed_precision = {options.get('mixed_precision', 'no')!r}: the host holds {model} in 16 bits, set 'bf16'"
        )


def musubi_family(name: str) -> MusubiFamily:
    """The family of `model.family`; the configuration refuses those that the host has not."""
    spec = families.named(name)
    assert spec.musubi is not None, f"the configuration refuses {name}"
    return cast(MusubiFamily, resolve_name(spec.musubi.adapter)())


def require_known_attention(options: Mapping[str, Any], *, one_by_one: Sequence[str] = ()) -> None:
    """Attention that the host's image models have.

    Args:
        options: `[musubi]`.
        one_by_one: the options of those that handle texts of several lengths in a batch only one after another.

    Raises:
        ValueError: the host's model has no such attention, or would attend to what is no text.
    """
    if options.get("flash3"):
        raise ValueError("musubi.flash3: the host has it for Wan alone: set musubi.sdpa or musubi.flash_attn")
    for name in one_by_one:
        if options.get(name) and not options.get("split_attn"):
            raise ValueError(f"musubi.{name}: a batch has texts of several lengths, for which it needs musubi.split_attn = true")


def require_scaled_8_bits(options: Mapping[str, Any], model: str) -> None:
    """Of a model that the host cannot compute with in unscaled 8 bits.

    Raises:
        ValueError: it is asked to.
    """
    if options.get("fp8_base") and not options.get("fp8_scaled"):
        raise ValueError(f"musubi.fp8_base: the host's {model} computes with scaled 8 bit weights alone: set musubi.fp8_scaled too")
