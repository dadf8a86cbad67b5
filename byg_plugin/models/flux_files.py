"""FLUX.1's frozen parts from what people have on disk, without a hub.

`path_or_id` (see `files.py`) is a diffusers folder, a hub id or one .safetensors file:

- transformer: Black Forest Labs' layout (`double_blocks.…`, bare or under `model.diffusion_model.`, also inside an
  all-in-one checkpoint) or diffusers' layout
- VAE: `ae.safetensors` (`decoder.up.0.…`; also under `vae.`) or diffusers' layout
- CLIP-L, T5-XXL: `clip_l.safetensors`, `t5xxl_*.safetensors`, or the copies inside an all-in-one checkpoint
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from byg_plugin.lora import flux_names
from byg_plugin.models import files, native
from byg_plugin.models.networks import Network

_BESIDE_CLIP = ("text_projection.weight", "position_ids")


# --- public: one function a part ---


def load_clip_l(path_or_id: str | Path, *, dtype: torch.dtype) -> tuple[CLIPTextModel, PreTrainedTokenizerBase]:
    """CLIP-L's text model in `dtype`, on the CPU, in eval mode, and its tokenizer.

    Raises:
        ValueError: nothing is at `path_or_id`, it is not CLIP-L, or the tokenizer does not fit its vocabulary.
    """
    file = files.single_file(path_or_id, "clip")
    if file is None:
        model = files.from_folder(CLIPTextModel, path_or_id, "clip", dtype=dtype)
    else:
        with files.Weights(file, "clip") as weights:
            config = CLIPTextConfig(**(files.config_beside(weights) or _clip_config(weights)))
            state = weights.all(dtype, skip=_BESIDE_CLIP)
            model = files.build(lambda: CLIPTextModel(config), state, weights, rename=_clip_names)
            # Not in the file (transformers keeps it out of checkpoints), so it is still on the meta device.
            body = getattr(model, "text_model", model)
            body.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    tokenizer = files.load_tokenizer(path_or_id, "clip", model.config.max_position_embeddings)
    return model.eval(), files.fitting(tokenizer, model.config.vocab_size, path_or_id)


def load_t5(path_or_id: str | Path, *, dtype: torch.dtype) -> tuple[T5EncoderModel, PreTrainedTokenizerBase]:
    """The T5 v1.1 encoder in `dtype`, on the CPU, in eval mode, and its tokenizer.

    Raises:
        ValueError: nothing is at `path_or_id`, it is not a T5 v1.1 encoder, or the tokenizer does not fit its vocabulary.
    """
    file = files.single_file(path_or_id, "t5")
    if file is None:
        model = files.from_folder(T5EncoderModel, path_or_id, "t5", dtype=dtype)
    else:
        with files.Weights(file, "t5") as weights:
            config = T5Config(**(files.config_beside(weights) or _t5_config(weights)))
            state = weights.all(dtype, skip=("decoder.",))
            model = files.build(lambda: T5EncoderModel(config), state, weights, rename=_t5_names)
    return model.eval(), files.fitting(files.load_tokenizer(path_or_id, "t5", 512), model.config.vocab_size, path_or_id)


def to_native_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers FLUX.1 state dict in Black Forest Labs' layout (the inverse of what the loader does)."""
    double = files.count_blocks(state, r"transformer_blocks\.(\d+)\.")
    single = files.count_blocks(state, r"single_transformer_blocks\.(\d+)\.")
    guidance = any("guidance_embedder" in name for name in state)
    return native.to_native(state, flux_names.linears(double, single, guidance), flux_names.norms(double, single))


