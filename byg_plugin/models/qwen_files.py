"""The frozen parts of Qwen-Image and Krea 2, and every family's Qwen text encoder, from what people have on disk, without a hub.

`path_or_id` (see `files.py`) is a diffusers folder, a hub id or one .safetensors file:

- transformer: Qwen-Image's names (which are diffusers' too), Krea 2's own names (`blocks.0.attn.wq…`) or diffusers', bare or under
  `model.diffusion_model.`, also fp8 and scaled fp8
- VAE: `qwen_image_vae.safetensors` (Wan's names, `decoder.middle.0.…`) or diffusers' layout. Wan2.1's VAE has the same shapes and
  would be taken for it
- text encoder: `qwen_2.5_vl_7b*.safetensors` and Qwen3-VL 4B's, of which only the language model is read, and `qwen_3_*.safetensors`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from byg_plugin.lora import krea2_layout
from byg_plugin.models import files, wan_files
from byg_plugin.models.networks import Network

_HEAD = 128  # channels of a head of every Qwen; those of a narrower model (tests) are named by its config.json


# --- transformers ---


def _qwen_config(weights: files.Weights) -> dict[str, Any]:
    for foreign, what in (("__index_timestep_zero__", "Qwen-Image-Edit-2511"), ("time_text_embed.addition_t_embedding.weight", "Layered")):
        if foreign in weights.names:
            raise weights.error(f"has {foreign}, so it looks like {what}, whose input is not supplied here")
    width, channels = weights.shape("img_in.weight")
    head = weights.shape("transformer_blocks.0.attn.norm_q.weight")[0]
    return {
        "in_channels": channels,
        "out_channels": weights.shape("proj_out.weight")[0] // 4,
        "num_layers": files.count_blocks(weights.names, r"transformer_blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": weights.shape("txt_in.weight")[1],
        "axes_dims_rope": [head // 8, head * 7 // 16, head * 7 // 16],
    }


def _krea2_config(weights: files.Weights) -> dict[str, Any]:
    own = weights.layout == "native"
    names = dict(krea2_layout.tensors(1))

    def shape(native: str) -> tuple[int, ...]:
        return weights.shape(native if own else names[native])

    width, channels = shape("first.weight")
    head = shape("blocks.0.attn.qknorm.qnorm.scale")[0]
    fusion = "txtfusion.layerwise_blocks.0."
    text_head = shape(f"{fusion}attn.qknorm.qnorm.scale")[0]
    sixth = 6 * (head // 16)
    return {
        "in_channels": channels,
        "num_layers": files.count_blocks(weights.names, rf"{'' if own else 'transformer_'}blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "num_key_value_heads": shape("blocks.0.attn.wk.weight")[0] // head,
        "intermediate_size": shape("blocks.0.mlp.gate.weight")[0],
        "timestep_embed_dim": shape("tmlp.0.weight")[1],
        "text_hidden_dim": shape("txtmlp.1.weight")[1],
        "num_text_layers": shape("txtfusion.projector.weight")[1],
        "text_num_attention_heads": shape(f"{fusion}attn.wq.weight")[0] // text_head,
        "text_num_key_value_heads": shape(f"{fusion}attn.wk.weight")[0] // text_head,
        "text_intermediate_size": shape(f"{fusion}mlp.gate.weight")[0],
        "axes_dims_rope": [head - 2 * sixth, sixth, sixth],
    }


def to_native_krea2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers Krea 2 state dict under Krea's own names (the inverse of what the loader does)."""
    blocks = files.count_blocks(state, r"transformer_blocks\.(\d+)\.")
    native = {own: state[theirs] for own, theirs in krea2_layout.tensors(blocks) if theirs in state}
    return {name: tensor.flatten() if name.endswith(".mod.lin") else tensor for name, tensor in native.items()}


