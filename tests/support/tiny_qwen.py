"""Tiny random Qwen-Image and Krea 2 in real diffusers folders, with the tokenizer of its size."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Transformer2DModel, QwenImageTransformer2DModel
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLModel,
)

from byg_plugin.models import files
from tests.support.tiny import kept

TINY_QWEN = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
TINY_KREA2 = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "timestep_embed_dim": 16,
    "text_hidden_dim": 24,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 2,
    "text_intermediate_size": 32,
    "axes_dims_rope": (4, 6, 6),
}
VOCABULARY = 151_669
_LANGUAGE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "pad_token_id": 151643,
}
_EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 24}


def randomised(network: nn.Module, seed: int, std: float = 0.12) -> Any:
    """Weights of which none is zero, so that everything acts."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) * std
    return network.eval()


def tiny_qwen(seed: int = 0, **changes: Any) -> QwenImageTransformer2DModel:
    """A random transformer of two blocks."""
    return randomised(QwenImageTransformer2DModel(**(TINY_QWEN | changes)), seed)


def tiny_qwen_vae(seed: int = 1) -> AutoencoderKLQwenImage:
    """A random autoencoder with the published latent statistics."""
    torch.manual_seed(seed)
    return AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """The shipped one."""
    return files.shipped_tokenizer("qwen25_vl", 131_072)


def tiny_language_model(seed: int = 2) -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL of two layers, with eyes."""
    text = _LANGUAGE | {"num_hidden_layers": 2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=_EYES)).eval()


def write_qwen(folder: Path, **changes: Any) -> Path:
    """A diffusers folder with random weights of every part; `changes` to the transformer's configuration."""
    tiny_qwen(**changes).save_pretrained(folder / "transformer")
    tiny_qwen_vae().save_pretrained(folder / "vae")
    tiny_language_model().save_pretrained(folder / "text_encoder")
    qwen_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "QwenImagePipeline"}), encoding="utf-8")
    return folder


@lru_cache(maxsize=1)
def qwen_folder() -> Path:
    """One folder for the whole run; nobody may write into it."""
    return kept("tiny-qwen", write_qwen)


def tiny_krea2(seed: int = 0, **changes: Any) -> Krea2Transformer2DModel:
    """A random transformer of two blocks."""
    return randomised(Krea2Transformer2DModel(**(TINY_KREA2 | changes)), seed)


def tiny_qwen3_vl(seed: int = 2) -> Qwen3VLModel:
    """Qwen3-VL of 36 layers, with eyes."""
    text = _LANGUAGE | {"num_hidden_layers": 36, "head_dim": 12, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2]}}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 24,
        "deepstack_visual_indexes": [0],
    }
    torch.manual_seed(seed)
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


def write_krea2(folder: Path, **changes: Any) -> Path:
    """A diffusers folder with random weights of every part; `changes` to the transformer's configuration."""
    tiny_krea2(**changes).save_pretrained(folder / "transformer")
    tiny_qwen_vae().save_pretrained(folder / "vae")
    tiny_qwen3_vl().save_pretrained(folder / "text_encoder")
    qwen_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Krea2Pipeline"}), encoding="utf-8")
    return folder


@lru_cache(maxsize=1)
def krea2_folder() -> Path:
    """One folder for the whole run; nobody may write into it."""
    return kept("tiny-krea2", write_krea2)
