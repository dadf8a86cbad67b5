"""FLUX.2 klein's transformer and autoencoder from what people have on disk, without a hub.

`path_or_id` (see `files.py`) is a diffusers folder, a hub id or one .safetensors file:

- transformer: Black Forest Labs' layout (`double_blocks.…`, bare or under `model.diffusion_model.`) or diffusers' layout
- VAE: Black Forest Labs' layout (`decoder.up.0.…` with `bn.running_mean`) or diffusers' layout
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor

from byg_plugin.lora import flux2_names
from byg_plugin.models import files, native
from byg_plugin.models.networks import Network


def to_native_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers FLUX.2 state dict in Black Forest Labs' layout (the inverse of what the loader does)."""
    double = files.count_blocks(state, r"transformer_blocks\.(\d+)\.")
    single = files.count_blocks(state, r"single_transformer_blocks\.(\d+)\.")
    return native.to_native(state, flux2_names.NAMES.linears(_blocks(double, single)), flux2_names.norms(double, single))


def _blocks(double: int, single: int) -> dict[str, int]:
    return {"double_blocks.": double, "single_blocks.": single}


def _transformer_state(weights: files.Weights, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    if weights.layout != "native":
        return weights.all(dtype)
    double, single = config["num_layers"], config["num_single_layers"]
    linears = flux2_names.NAMES.linears(_blocks(double, single))
    return native.read_native(weights, linears, flux2_names.norms(double, single), dtype, kinds=("weight",))


def _transformer_config(weights: files.Weights) -> dict[str, Any]:
    own = weights.layout == "native"

    def shape(linear: str) -> tuple[int, ...]:
        found = flux2_names.NAMES.find_native(linear)
        assert found is not None, linear
        return weights.shape((found.native if own else found.parts[0]) + ".weight")

    if any("guidance_in." in name or "guidance_embedder." in name for name in weights.names):
        raise weights.error("has a guidance embedding, so it looks like FLUX.2 dev, whose text encoder is not supplied here")
    width, in_channels = shape("img_in")
    norm = native.saved_name(weights, "double_blocks.0.img_attn.norm.query_norm.scale")
    head = weights.shape(norm if own else "transformer_blocks.0.attn.norm_q.weight")[0]
    if head % 8:
        raise weights.error(f"heads of {head} channels, which do not split into 4 axes of pairs")
    stem = "" if own else "transformer_"
    return files.shipped_config("flux2/transformer") | {
        "in_channels": in_channels,
        "num_layers": files.count_blocks(weights.names, rf"{stem or 'double_'}blocks\.(\d+)\."),
        "num_single_layers": files.count_blocks(weights.names, rf"single_{stem}blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape("txt_in")[1],
        "timestep_guidance_channels": shape("time_in.in_layer")[1],
        "mlp_ratio": shape("double_blocks.0.img_mlp.2")[1] / width,
        "axes_dims_rope": [head // 4] * 4,
    }


def _refuse_guidance(config: Any, path_or_id: str | Path) -> None:
    if config.guidance_embeds:
        raise ValueError(f"{path_or_id}: has a guidance embedding, so it looks like FLUX.2 dev; use FLUX.2 klein base")


TRANSFORMER = Network(
    name="Flux2Transformer2DModel",
    part="flux2_transformer",
    config=_transformer_config,
    state=_transformer_state,
    check=_refuse_guidance,
    text_width="joint_attention_dim",
)


# --- the autoencoder ---

_COUNTER = "bn.num_batches_tracked"  # of no use after training, and no floating point number
_QUANT = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}


def _vae_state(weights: files.Weights, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    state = weights.all(dtype, skip=(_COUNTER,))
    if weights.layout == "native":
        state = _vae_names(state, config)
    return state | {_COUNTER: torch.zeros((), dtype=torch.long)}


def _vae_names(state: dict[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """diffusers' names of a VAE with Black Forest Labs' own."""
    flat = {}
    for name, tensor in state.items():
        start = next((start for start in _QUANT if name.startswith(start)), "")
        flat[_QUANT.get(start, "") + name.removeprefix(start)] = tensor
    statistics = {name: tensor for name, tensor in flat.items() if name.startswith("bn.")}
    return convert_ldm_vae_checkpoint({name: tensor for name, tensor in flat.items() if name not in statistics}, config) | statistics


def _vae_config(weights: files.Weights) -> dict[str, Any]:
    own = weights.layout == "native"
    down, block, up = ("down", "block", "decoder.up.{}.block.0") if own else ("down_blocks", "resnets", "decoder.up_blocks.{}.resnets.0")
    levels = files.count_blocks(weights.names, rf"encoder\.{down}\.(\d+)\.")
    if "bn.running_mean" not in weights.names:
        raise weights.error("has no bn.running_mean, the statistics of the latents, so it looks like another VAE")
    order = range(levels) if own else reversed(range(levels))
    return files.shipped_config("flux2/vae") | {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [weights.shape(f"encoder.{down}.{i}.{block}.0.conv1.weight")[0] for i in range(levels)],
        "decoder_block_out_channels": [weights.shape(f"{up.format(i)}.conv1.weight")[0] for i in order],
        "layers_per_block": files.count_blocks(weights.names, rf"encoder\.{down}\.0\.{block}\.(\d+)\."),
        "latent_channels": weights.shape("decoder.conv_in.weight")[1],
    }


VAE = Network(name="AutoencoderKLFlux2", part="flux2_vae", config=_vae_config, state=_vae_state)
