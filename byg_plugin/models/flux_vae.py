"""FLUX.1's autoencoder, which Z-Image has too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from byg_plugin.models import flux_files
from byg_plugin.models.image_family import ImageFamily


def normalise(vae: Any, mode: Tensor) -> Tensor:
    """The posterior's mode (B, 16, H, W) -> latents, shifted and scaled to unit variance."""
    return (mode - vae.config.shift_factor) * vae.config.scaling_factor


class FluxVaeFamily(ImageFamily):
    """A family with FLUX.1's autoencoder: 16 channels, one shift and one scale."""

    vae = flux_files.VAE

    @torch.no_grad()
    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        """(B, 3, 1, H, W) in [-1, 1] -> (B, 16, 1, H/8, W/8), the posterior's mode, shifted and scaled to unit variance."""
        mode = vae.encode(pixels[:, :, 0].to(next(vae.parameters()))).latent_dist.mode().float()
        return normalise(vae, mode).unsqueeze(2)

    @torch.no_grad()
    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """The inverse of `encode_pixels`, clamped to [-1, 1]."""
        raw = latents[:, :, 0].to(next(vae.parameters())) / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(raw).sample.float().clamp(-1, 1).unsqueeze(2)
