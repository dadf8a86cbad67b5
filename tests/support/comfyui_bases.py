"""Random networks at the width that ComfyUI knows the families by, one block of each kind, and LoRAs of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Krea2Transformer2DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from byg_plugin import sampling
from byg_plugin.config.loading import parse_config
from byg_plugin.config.sections import Config
from byg_plugin.lora.card import LoraCard
from byg_plugin.models import files, flux2_files, flux_files, make_family, qwen_files, wan_files, zimage_files

TEXT, TEXT_TOKENS = 64, 8  # width and length of encoded texts, which are free
WAN_TEXT = 4096  # Wan's width is not


def filled(network: nn.Module, seed: int) -> Any:
    """Outputs of about 1 whatever the width, and nothing that is zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            columns = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.normal_(generator=g).mul_(columns**-0.5)
            if "norm" in name and name.endswith(".weight") and parameter.ndim == 1:
                parameter.add_(2)  # else attention is so flat that positions are without effect
    return network.eval().requires_grad_(False)


def flux(seed: int = 0) -> FluxTransformer2DModel:
    """FLUX.1-dev, 1 + 1 blocks of 57."""
    config = files.shipped_config("flux_dev/transformer")
    small = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": TEXT, "pooled_projection_dim": TEXT}
    return filled(FluxTransformer2DModel.from_config({**config, **small}), seed)


def wan(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    """Wan2.1 1.3B, 1 block of 30."""
    small = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 1, "text_dim": WAN_TEXT}
    return filled(WanTransformer3DModel(**{**small, **changes}), seed)


def klein(seed: int = 0) -> Flux2Transformer2DModel:
    """FLUX.2 klein, narrow, 1 + 1 blocks."""
    heads = {"attention_head_dim": 128, "num_attention_heads": 2, "axes_dims_rope": (32, 32, 32, 32)}
    small = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": TEXT, "guidance_embeds": False}
    return filled(Flux2Transformer2DModel(**heads, **small), seed)


def qwen(seed: int = 0) -> QwenImageTransformer2DModel:
    """Qwen-Image of real width, which ComfyUI takes for granted, 1 block of 60."""
    return filled(QwenImageTransformer2DModel(num_layers=1), seed)


def krea2(seed: int = 0) -> Krea2Transformer2DModel:
    """Krea 2, narrow, 1 block of 28; ComfyUI derives the widths of its MLPs."""
    heads = {"attention_head_dim": 128, "num_attention_heads": 3, "num_key_value_heads": 1}
    text = {"text_hidden_dim": 160, "text_num_attention_heads": 20, "text_num_key_value_heads": 20, "text_intermediate_size": 512}
    return filled(Krea2Transformer2DModel(num_layers=1, intermediate_size=1024, **heads, **text), seed)


def zimage(seed: int = 0) -> ZImageTransformer2DModel:
    """Z-Image of real width, which ComfyUI knows it by, 1 layer of 30 and all refiners; weights that bfloat16 can hold."""
    network = filled(ZImageTransformer2DModel(n_layers=1, cap_feat_dim=TEXT), seed)
    for parameter in network.parameters():
        parameter.copy_(parameter.bfloat16())
    return network


NATIVE: dict[str, Callable[[Any], Mapping[str, Tensor]]] = {
    "flux": flux_files.to_native_layout,
    "flux2": flux2_files.to_native_layout,
    "krea2": qwen_files.to_native_krea2,
    "qwen": dict,
    "wan": wan_files.to_native_layout,
    "zimage": zimage_files.to_native_layout,
}


def save_base(network: nn.Module, kind: str, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """In the layout that ComfyUI reads."""
    state = NATIVE[kind](network.state_dict())
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in state.items()}, path)


def config_of(family: str, folder: Path, **sections: dict[str, Any]) -> Config:
    """In float32 on the CPU."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"family": family, "path": str(folder), "dtype": "float32", "device": "cpu"},
        "dataset": {"tuples": ".", "cache_dir": "."},
        "output": {"dir": "."},
        "train": {"steps": 1, "mixed_precision": "no"},
        "sample": {"solver": "euler"} if family.startswith("wan") else {},
        "conditioning": {},
    }
    for name, values in sections.items():
        raw[name] |= values
    return parse_config(raw)


def lora_of(network: nn.Module, names: list[str], seed: int, rank: int = 4) -> dict[str, Tensor]:
    """PEFT tensors of these linears with a visible effect."""
    g = torch.Generator().manual_seed(seed)
    out = {}
    for name in names:
        rows, columns = network.get_submodule(name).weight.shape
        out[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=g) * columns**-0.5
        out[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=g) * 0.5
    return out


def card_metadata(config: Config, **changes: Any) -> dict[str, str]:
    """The header of a LoRA that this configuration would train."""
    card = LoraCard.of(config, 7, "ema").to_metadata()
    return card | {f"byg.{key}": str(value) for key, value in changes.items()}


@torch.no_grad()
def merged(network: nn.Module, lora: Mapping[str, Tensor], strength: float = 1.0) -> nn.Module:
    """The network itself with the LoRA added to its weights; call it again with -strength to undo."""
    for key in [key for key in lora if ".lora_A" in key]:
        name = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
        network.get_submodule(name).weight += strength * lora[key.replace("lora_A", "lora_B")] @ lora[key]
    return network


def edited(
    config: Config, networks: Mapping[str, nn.Module], noise: Tensor, text: Any, source: Tensor | None, steps: int, negative: Any = None
) -> Tensor:
    """Latents of `edit.py`'s own sampler; `networks` by the experts' names."""
    family = make_family(config)

    def velocity(noisy: Tensor, t: Tensor, texts: Any, given: Tensor | None) -> Tensor:
        return partial(family.velocity, networks[family.expert_of(t)])(noisy, t, texts, given)

    return sampling.sample_as_configured(config, family, velocity, noise, text, source, steps=steps, schedule="shifted", negative=negative)


def close(edit: Tensor, wanted: Tensor) -> None:
    """The latents of ComfyUI are those of `edit.py`; pytest -s prints how near."""
    print("largest difference", float((edit - wanted).abs().max()), "of", float(wanted.abs().max()))
    torch.testing.assert_close(edit, wanted, rtol=0, atol=1e-3)
