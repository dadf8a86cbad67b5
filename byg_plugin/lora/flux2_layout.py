"""LoRAs of FLUX.2 klein."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from byg_plugin.lora.flux2_names import NAMES
from byg_plugin.lora.layout import Layout, Module, Network

_BLOCKS = ("double_blocks.", "single_blocks.")
_NINE = {"double_blocks.": 8, "single_blocks.": 24}


def _network(name: str, double: int, single: int, width: int) -> Network:
    times = {"attn.qkv": (1, 3), "attn.proj": (1, 1), "mlp.0": (1, 6), "mlp.2": (3, 1), "linear1": (1, 9), "linear2": (4, 1)}
    shapes = {end: (inputs * width, outputs * width) for end, (inputs, outputs) in times.items()}
    return Network(name, dict(zip(_BLOCKS, (double, single), strict=True)), shapes)


def _in_diffusers(module: Module, modules: Sequence[Module]) -> str | None:
    if module.prefix == "transformer.":
        if any(other.alpha is not None for other in modules):
            return "diffusers refuses a file with alpha in this naming"
        return None if module.suffix == ".lora_A.weight" else f"diffusers does not read the suffix {module.suffix}"
    if module.prefix in ("lora_unet_", "diffusion_model."):
        return None if module.linear.native.startswith(_BLOCKS) else "diffusers' converter drops native layers outside the blocks"
    return "diffusers loads nothing under this naming, without an error"


LAYOUT = Layout(
    name="flux2",
    find_native=NAMES.find_native,
    find_part=NAMES.find_part,
    linears=partial(NAMES.linears, _NINE),
    networks=(_network("FLUX.2 klein 4B", 5, 20, 3072), _network("FLUX.2 klein 9B", 8, 24, 4096)),
    blocks=_BLOCKS,
    pattern=re.compile(
        r"(^|[._])transformer_blocks[._]\d+[._]ff(_context)?[._]linear_(in|out)[._]|to_qkv_mlp_proj"
        r"|(^|[._])single_transformer_blocks[._]\d+[._]attn[._]to_out[._](?!0)|stream_modulation"
    ),
    in_diffusers=_in_diffusers,
    loader="Flux2LoraLoaderMixin",
    runtime={
        ("same", "diffusers"): "needs a pipeline of byg_plugin: Flux2KleinBygPipeline (Flux2KleinPipeline gives the source position 10)",
        ("same", "comfyui"): "needs a node: ByG Source (ReferenceLatent gives the source position 10)",
        ("same", "musubi"): "needs a patch: the FLUX.2 script gives the source position 10",
        ("reference", "diffusers"): "runs stock: Flux2KleinPipeline with image=",
        ("reference", "comfyui"): "runs stock: ReferenceLatent",
        ("reference", "musubi"): "runs stock: the FLUX.2 script with a control image",
    },
)
