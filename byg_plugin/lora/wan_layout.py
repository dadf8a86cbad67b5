"""LoRAs of Wan.

Its layers are not fused, and `comfyui` is written as `diffusion_model.<native layer>.lora_A.weight` without alpha, which ComfyUI and
diffusers both read, whatever layers there are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from byg_plugin.lora import wan_names
from byg_plugin.lora.layout import Layout, Module, Network

_BLOCKS = ("blocks.",)


def _network(name: str, blocks: int, width: int, inner: int) -> Network:
    attention = {f"attn.{end}": (width, width) for end in "qkvo"}
    return Network(name, dict.fromkeys(_BLOCKS, blocks), attention | {"ffn.0": (width, inner), "ffn.2": (inner, width)})


def _in_diffusers(module: Module, modules: Sequence[Module]) -> str | None:
    inside = module.linear.native.startswith(_BLOCKS)
    if module.prefix == "transformer.":
        if module.suffix != ".lora_A.weight":
            return f"diffusers does not read the suffix {module.suffix}"
        return None if all(other.alpha is None for other in modules) else "diffusers refuses a file with alpha in this naming"
    if module.prefix == "diffusion_model.":
        if module.suffix not in (".lora_A.weight", ".lora_down.weight"):
            return f"diffusers does not read the suffix {module.suffix}"
        return None if inside or module.alpha is None else "diffusers' converter has no alpha outside the blocks"
    if module.prefix == "lora_unet_":
        if not inside:
            return "diffusers' converter knows no layers outside the blocks in this naming"
        return None if _every_layer(modules) else "diffusers fails on this naming unless every layer of every block is there with alpha"
    if module.prefix == "transformer_2.":
        return "diffusers loads nothing under transformer_2., without an error: convert it, and load with load_into_transformer_2=True"
    return "diffusers loads nothing under this naming, without an error"


def _every_layer(modules: Sequence[Module]) -> bool:
    named = [module for module in modules if module.prefix == "lora_unet_" and module.linear.native.startswith(_BLOCKS)]
    blocks = 1 + max((int(module.linear.native.split(".")[1]) for module in named), default=-1)
    with_alpha = {module.linear.native for module in named if module.alpha is not None}
    return {linear.at(block).native for block in range(blocks) for linear in wan_names.BLOCK} <= with_alpha


LAYOUT = Layout(
    name="wan",
    find_native=wan_names.find_native,
    find_part=wan_names.find_part,
    linears=partial(wan_names.linears, 40),
    networks=(
        _network("Wan 14B", 40, 5120, 13824),
        _network("Wan 1.3B", 30, 1536, 8960),
        _network("Wan 5B", 30, 3072, 14336),
    ),
    blocks=_BLOCKS,
    pattern=re.compile(r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|attn1|attn2|ffn)[._]"),
    native_prefixes=("base_model.model.", ""),
    peft=("diffusers", "comfyui"),
    written="comfyui",
    pairs=True,
    in_diffusers=_in_diffusers,
    parts_in_comfyui="ComfyUI has no diffusers names for Wan: convert with --to comfyui",
    loader="WanLoraLoaderMixin",
    runtime={
        ("same", "diffusers"): "needs a pipeline of byg_plugin: WanBygPipeline (WanPipeline has no source tokens)",
        ("same", "comfyui"): "needs a node: ByG Source (stock in-context latents are turned: train with conditioning.position = 'bernini')",
        ("same", "musubi"): "needs a patch: the Wan script has no source tokens",
        ("bernini", "diffusers"): "needs a pipeline of byg_plugin: WanBygPipeline (WanPipeline has no source tokens)",
        ("bernini", "comfyui"): "runs stock: BerniniConditioning (releases after 0.24)",
        ("bernini", "musubi"): "needs a patch: the Wan script has no source tokens",
    },
)
