"""LoRAs of Qwen-Image, whose authors' names and diffusers' are the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from byg_plugin.lora.layout import Layout, Linear, Module, Network
from byg_plugin.lora.names import Names

_BLOCKS, _WIDTH = 60, 3072
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
# End of the name -> (inputs, outputs) in widths.
_INSIDE = {
    **{f"attn.{name}": (1, 1) for name in _ATTENTION},
    **{f"{stream}_mlp.{name}": shape for stream in ("img", "txt") for name, shape in (("net.0.proj", (1, 4)), ("net.2", (4, 1)))},
    **{f"{stream}_mod.1": (1, 6) for stream in ("img", "txt")},
}
_OUTSIDE = ("img_in", "txt_in", "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2")
NAMES = Names(
    [Linear(name, (name,)) for name in (f"transformer_blocks.{{}}.{end}" for end in _INSIDE)],
    [Linear(name, (name,)) for name in (*_OUTSIDE, "norm_out.linear", "proj_out")],
)
_SHAPES = {end: (inputs * _WIDTH, outputs * _WIDTH) for end, (inputs, outputs) in _INSIDE.items()}


def _in_diffusers(module: Module, modules: Sequence[Module]) -> str | None:
    if module.prefix == "transformer." and any(other.alpha is not None for other in modules):
        return "diffusers finds no layer for alpha in this naming"
    return "diffusers loads nothing under this naming, without an error" if module.prefix == "" and module.alpha is None else None


LAYOUT = Layout(
    name="qwen",
    find_native=NAMES.find_native,
    find_part=NAMES.find_part,
    linears=partial(NAMES.linears, {"transformer_blocks.": _BLOCKS}),
    networks=(Network("Qwen-Image", {"transformer_blocks.": _BLOCKS}, _SHAPES),),
    blocks=("transformer_blocks.",),
    pattern=re.compile(r"(^|[._])transformer_blocks[._]\d+[._](img|txt)_(mlp|mod)[._]"),
    in_diffusers=_in_diffusers,
    loader="QwenImageLoraLoaderMixin",
    runtime={
        ("same", "diffusers"): "needs a pipeline of byg_plugin: QwenImageBygPipeline (QwenImageEditPipeline gives the source frame 1)",
        ("same", "comfyui"): "needs a node: ByG Source (ReferenceLatent gives the source frame 1)",
        ("same", "musubi"): "needs a patch: the Qwen-Image script gives the source frame 1",
        ("reference", "diffusers"): "needs a pipeline of byg_plugin: QwenImageBygPipeline (QwenImageEditPipeline shows the "
        "source to the text encoder too)",
        ("reference", "comfyui"): "runs stock: ReferenceLatent with the text alone encoded (CLIPTextEncode)",
        ("reference", "musubi"): "needs a patch: the Qwen-Image script shows the source to the text encoder too",
    },
)
