"""Tiny random models of the real classes: they prove plumbing, not learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from byg_plugin.training.config import Config, parse_config

TINY_FLUX = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}


def tiny_flux(seed: int = 0) -> FluxTransformer2DModel:
    """A random FLUX whose output head is not zero and whose modulation is alive."""
    torch.manual_seed(seed)
    network = FluxTransformer2DModel(**TINY_FLUX)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    return network.eval()


def tiny_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """A float32 CPU configuration; sections are merged in."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "model"), "dtype": "float32", "device": "cpu", "gradient_checkpointing": False},
        "dataset": {"tuples": str(folder / "tuples.jsonl"), "cache_dir": str(folder / "cache"), "resolution": 64},
        "conditioning": {"max_text_tokens": 8},
        "lora": {"rank": 4},
        "train": {"steps": 4, "global_batch_size": 2, "mixed_precision": "no", "tracker": "none", "lr": 1e-2},
        "output": {"dir": str(folder / "out")},
    }
    for name, values in sections.items():
        raw.setdefault(name, {}).update(values)
    return parse_config(raw)


def tiny_texts(batch: int, seed: int) -> dict[str, torch.Tensor]:
    """Random encodings of the tiny FLUX's widths."""
    rng = torch.Generator().manual_seed(seed)
    return {"t5": torch.randn(batch, 8, 24, generator=rng), "pooled": torch.randn(batch, 20, generator=rng)}
