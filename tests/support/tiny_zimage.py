"""A tiny random Z-Image of the real classes in a real diffusers folder."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

from tests.support.tiny import kept, tiny_flux_vae
from tests.support.tiny_flux2 import write_qwen3
from tests.support.tiny_qwen import randomised

TINY_ZIMAGE: dict[str, Any] = {
    "dim": 32,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "cap_feat_dim": 16,
    "axes_dims": (4, 6, 6),
    "axes_lens": (256, 64, 64),
}
SHIFT = 6.0


def tiny_zimage(seed: int = 0, **changes: Any) -> ZImageTransformer2DModel:
    """A random transformer of two layers; learned padding is not zero."""
    return randomised(ZImageTransformer2DModel(**(TINY_ZIMAGE | changes)), seed, std=0.15)


def write_zimage(folder: Path, **changes: Any) -> Path:
    """A diffusers folder with random weights of every part; `changes` to the transformer's configuration."""
    tiny_zimage(**changes).save_pretrained(folder / "transformer")
    tiny_flux_vae().save_pretrained(folder / "vae")
    write_qwen3(folder, layers=3)
    FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "ZImagePipeline"}), encoding="utf-8")
    return folder


@lru_cache(maxsize=1)
def zimage_folder() -> Path:
    """One folder for the whole run; nobody may write into it."""
    return kept("tiny-zimage", write_zimage)
