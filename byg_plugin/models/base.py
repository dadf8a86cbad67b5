"""What a model family gives to hosts, caches and editing: the only knowledge of packing, positions, guidance and experts.

A family is its `FamilySpec` and one file beside this one. It loads the frozen parts and turns a network into one velocity call; it
never knows of LoRA, objectives or loops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from byg_plugin.families.geometry import Geometry
from byg_plugin.objectives.base import Text


class Family(Geometry, Protocol):
    """One model family with its weights, configured (position, guidance, paths of its parts)."""

    default_lora_targets: str
    """Regular expression that a whole module name must match."""

    # --- frozen parts; each is loaded where it is used and dropped by its caller ---
    def load_transformers(self, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
        """The experts with their names, frozen, on the CPU, in eval mode; one for a family without experts.

        One is read when it is asked for, so that the one before can be quantised or moved first.
        """
        ...

    def meta_transformers(self) -> dict[str, nn.Module]:
        """The same experts on the meta device: shapes, no weights."""
        ...

    def sequence_tokens(self, height: int, width: int, frames: int = 1) -> int:
        """Tokens of the sequence of one sample of this size in pixels: noisy, source, and text where it is part of it."""
        ...

    def load_vae(self, device: torch.device) -> nn.Module: ...

    def meta_vae(self) -> nn.Module:
        """The autoencoder's shapes, no weights."""
        ...

    def load_text_encoders(self, device: torch.device) -> Any: ...

    def fingerprint(self, part: str) -> str:
        """Identity of the weights of `vae` or `text` plus what is done with them; enters every cache key."""
        ...

    def pixel_multiple(self) -> int:
        """Sides of an image must be multiples of this many pixels. Loads no weights."""
        ...

    # --- pixels and texts ---
    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1] -> normalised latents (B, C, F', H', W'), float32."""
        ...

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """The inverse of `encode_pixels`: (B, 3, F, H, W) in [-1, 1], float32. Differentiable with respect to the latents."""
        ...

    def encode_texts(self, encoders: Any, texts: Sequence[str]) -> dict[str, Tensor]:
        """B texts -> named tensors, batch first, on the CPU."""
        ...

    def longer_than_limit(self, encoders: Any, texts: Sequence[str]) -> list[bool]:
        """Of each text, whether `encode_texts` cuts it at conditioning.max_text_tokens. Runs no encoder."""
        ...

    # --- the network ---
    def velocity(self, network: nn.Module, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        """Velocity `noise - data` at `noisy` (B, C, F, H, W), t (B,) in [0, 1]; `source` as latents or None."""
        ...

    def solver(self, steps: int, schedule: str, name: str) -> Solver | None:
        """The sampler that `sample.solver` names, `auto` for the published one; None: Euler. `shifted` has the published shift."""
        ...


class Solver(Protocol):
    """A multistep sampler of one trajectory: call the network at `times[i]`, then `step(i, ...)`, in order."""

    times: Tensor

    def step(self, index: int, v: Tensor, x: Tensor) -> Tensor: ...


def at_least_float32(values: Tensor) -> Tensor:
    """In float32, float64 kept: derivatives are compared with differences there."""
    return values if values.dtype == torch.float64 else values.float()
