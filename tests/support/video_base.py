"""The base of the demo in motion, untrained."""

from __future__ import annotations

from pathlib import Path

import torch

from byg_plugin.demo import build_video_base


def write_video_base(folder: Path) -> Path:
    """Every part with random weights."""
    torch.manual_seed(0)
    vae = build_video_base.AutoencoderKLWan(**build_video_base.VAE_CONFIG, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    experts = {name: build_video_base.make_transformer() for name in ("transformer", "transformer_2")}
    for expert in experts.values():
        torch.nn.init.normal_(expert.proj_out.weight, std=0.1)
    build_video_base.save(folder, vae, experts, build_video_base.TextEncoder())
    return folder
