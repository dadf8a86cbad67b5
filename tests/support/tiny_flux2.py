"""A tiny random FLUX.2 klein of the real classes in a real diffusers folder, and the Qwen3 that Z-Image has too."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from byg_plugin.models import files
from tests.support.tiny import kept
from tests.support.tiny_qwen import randomised

TINY_FLUX2: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 3 * 16,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
SCHEDULER = {"use_dynamic_shifting": True, "shift": 3.0}
# As Qwen3's own template treats a turn of the user.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def tiny_flux2(seed: int = 0, **changes: Any) -> Flux2Transformer2DModel:
    """A random transformer of two blocks of each kind."""
    return randomised(Flux2Transformer2DModel(**(TINY_FLUX2 | changes)), seed, std=0.15)


def tiny_flux2_vae(seed: int = 1, **changes: Any) -> AutoencoderKLFlux2:
    """A random autoencoder whose latents have statistics that are no others'."""
    torch.manual_seed(seed)
    shape = {"block_out_channels": (4, 4, 4, 8), "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 64}
    vae = AutoencoderKLFlux2(**(shape | changes))
    vae.bn.running_mean.normal_(std=0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval()


def qwen3_tokenizer() -> PreTrainedTokenizerBase:
    """The shipped one, with a chat template for the pipelines."""
    tokenizer = files.shipped_tokenizer("qwen3", 40_960)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_qwen3(seed: int = 2, layers: int = 30) -> Qwen3ForCausalLM:
    """A random Qwen3, deep enough for the layers that FLUX.2 takes."""
    config = Qwen3Config(
        vocab_size=151_669,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config).eval()


def write_qwen3(folder: Path, **changes: Any) -> None:
    """The text encoder and its tokenizer of a diffusers folder."""
    tiny_qwen3(**changes).save_pretrained(folder / "text_encoder")
    qwen3_tokenizer().save_pretrained(folder / "tokenizer")


def write_flux2(folder: Path, **changes: Any) -> Path:
    """A diffusers folder with random weights of every part; `changes` to the transformer's configuration."""
    tiny_flux2(**changes).save_pretrained(folder / "transformer")
    tiny_flux2_vae().save_pretrained(folder / "vae")
    write_qwen3(folder)
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index = {"_class_name": "Flux2KleinPipeline", "is_distilled": False}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@lru_cache(maxsize=1)
def flux2_folder() -> Path:
    """One folder for the whole run; nobody may write into it."""
    return kept("tiny-flux2", write_flux2)
