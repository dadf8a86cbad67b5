"""Autoencoders whose latent channels each have a published mean and standard deviation: Wan's and Qwen-Image's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode(vae: Any, pixels: Tensor) -> Tensor:
    """(B, 3, F, H, W) in [-1, 1] -> latents (B, C, F', H', W'), the posterior's mode to zero mean and unit variance, float32."""
    return normalise(vae, vae.encode(pixels.to(next(vae.parameters()))).latent_dist.mode().float())


def normalise(vae: Any, mode: Tensor) -> Tensor:
    """The posterior's mode (B, C, F', H', W') -> latents of zero mean and unit variance."""
    mean, std = _statistics(vae, mode)
    return (mode - mean) / std


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `encode`, clamped to [-1, 1]."""
    mean, std = _statistics(vae, latents.float())
    raw = latents.float() * std + mean
    return vae.decode(raw.to(next(vae.parameters()))).sample.float().clamp(-1, 1)


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latent channels, (1, C, 1, 1, 1)."""
    mean, std = (torch.tensor(values, dtype=like.dtype, device=like.device) for values in (vae.config.latents_mean, vae.config.latents_std))
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)
