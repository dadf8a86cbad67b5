"""The base of the demo in motion, untrained."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.bases import wan


def write_video_base(folder: Path) -> Path:
    """Every part with random weights."""
    torch.manual_seed(0)
    vae = wan.AutoencoderKLWan(**wan.VAE_CONFIG, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    experts = {name: wan.make_transformer() for name in ("transformer", "transformer_2")}
    for expert in experts.values():
        torch.nn.init.normal_(expert.proj_out.weight, std=0.1)
    wan.save(folder, vae, experts, wan.TextEncoder())
    return folder
