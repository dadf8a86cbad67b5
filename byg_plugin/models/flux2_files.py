"""FLUX.2 klein's transformer and autoencoder from what people have on disk, without a hub.

`path_or_id` (see `files.py`) is a diffusers folder, a hub id or one .safetensors file:

- transformer: Black Forest Labs' layout (`double_blocks.…`, bare or under `model.diffusion_model.`) or diffusers' layout
- VAE: Black Forest Labs' layout (`decoder.up.0.…` with `bn.running_mean`) or diffusers' layout

The classes are newer than the oldest diffusers that other families take: they are imported where they are used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor, nn

from byg_plugin.lora import flux2_names
from byg_plugin.models import files, native

_TRANSFORMER, _VAE = "flux2_transformer", "flux2_vae"


def load_transformer(path_or_id: str | Path, *, dtype: torch.dtype) -> nn.Module:
    """The transformer in `dtype`, on the CPU, in eval mode.

    Raises:
        ValueError: nothing is at `path_or_id`, or it is not FLUX.2 klein.
    """
    from diffusers import Flux2Transformer2DModel

    file = files.single_file(path_or_id, _TRANSFORMER)
    if file is None:
        model = files.from_folder(Flux2Transformer2DModel, path_or_id, _TRANSFORMER, torch_dtype=dtype)
    else:
        with files.Weights(file, _TRANSFORMER) as weights:
            config = files.config_beside(weights) or _transformer_config(weights)
            state = _native_state(weights, config, dtype) if weights.layout == "native" else weights.all(dtype)
            model = files.build(lambda: Flux2Transformer2DModel.from_config(config), state, weights)
    _refuse_guidance(model.config, path_or_id)
    return cast(nn.Module, model).eval()


def transformer_on_meta(path_or_id: str | Path) -> nn.Module:
    """The transformer that `load_transformer` would load, on the meta device: names and shapes, no weights read.

    Raises:
        ValueError: as `load_transformer`, as far as configuration or header tell.
    """
    from diffusers import Flux2Transformer2DModel

    config = files.config_only(path_or_id, _TRANSFORMER, Flux2Transformer2DModel, _transformer_config)
    with torch.device("meta"):
        model = Flux2Transformer2DModel.from_config(config)
    _refuse_guidance(model.config, path_or_id)
    return cast(nn.Module, model).eval()


def load_vae(path_or_id: str | Path, *, dtype: torch.dtype) -> nn.Module:
    """FLUX.2's autoencoder in `dtype`, on the CPU, in eval mode.

    Raises:
        ValueError: nothing is at `path_or_id`, or it is not FLUX.2's.
    """
    from diffusers import AutoencoderKLFlux2

    file = files.single_file(path_or_id, _VAE)
    if file is None:
        return cast(nn.Module, files.from_folder(AutoencoderKLFlux2, path_or_id, _VAE, torch_dtype=dtype)).eval()
    with files.Weights(file, _VAE) as weights:
        config = files.config_beside(weights) or _vae_config(weights)
        state = weights.all(dtype, skip=(_COUNTER,))
        if weights.layout == "native":
            state = _vae_names(state, config)
        state[_COUNTER] = torch.zeros((), dtype=torch.long)
        return cast(nn.Module, files.build(lambda: AutoencoderKLFlux2.from_config(config), state, weights)).eval()


def vae_downsampling(path_or_id: str | Path) -> int:
    """Pixels that a side of the VAE's own latents stands for (8), from the configuration or a file's header; reads no weights.

    Raises:
        ValueError: nothing is at `path_or_id`, or it is not FLUX.2's autoencoder.
    """
    from diffusers import AutoencoderKLFlux2

    config = files.config_only(path_or_id, _VAE, AutoencoderKLFlux2, _vae_config)
    return 2 ** (len(config["block_out_channels"]) - 1)


def shipped_config(name: str) -> dict[str, Any]:
    """FLUX.2's configuration of `transformer` (the 4B's) or `vae`."""
    return json.loads((files.assets() / "flux2" / f"{name}.json").read_text(encoding="utf-8"))


def to_native_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers FLUX.2 state dict in Black Forest Labs' layout (the inverse of what the loader does)."""
    double = files.count_blocks(state, r"transformer_blocks\.(\d+)\.")
    single = files.count_blocks(state, r"single_transformer_blocks\.(\d+)\.")
    return native.to_native(state, flux2_names.NAMES.linears(_blocks(double, single)), flux2_names.norms(double, single))


def _blocks(double: int, single: int) -> dict[str, int]:
    return {"double_blocks.": double, "single_blocks.": single}


def _native_state(weights: files.Weights, config: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
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
    head = weights.shape("double_blocks.0.img_attn.norm.query_norm.scale" if own else "transformer_blocks.0.attn.norm_q.weight")[0]
    if head % 8:
        raise weights.error(f"heads of {head} channels, which do not split into 4 axes of pairs")
    stem = "" if own else "transformer_"
    return shipped_config("transformer") | {
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


# --- the autoencoder ---

_COUNTER = "bn.num_batches_tracked"  # of no use after training, and no floating point number
_QUANT = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}


def _vae_names(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
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
    return shipped_config("vae") | {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [weights.shape(f"encoder.{down}.{i}.{block}.0.conv1.weight")[0] for i in range(levels)],
        "decoder_block_out_channels": [weights.shape(f"{up.format(i)}.conv1.weight")[0] for i in order],
        "layers_per_block": files.count_blocks(weights.names, rf"encoder\.{down}\.0\.{block}\.(\d+)\."),
        "latent_channels": weights.shape("decoder.conv_in.weight")[1],
    }
