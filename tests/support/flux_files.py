"""FLUX.1's files in tiny."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from byg_plugin.models import files, flux_files

BF16, F32 = torch.bfloat16, torch.float32


def tiny_flux(guidance: bool = True, **changes: object) -> FluxTransformer2DModel:
    """A random two-plus-three-block FLUX with heads of 32 channels, which split like FLUX.1's 128."""
    torch.manual_seed(0)
    options = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "guidance_embeds": guidance,
        "axes_dims_rope": (4, 14, 14),
    }
    return FluxTransformer2DModel(**(options | changes)).eval()


@torch.no_grad()
def flux_output(model: FluxTransformer2DModel) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.zeros(6), torch.arange(6) // 3, torch.arange(6) % 3], dim=1).float()
    return model(
        hidden_states=torch.randn(2, 6, 16, generator=g),
        timestep=torch.tensor([0.3, 0.8]),
        guidance=torch.tensor([3.5, 2.0]) if model.config.guidance_embeds else None,
        encoder_hidden_states=torch.randn(2, 5, 24, generator=g),
        pooled_projections=torch.randn(2, 20, generator=g),
        txt_ids=torch.zeros(5, 3),
        img_ids=ids,
        return_dict=False,
    )[0]


def native_file(model: FluxTransformer2DModel, path: Path, prefix: str = "") -> Path:
    state = flux_files.to_native_layout(model.state_dict())
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    config = files.shipped_config("flux_dev/vae") | {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    return AutoencoderKL.from_config(config).eval()


def tiny_clip(vocabulary: int = 49408) -> CLIPTextModel:
    torch.manual_seed(0)
    config = files.shipped_config("flux_dev/clip_l") | {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "projection_dim": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    return CLIPTextModel(CLIPTextConfig(**config)).eval()


def tiny_t5(vocabulary: int = 32128) -> T5EncoderModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(**(files.shipped_config("flux_dev/t5_xxl") | sizes))).eval()
