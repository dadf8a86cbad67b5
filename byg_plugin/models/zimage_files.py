"""Z-Image's transformer from what people have on disk, without a hub.

`path_or_id` (see `files.py`) is a diffusers folder, a hub id or one .safetensors file in ComfyUI's layout (`layers.0.attention.qkv.…`,
bare or under `model.diffusion_model.`) or in diffusers', which is the authors'. The class is newer than the oldest diffusers that other
families take: it is imported where it is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from byg_plugin.lora import zimage_names
from byg_plugin.models import files, native

_PART = "zimage_transformer"
_BESIDE = ("norm_final.weight",)  # of files that ComfyUI writes; no layer has it


def load_transformer(path_or_id: str | Path, *, dtype: torch.dtype) -> nn.Module:
    """The transformer in `dtype`, on the CPU, in eval mode.

    Raises:
        ValueError: nothing is at `path_or_id`, or it is not Z-Image.
    """
    from diffusers import ZImageTransformer2DModel

    file = files.single_file(path_or_id, _PART)
    if file is None:
        model = files.from_folder(ZImageTransformer2DModel, path_or_id, _PART, torch_dtype=dtype)
    else:
        with files.Weights(file, _PART) as weights:
            config = files.config_beside(weights) or _config(weights)
            state = _native_state(weights, config, dtype) if weights.layout == "native" else weights.all(dtype, skip=_BESIDE)
            model = files.build(lambda: ZImageTransformer2DModel.from_config(config), state, weights)
    _refuse_other_inputs(model.config, path_or_id)
    return cast(nn.Module, model).eval()


def transformer_on_meta(path_or_id: str | Path) -> nn.Module:
    """The transformer that `load_transformer` would load, on the meta device: names and shapes, no weights read.

    Raises:
        ValueError: as `load_transformer`, as far as configuration or header tell.
    """
    from diffusers import ZImageTransformer2DModel

    config = files.config_only(path_or_id, _PART, ZImageTransformer2DModel, _config)
    with torch.device("meta"):
        model = ZImageTransformer2DModel.from_config(config)
    _refuse_other_inputs(model.config, path_or_id)
    return cast(nn.Module, model).eval()


def shipped_config() -> dict[str, Any]:
    """Z-Image's configuration of the transformer."""
    return json.loads((files.assets() / "zimage" / "transformer.json").read_text(encoding="utf-8"))


def to_native_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers Z-Image state dict in ComfyUI's layout (the inverse of what the loader does)."""
    blocks = {start: files.count_blocks(state, rf"{start[:-1]}\.(\d+)\.") for start in zimage_names.BLOCKS}
    return native.to_native(state, zimage_names.NAMES.linears(blocks), zimage_names.others(blocks))


def _native_state(weights: files.Weights, config: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    refiners = config["n_refiner_layers"]
    blocks = {"layers.": config["n_layers"], "noise_refiner.": refiners, "context_refiner.": refiners}
    names = zimage_names.NAMES.linears(blocks), zimage_names.others(blocks)
    return native.read_native(weights, *names, dtype, kinds=("weight",), beside=_BESIDE)


def _config(weights: files.Weights) -> dict[str, Any]:
    own = weights.layout == "native"
    embedder = "x_embedder" if own else "all_x_embedder.2-1"
    dim, patch = weights.shape(f"{embedder}.weight")
    head = weights.shape(f"layers.0.attention.{'q_norm' if own else 'norm_q'}.weight")[0]
    # A quarter of a head's pairs tell the frame, the rest rows and columns; the file itself does not say.
    axes = [head // 4, head * 3 // 8, head * 3 // 8]
    if sum(axes) != head or any(axis % 2 for axis in axes):
        raise weights.error(f"heads of {head} channels are not Z-Image's (128) and the file does not say how positions split them")
    return shipped_config() | {
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
