"""A model family inside musubi-tuner: the call of the host's network, its text encoders and what its cache files are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from byg_plugin import families
from byg_plugin.objectives.base import Text, Velocity

if TYPE_CHECKING:
    from byg_plugin.config.sections import ConditioningConfig

Encoded = Mapping[str, Tensor]
"""One text: named tensors of (tokens, width); a pooled one has one row."""
Module = Callable[[str], Any]
"""A module of the host by its name."""


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
    pads_texts: bool
    """Whether a cached text ends with its own last token, and is filled up with zeros; otherwise all have one length."""

    def lacking(self, trainer: Any, network: Any) -> list[str]:
        """What an incompatible host's trainer and network class do not have, a line each."""
        ...

    def check(self, options: Mapping[str, Any]) -> None:
        """What the host would stop at late, in words of its own.

        Raises:
            ValueError: names the option.
        """
        ...

    def call(self, accelerator: Any, transformer: Any, conditioning: ConditioningConfig) -> Velocity:
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

    def encode_texts(self, module: Module, options: Mapping[str, Any], texts: Sequence[str], device: torch.device) -> dict[str, Encoded]:
        """Encodings by text, with the host's encoders and settings, on the CPU."""
        ...


def musubi_family(name: str) -> MusubiFamily:
    """The family of `model.family`; the configuration refuses those that the host has not."""
    spec = families.named(name)
    assert spec.musubi is not None, f"the configuration refuses {name}"
    return cast(MusubiFamily, resolve_name(spec.musubi.adapter)())
