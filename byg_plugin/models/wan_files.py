"""Wan's frozen parts from what people have on disk, without a hub.

`path_or_id` (see `files.py`) is a diffusers folder, a hub id or one .safetensors file:

- transformer: Wan's own names (`blocks.0.self_attn.…`, bare or under `model.diffusion_model.`), also fp8 and scaled fp8,
  or diffusers' names. Wan2.2-A14B has one file an expert
- VAE: `wan_2.1_vae.safetensors`, the 5B's `wan2.2_vae.safetensors` (both `decoder.middle.0.…`), or diffusers' names
- UMT5-XXL: `umt5_xxl_*.safetensors` (Hugging Face names)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from byg_plugin.lora import wan_names
from byg_plugin.models import files
from byg_plugin.models.networks import Network

# What diffusers keeps in float32 too: Wan computes time embedding, norms and modulation so.
_FLOAT32 = ("time_embedder", "scale_shift_table", "norm2.")
_HEAD = 128  # channels of a head of every Wan; heads of a narrower network (tests) are named by its config.json


def load_umt5(path_or_id: str | Path, *, dtype: torch.dtype) -> tuple[UMT5EncoderModel, PreTrainedTokenizerBase]:
    """The UMT5 encoder in `dtype`, on the CPU, in eval mode, and its tokenizer.

    Raises:
        ValueError: nothing is at `path_or_id`, it is not a UMT5 encoder, or the tokenizer does not fit its vocabulary.
    """
    file = files.single_file(path_or_id, "umt5")
    if file is None:
        model = files.from_folder(UMT5EncoderModel, path_or_id, "umt5", dtype=dtype)
    else:
        with files.Weights(file, "umt5") as weights:
            config = UMT5Config(**(files.config_beside(weights) or _umt5_config(weights)))
            state = weights.all(dtype, skip=("decoder.",))
            model = files.build(lambda: UMT5EncoderModel(config), state, weights, rename=_umt5_names)
    return model.eval(), files.fitting(files.load_tokenizer(path_or_id, "umt5", 512), model.config.vocab_size, path_or_id)


def to_native_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers Wan state dict under Wan's own names (the inverse of what the loader does)."""
    blocks = files.count_blocks(state, r"blocks\.(\d+)\.")
    return {native: state[ours] for native, ours in wan_names.tensors(blocks) if ours in state}


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if any(word in name for word in _FLOAT32) else dtype


