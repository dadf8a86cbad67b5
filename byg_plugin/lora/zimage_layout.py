"""LoRAs of Z-Image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from byg_plugin.lora.layout import Layout, Module, Network
from byg_plugin.lora.zimage_names import BLOCKS, NAMES

_WIDTH, _INNER = 3840, 10240
_SHAPES = {
    "attention.qkv": (_WIDTH, 3 * _WIDTH),
    "attention.out": (_WIDTH, _WIDTH),
    "feed_forward.w1": (_WIDTH, _INNER),
    "feed_forward.w2": (_INNER, _WIDTH),
    "feed_forward.w3": (_WIDTH, _INNER),
    "adaLN_modulation.0": (256, 4 * _WIDTH),
}


def _in_diffusers(module: Module, modules: Sequence[Module]) -> str | None:
    with_alpha = any(other.alpha is not None for other in modules)
    if module.prefix == "transformer." and with_alpha:
        return "diffusers finds no layer for alpha in this naming"
    if module.prefix == "" and not with_alpha:
        return "diffusers loads nothing under this naming, without an error"
    if module.part is None and len(module.linear.parts) > 1:
        return "diffusers has no fused attention: convert with --to diffusers"
    return None


LAYOUT = Layout(
    name="zimage",
    find_native=NAMES.find_native,
    find_part=NAMES.find_part,
    linears=partial(NAMES.linears, BLOCKS),
    networks=(Network("Z-Image", BLOCKS, _SHAPES),),
    blocks=tuple(BLOCKS),
    pattern=re.compile(r"(^|[._])(layers|noise_refiner|context_refiner)[._]\d+[._](attention[._](to_|qkv|out)|feed_forward[._]w)"),
    part_prefixes=("lora_unet_", "diffusion_model."),
    in_diffusers=_in_diffusers,
    loader="ZImageLoraLoaderMixin",
    runtime={
        ("same", "diffusers"): "needs a pipeline of byg_plugin: ZImageBygPipeline (ZImagePipeline has no source tokens)",
        ("same", "comfyui"): "needs a node: ByG Source (reference latents switch it to another layout)",
        ("same", "musubi"): "needs a patch: the Z-Image script has no source tokens",
    },
)