def _krea2_state(weights: files.Weights, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    names = dict(krea2_layout.tensors(config["num_layers"])) if weights.layout == "native" else {}
    # Names that the network does not have are refused where it is built.
    found = {name: names.get(name, name) for name in sorted(weights.names) if not files.is_beside(name, files.BESIDE)}
    state = {ours: weights.read(native, _krea2_dtype(ours, dtype)) for native, ours in found.items()}
    # Krea 2's own modulation is one row.
    width = len(state["img_in.weight"])
    return {name: tensor.reshape(-1, width) if name.endswith("scale_shift_table") else tensor for name, tensor in state.items()}


def _krea2_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return dtype if _KREA2_FLOAT32.isdisjoint(name.split(".")) else torch.float32


_KREA2_FLOAT32 = frozenset({"norm", "norm1", "norm2", "norm_q", "norm_k"})  # as diffusers keeps them
# What other checkpoints of Qwen-Image's class set: inputs that are not supplied here.
_OTHER_INPUTS = {
    "guidance_embeds": "a distilled Qwen-Image with a guidance embedding",
    "zero_cond_t": "Qwen-Image-Edit-2511",
    "use_additional_t_cond": "Qwen-Image-Layered",
    "use_layer3d_rope": "Qwen-Image-Layered",
}


def _refuse_other_inputs(config: Any, path_or_id: str | Path) -> None:
    found = [(key, what) for key, what in _OTHER_INPUTS.items() if config.get(key)]
    if config["in_channels"] != 4 * config["out_channels"]:
        found.append(("in_channels", "a model with extra channels"))
    for key, what in found:
        raise ValueError(f"{path_or_id}: {key} = {config[key]}: looks like {what}, whose input is not supplied here; use Qwen-Image")


QWEN_IMAGE = Network(
    name="QwenImageTransformer2DModel",
    part="qwen_transformer",
    config=_qwen_config,
    state=lambda weights, config, dtype: weights.all(dtype),
    check=_refuse_other_inputs,
    text_width="joint_attention_dim",
)
KREA2 = Network(
    name="Krea2Transformer2DModel", part="krea2_transformer", config=_krea2_config, state=_krea2_state, text_width="text_hidden_dim"
)


# --- the autoencoder ---


def _vae_config(weights: files.Weights) -> dict[str, Any]:
    """The class's own values, which are the published ones, at the file's width."""
    if weights.layout != "native":
        raise weights.error("diffusers' layout without its config.json beside it")
    if (latent := weights.shape("conv2.weight")[0]) != 16:
        raise weights.error(f"a VAE of {latent} latent channels, Qwen-Image's has 16")
    return {"base_dim": weights.shape("encoder.conv1.weight")[0]}


VAE = Network(name="AutoencoderKLQwenImage", part="qwen_vae", config=_vae_config, state=wan_files.vae_state)


# --- text encoders ---


@dataclass(frozen=True)
class _Language:
    """A language model by itself: classes of transformers, and the shipped configuration."""

    model: str
    config: str
    shipped: str


_LANGUAGES = {
    "qwen25_vl": _Language("Qwen2_5_VLTextModel", "Qwen2_5_VLTextConfig", "qwen/qwen25_vl"),
    "qwen3_vl": _Language("Qwen3VLTextModel", "Qwen3VLTextConfig", "qwen/qwen3_vl"),
    "qwen3": _Language("Qwen3Model", "Qwen3Config", "qwen3/qwen3_4b"),
}


def load_text_encoder(kind: Any, path_or_id: str | Path, part: str, *, dtype: torch.dtype) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A language model in `dtype`, on the CPU, in eval mode, and its tokenizer; of a class of transformers that also sees, it alone.

    Raises:
        ValueError: nothing is at `path_or_id`, it is another model, or the tokenizer does not fit its vocabulary.
    """
    file = files.single_file(path_or_id, part)
    if file is None:
        whole = files.from_folder(kind, path_or_id, part, dtype=dtype)
        model = getattr(whole, "model", whole)
        model = getattr(model, "language_model", model)
    else:
        model = _language_model(file, part, dtype)
    tokenizer = files.load_tokenizer(path_or_id, part, model.config.max_position_embeddings)
    return model.eval(), files.fitting(tokenizer, model.config.vocab_size, path_or_id)


def _language_model(file: Path, part: str, dtype: torch.dtype) -> nn.Module:
    import transformers

    language = _LANGUAGES[part]
    with files.Weights(file, part) as weights:
        _refuse_the_twin(weights)
        config = getattr(transformers, language.config)(**_language_config(weights, language))
        state = weights.all(dtype, skip=("visual.", "lm_head."))
        model = files.build(lambda: getattr(transformers, language.model)(config), state, weights)
    # Its frequencies are in no checkpoint, so a model that was built on the meta device has none yet.
    model.rotary_emb = type(model.rotary_emb)(config=config)
    return cast(nn.Module, model)


def _refuse_the_twin(weights: files.Weights) -> None:
    """Qwen3 4B and the language model of Qwen3-VL 4B have the same names and shapes: what lies beside it tells them apart."""
    if weights.part == "qwen3" and weights.sees:
        raise weights.error("has a vision tower, so it looks like Qwen3-VL")
    if weights.part == "qwen3_vl" and not (weights.sees or "language_model." in weights.prefix):
        raise weights.error("has no vision tower, so it looks like Qwen3, whose texts are others")


def _language_config(weights: files.Weights, language: _Language) -> dict[str, Any]:
    vocabulary, width = weights.shape("embed_tokens.weight")
    layer = "layers.0."
    return files.shipped_config(language.shipped) | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": weights.shape(f"{layer}mlp.gate_proj.weight")[0],
        "num_hidden_layers": files.count_blocks(weights.names, r"layers\.(\d+)\."),
        "num_attention_heads": weights.shape(f"{layer}self_attn.q_proj.weight")[0] // _HEAD,
        "num_key_value_heads": weights.shape(f"{layer}self_attn.k_proj.weight")[0] // _HEAD,
    }