def _transformer_state(weights: files.Weights, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """In `dtype`, but for time embedding, norms and modulation, which are in float32."""
    return _native(weights, config, dtype) if weights.layout == "native" else _own(weights, dtype)


def _native(weights: files.Weights, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    names = dict(wan_names.tensors(config["num_layers"]))
    unknown = sorted(name for name in weights.names - names.keys() if not files.is_beside(name, files.BESIDE))
    if unknown:
        raise weights.error(f"has {len(unknown)} tensors that a Wan text-to-video transformer does not have, such as {unknown[:3]}")
    return {ours: weights.read(native, _dtype_of(ours, dtype)) for native, ours in names.items()}


def _own(weights: files.Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    names = [name for name in sorted(weights.names) if not files.is_beside(name, files.BESIDE)]
    return {name: weights.read(name, _dtype_of(name, dtype)) for name in names}


def _fill_rope(model: nn.Module) -> None:
    """The rotation tables are in no checkpoint, so a model that was built on the meta device has none yet."""
    config = model.config
    model.rope = type(model.rope)(config.attention_head_dim, tuple(config.patch_size), config.rope_max_seq_len)


def _transformer_config(weights: files.Weights) -> dict[str, Any]:
    names = dict(wan_names.tensors(1)) if weights.layout == "diffusers" else {}

    def shape(native: str) -> tuple[int, ...]:
        return weights.shape(names.get(native, native))

    for foreign, what in (("img_emb.proj.0.weight", "image-to-video"), ("vace_patch_embedding.weight", "VACE"), ("ref_conv.weight", "Fun")):
        if foreign in weights.names:
            raise weights.error(f"a Wan {what} transformer, whose extra input is not supplied here")
    width, in_channels, *patch = shape("patch_embedding.weight")
    if width % _HEAD:
        raise weights.error(f"a transformer of width {width}, which heads of {_HEAD} channels do not divide")
    return files.shipped_config("wan/transformer") | {
        "patch_size": patch,
        "num_attention_heads": width // _HEAD,
        "in_channels": in_channels,
        "out_channels": shape("head.head.weight")[0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": shape("text_embedding.0.weight")[1],
        "freq_dim": shape("time_embedding.0.weight")[1],
        "ffn_dim": shape("blocks.0.ffn.0.weight")[0],
        "num_layers": files.count_blocks(weights.names, r"blocks\.(\d+)\."),
        "cross_attn_norm": names.get("blocks.0.norm3.weight", "blocks.0.norm3.weight") in weights.names,
    }


def _refuse_other_inputs(config: Any, path_or_id: str | Path) -> None:
    if config.image_dim is not None or config.added_kv_proj_dim is not None or config.in_channels != config.out_channels:
        raise ValueError(
            f"{path_or_id}: takes {config.in_channels} channels and returns {config.out_channels}, so it looks like Wan image-to-video, "
            "whose image input is not supplied here; use a text-to-video model"
        )


def _vae_config(weights: files.Weights) -> dict[str, Any]:
    if weights.layout != "native":
        raise weights.error("diffusers' layout without its config.json beside it")
    widths = {"base_dim": weights.shape("encoder.conv1.weight")[0]}
    match weights.shape("conv2.weight")[0]:
        case 16:
            return files.shipped_config("wan/vae") | widths
        case 48:
            return files.shipped_config("wan/vae_5b") | widths | {"decoder_base_dim": weights.shape("decoder.head.2.weight")[1]}
        case latent:
            raise weights.error(f"a VAE of {latent} latent channels (Wan2.1's has 16, the Wan2.2 5B's 48)")


# The 5B's VAE groups a level's blocks: the converter of diffusers knows Wan2.1's flat numbering alone.
_LEVEL = re.compile(r"^(?:en|de)coder\.(down|up)samples\.(\d+)\.\1samples\.(\d+)\.(.+)\.(\w+)$")
_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2", "shortcut": "conv_shortcut"}


def _vae_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names of a VAE with Wan's own."""
    levels, flat = {}, {}
    for name, tensor in state.items():
        if match := _LEVEL.match(name):
            way, level, block, module, kind = match.groups()
            coder = f"{'encoder' if way == 'down' else 'decoder'}.{way}_blocks.{level}"
            inner = f"resnets.{block}.{_RESIDUAL[module]}" if module in _RESIDUAL else f"{way}sampler.{module}"
            levels[f"{coder}.{inner}.{kind}"] = tensor
        else:
            flat[name] = tensor
    return levels | convert_wan_vae_to_diffusers(flat)


def vae_state(weights: files.Weights, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """See `Network.state`."""
    state = weights.all(dtype)
    return _vae_names(state) if weights.layout == "native" else state


TRANSFORMER = Network(
    name="WanTransformer3DModel",
    part="wan_transformer",
    config=_transformer_config,
    state=_transformer_state,
    check=_refuse_other_inputs,
    finish=_fill_rope,
)
LOW_NOISE = replace(TRANSFORMER, part="wan_transformer_2")
"""The second expert: of a diffusers root, its `transformer_2`."""
VAE = Network(name="AutoencoderKLWan", part="wan_vae", config=_vae_config, state=vae_state)


def _umt5_config(weights: files.Weights) -> dict[str, Any]:
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    if bias.format(1) not in weights.names:
        raise weights.error("a position bias in the first block only, so it looks like T5 (FLUX's text encoder)")
    buckets, heads = weights.shape(bias.format(0))
    inner, width = weights.shape("encoder.block.0.layer.0.SelfAttention.q.weight")
    embedding = "shared.weight" if "shared.weight" in weights.names else "encoder.embed_tokens.weight"
    return files.shipped_config("wan/umt5_xxl") | {
        "vocab_size": weights.shape(embedding)[0],
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": weights.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": files.count_blocks(weights.names, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


def _umt5_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """One embedding under its two names; files hold either or both."""
    names = ("shared.weight", "encoder.embed_tokens.weight")
    embedding = next(state[name] for name in names if name in state)
    return state | dict.fromkeys((name for name in names if name in model.state_dict()), embedding)
