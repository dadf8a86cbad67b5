"""ComfyUI's networks of every family with the weights of ours, as small as both build them, and one call with a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from byg_plugin.models import flux2_files, flux_files, qwen_files, wan_files, zimage_files
from comfyui.source import KEY, Source
from tests.support.tiny import TINY_FLUX, tiny_flux
from tests.support.tiny_flux2 import TINY_FLUX2, tiny_flux2
from tests.support.tiny_qwen import tiny_krea2, tiny_qwen
from tests.support.tiny_wan import TEXT_TOKENS, TEXT_WIDTH, tiny_wan
from tests.support.tiny_zimage import tiny_zimage

# Sizes by which ComfyUI derives others as the published ones do.
ZIMAGE = {"dim": 1536, "n_heads": 12, "n_kv_heads": 12, "n_layers": 1, "n_refiner_layers": 2, "axes_dims": (32, 48, 48)}
KREA2 = {"attention_head_dim": 32, "num_attention_heads": 3, "num_key_value_heads": 1, "axes_dims_rope": (8, 12, 12), "num_layers": 1}
KREA2_REST = {"intermediate_size": 256, "timestep_embed_dim": 256, "text_hidden_dim": 96, "text_intermediate_size": 256}
PLANE = ("flux", "flux2", "zimage")  # latents of theirs have no frames
OPTIONS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def ours(architecture: str) -> nn.Module:
    """Our network."""
    return {
        "flux": tiny_flux,
        "flux2": lambda: tiny_flux2(timestep_guidance_channels=256),
        "zimage": lambda: scaled(tiny_zimage(**ZIMAGE), 0.2),
        "qwen": lambda: tiny_qwen(),
        "krea2": lambda: tiny_krea2(**KREA2, **KREA2_REST),
        "wan": tiny_wan,
    }[architecture]()


@torch.no_grad()
def scaled(network: nn.Module, factor: float) -> nn.Module:
    """A wide network's random weights would otherwise blow up."""
    for parameter in network.parameters():
        parameter.mul_(factor if parameter.ndim > 1 else 1.0)
    return network


def theirs(architecture: str, network: nn.Module) -> nn.Module:
    """ComfyUI's with the same weights; needs ComfyUI on the path."""
    import comfy.ops

    made, to_native = _MAKERS[architecture]
    model = made(operations=comfy.ops.disable_weight_init, **OPTIONS)
    state = to_native(network.state_dict())
    names = model.state_dict().keys()
    model.load_state_dict({name if name in names else name.replace(".scale", ".weight"): value for name, value in state.items()})
    return model.eval().requires_grad_(False)


def _flux(**options: Any) -> nn.Module:
    from comfy.ldm.flux.model import Flux

    heads, head = TINY_FLUX["num_attention_heads"], TINY_FLUX["attention_head_dim"]
    return Flux(
        in_channels=16,
        out_channels=16,
        patch_size=2,
        hidden_size=heads * head,  # type: ignore[operator]
        num_heads=heads,
        depth=2,
        depth_single_blocks=2,
        mlp_ratio=4.0,
        axes_dim=[4, 6, 6],
        theta=10000,
        qkv_bias=True,
        guidance_embed=True,
        vec_in_dim=20,
        context_in_dim=24,
        txt_ids_dims=[],
        **options,
    )


def _flux2(**options: Any) -> nn.Module:
    from comfy.ldm.flux.model import Flux

    return Flux(
        in_channels=128,
        out_channels=128,
        patch_size=1,
        hidden_size=32,
        num_heads=2,
        depth=2,
        depth_single_blocks=2,
        mlp_ratio=3.0,
        axes_dim=list(TINY_FLUX2["axes_dims_rope"]),
        theta=2000,
        qkv_bias=False,
        guidance_embed=False,
        vec_in_dim=None,
        context_in_dim=48,
        txt_ids_dims=[3],
        global_modulation=True,
        mlp_silu_act=True,
        ops_bias=False,
        default_ref_method="index",
        ref_index_scale=10.0,
        **options,
    )


def _zimage(**options: Any) -> nn.Module:
    from comfy.ldm.lumina.model import NextDiT

    return NextDiT(
        in_channels=16,
        dim=1536,
        n_layers=1,
        n_heads=12,
        n_kv_heads=12,
        qk_norm=True,
        cap_feat_dim=16,
        axes_dims=[32, 48, 48],
        rope_theta=256.0,
        ffn_dim_multiplier=8.0 / 3.0,
        z_image_modulation=True,
        time_scale=1000.0,
        pad_tokens_multiple=32,
        **options,
    )


def _qwen(**options: Any) -> nn.Module:
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    sizes = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (4, 6, 6)}
    return QwenImageTransformer2DModel(**sizes, **options)


def _krea2(**options: Any) -> nn.Module:
    from comfy.ldm.krea2.model import SingleStreamDiT

    return SingleStreamDiT(features=96, heads=3, kvheads=1, txtdim=96, layers=1, txtheads=2, txtkvheads=2, **options)


def _wan(**options: Any) -> nn.Module:
    from comfy.ldm.wan.model import WanModel

    sizes = {"dim": 24, "ffn_dim": 32, "freq_dim": 16, "text_dim": TEXT_WIDTH, "text_len": TEXT_TOKENS, "num_heads": 2, "num_layers": 2}
    return WanModel(model_type="t2v", in_dim=16, out_dim=16, **sizes, **options)


_MAKERS: dict[str, tuple[Callable[..., nn.Module], Callable[[Any], Mapping[str, Tensor]]]] = {
    "flux": (_flux, flux_files.to_native_layout),
    "flux2": (_flux2, flux2_files.to_native_layout),
    "zimage": (_zimage, zimage_files.to_native_layout),
    "qwen": (_qwen, dict),
    "krea2": (_krea2, qwen_files.to_native_krea2),
    "wan": (_wan, wan_files.to_native_layout),
}


@contextmanager
def patched(model: nn.Module, source: Source) -> Any:
    """The options of a call with a source, and its object patches, as a ModelPatcher sets them and takes them away."""
    from comfy.patcher_extension import WrappersMP

    wanted = source.object_patches(lambda name: getattr(model, name.removeprefix("diffusion_model.")))
    for name, patch in wanted.items():
        setattr(model, name.removeprefix("diffusion_model."), patch)
    try:
        yield {"wrappers": {WrappersMP.DIFFUSION_MODEL: {KEY: [source.wrapper(lambda latents: latents)]}}}
    finally:
        for name in wanted:
            delattr(model, name.removeprefix("diffusion_model."))


def call(architecture: str, model: nn.Module, x: Tensor, t: Tensor, text: SimpleNamespace, options: dict[str, Any]) -> Tensor:
    """One call as ComfyUI's base model makes it: times in its unit, each family's arguments."""
    arguments = dict(text.arguments)
    if architecture in PLANE:
        x = x[:, :, 0]
    t = t * 1000 if architecture == "wan" else t
    out = model(x, t, context=text.rows, control=None, transformer_options=options, **arguments)
    return out if out.ndim == 5 else out.unsqueeze(2)
