"""Z-Image's transformer from what people have on disk, without a hub.

`path_or_id` (see `files.py`) is a diffusers folder, a hub id or one .safetensors file in ComfyUI's layout (`layers.0.attention.qkv.…`,
bare or under `model.diffusion_model.`) or in diffusers', which is the authors'.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byg_plugin.lora import zimage_names
from byg_plugin.models import files, native
from byg_plugin.models.networks import Network

_BESIDE = ("norm_final.weight",)  # of files that ComfyUI writes; no layer has it


def to_native_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers Z-Image state dict in ComfyUI's layout (the inverse of what the loader does)."""
    blocks = {start: files.count_blocks(state, rf"{start[:-1]}\.(\d+)\.") for start in zimage_names.BLOCKS}
    return native.to_native(state, zimage_names.NAMES.linears(blocks), zimage_names.others(blocks))


def _state(weights: files.Weights, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    if weights.layout != "native":
        return weights.all(dtype, skip=_BESIDE)
    refiners = config["n_refiner_layers"]
    blocks = {"layers.": config["n_layers"], "noise_refiner.": refiners, "context_refiner.": refiners}
    names = zimage_names.NAMES.linears(blocks), zimage_names.others(blocks)
    return native.read_native(weights, *names, dtype, kinds=("weight",), beside=_BESIDE)


def _config(weights: files.Weights) -> dict[str, Any]:
    own = weights.layout == "native"
    if any("siglip" in name for name in weights.names):
        raise weights.error("has an embedder of images' meaning (siglip), so it looks like Z-Image Omni, whose input is not supplied here")
    embedder = "x_embedder" if own else "all_x_embedder.2-1"
    dim, patch = weights.shape(f"{embedder}.weight")
    head = weights.shape(f"layers.0.attention.{'q_norm' if own else 'norm_q'}.weight")[0]
    # A quarter of a head's pairs tell the frame, the rest rows and columns; the file itself does not say.
    axes = [head // 4, head * 3 // 8, head * 3 // 8]
    if sum(axes) != head or any(axis % 2 for axis in axes):
        raise weights.error(f"heads of {head} channels are not Z-Image's (128) and the file does not say how positions split them")
    return files.shipped_config("zimage/transformer") | {
        "axes_dims": axes,
        "cap_feat_dim": weights.shape("cap_embedder.1.weight")[1],
        "dim": dim,
        "in_channels": patch // 4,
        "n_heads": dim // head,
        "n_kv_heads": dim // head,
        "n_layers": files.count_blocks(weights.names, r"layers\.(\d+)\."),
        "n_refiner_layers": files.count_blocks(weights.names, r"noise_refiner\.(\d+)\."),
    }


def _refuse_other_inputs(config: Any, path_or_id: str | Path) -> None:
    if config.get("siglip_feat_dim") is not None:
        raise ValueError(f"{path_or_id}: siglip_feat_dim is set: looks like Z-Image Omni, whose input is not supplied here; use Z-Image")


TRANSFORMER = Network(
    name="ZImageTransformer2DModel",
    part="zimage_transformer",
    config=_config,
    state=_state,
    check=_refuse_other_inputs,
    text_width="cap_feat_dim",
)