def _transformer_state(weights: files.Weights, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    if weights.layout != "native":
        return weights.all(dtype)
    double, single = config["num_layers"], config["num_single_layers"]
    linears = flux_names.linears(double, single, config["guidance_embeds"])
    return native.read_native(weights, linears, flux_names.norms(double, single), dtype, kinds=("weight", "bias"))


def _vae_state(weights: files.Weights, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    state = weights.all(dtype)
    return convert_ldm_vae_checkpoint(state, config) if weights.layout == "native" else state


# --- configurations from shapes ---


def _transformer_config(weights: files.Weights) -> dict[str, Any]:
    own = weights.layout == "native"
    stem = "" if own else "transformer_"
    guidance = "guidance_in.in_layer" if own else "time_text_embed.guidance_embedder.linear_1"

    def shape(linear: str) -> tuple[int, ...]:
        found = flux_names.find_native(linear)
        assert found is not None, linear
        return weights.shape((found.native if own else found.parts[0]) + ".weight")

    width, in_channels = shape("img_in")
    norm = native.saved_name(weights, "double_blocks.0.img_attn.norm.query_norm.scale")
    head = weights.shape(norm if own else "transformer_blocks.0.attn.norm_q.weight")[0]
    out_channels = shape("final_layer.linear")[0]
    return files.shipped_config("flux_dev/transformer") | {
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": files.count_blocks(weights.names, rf"{stem or 'double_'}blocks\.(\d+)\."),
        "num_single_layers": files.count_blocks(weights.names, rf"single_{stem}blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape("txt_in")[1],
        "pooled_projection_dim": shape("vector_in.in_layer")[1],
        "guidance_embeds": f"{guidance}.weight" in weights.names,
        "axes_dims_rope": _rope_axes(head, weights.path),
    }


def _rope_axes(head: int, path: Path) -> list[int]:
    """FLUX.1's split 16 : 56 : 56 of a head's channels; the file itself does not tell."""
    axes = [head // 8, head * 7 // 16, head * 7 // 16]
    if sum(axes) != head or any(axis % 2 for axis in axes):
        raise ValueError(
            f"{path}: heads of {head} channels are not FLUX.1's (128) and the file does not say how positions "
            "split them; give a diffusers folder, whose config.json does"
        )
    return axes


def _refuse_unscaled(config: Any, path_or_id: str | Path) -> None:
    for name in ("scaling_factor", "shift_factor"):
        if not isinstance(config[name], int | float):
            raise ValueError(
                f"{path_or_id}: the vae's {name} is {config[name]}, no number, so it is not FLUX.1's; use {files.PARTS['vae'].suggested}"
            )


def _refuse_extra_channels(config: Any, path_or_id: str | Path) -> None:
    if config.out_channels not in (None, config.in_channels):
        raise ValueError(
            f"{path_or_id}: takes {config.in_channels} channels and returns {config.out_channels}, so it looks like FLUX.1 "
            "Fill, Depth or Canny, whose extra input is not supplied here; use FLUX.1-dev or FLUX.1-Kontext-dev"
        )


def _vae_config(weights: files.Weights) -> dict[str, Any]:
    if weights.layout != "native":
        raise weights.error("diffusers' layout without its config.json beside it")
    if any(re.match(r"(post_)?quant_conv\.", name) for name in weights.names):
        raise weights.error("has quantisation convolutions, so it looks like a Stable Diffusion VAE")
    blocks = files.count_blocks(weights.names, r"encoder\.down\.(\d+)\.")
    widths = [weights.shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(blocks)]
    latent = weights.shape("decoder.conv_in.weight")[1]
    if latent != 16:
        raise weights.error(f"a VAE of {latent} latent channels, FLUX.1 has 16")
    return files.shipped_config("flux_dev/vae") | {
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "block_out_channels": widths,
        "layers_per_block": files.count_blocks(weights.names, r"encoder\.down\.0\.block\.(\d+)\."),
        "in_channels": weights.shape("encoder.conv_in.weight")[1],
        "out_channels": weights.shape("decoder.conv_out.weight")[0],
    }


def _clip_config(weights: files.Weights) -> dict[str, Any]:
    body = "text_model." if weights.layout == "native" else ""
    vocabulary, width = weights.shape(f"{body}embeddings.token_embedding.weight")
    if width == 1280 or width % 64:
        raise weights.error(f"a text encoder of width {width}, CLIP-L has 768 (CLIP-G: 1280)")
    return files.shipped_config("flux_dev/clip_l") | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": weights.shape(f"{body}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": files.count_blocks(weights.names, re.escape(body) + r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": weights.shape(f"{body}embeddings.position_embedding.weight")[0],
    }


def _t5_config(weights: files.Weights) -> dict[str, Any]:
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    if bias.format(1) in weights.names:
        raise weights.error("a position bias in every block, so it looks like UMT5 (Wan's text encoder)")
    if "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" not in weights.names:
        raise weights.error("feed-forward layers without gate, so it looks like T5 v1.0")
    buckets, heads = weights.shape(bias.format(0))
    inner, width = weights.shape("encoder.block.0.layer.0.SelfAttention.q.weight")
    embedding = "shared.weight" if "shared.weight" in weights.names else "encoder.embed_tokens.weight"
    return files.shipped_config("flux_dev/t5_xxl") | {
        "vocab_size": weights.shape(embedding)[0],
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": weights.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": files.count_blocks(weights.names, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


# --- building ---


def _clip_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names with or without `text_model.`, as this version of transformers has them."""
    body = "text_model." if hasattr(model, "text_model") else ""
    return {body + name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _t5_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """One embedding under its two names; files hold either or both."""
    names = ("shared.weight", "encoder.embed_tokens.weight")
    embedding = next(state[name] for name in names if name in state)
    return state | dict.fromkeys((name for name in names if name in model.state_dict()), embedding)


# --- the networks ---

TRANSFORMER = Network(
    name="FluxTransformer2DModel",
    part="transformer",
    config=_transformer_config,
    state=_transformer_state,
    check=_refuse_extra_channels,
)
"""A file without `guidance_in` (schnell) gives a model with `config.guidance_embeds` False."""
VAE = Network(name="AutoencoderKL", part="vae", config=_vae_config, state=_vae_state, check=_refuse_unscaled)
"""A single file carries no latent scale: FLUX.1's (0.3611, shift 0.1159) is assumed.

SD3's autoencoder has the same shapes and would be taken for it.
"""
