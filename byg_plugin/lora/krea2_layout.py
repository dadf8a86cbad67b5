"""LoRAs of Krea 2."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial

from byg_plugin.lora.layout import Layout, Linear, Module, Network
from byg_plugin.lora.names import Names

_WIDTH, _KEYS, _INNER = 6144, 1536, 16384
BLOCKS = {"blocks.": 28, "txtfusion.layerwise_blocks.": 2, "txtfusion.refiner_blocks.": 2}
"""How many there are, by the start of their layers' native names."""
_STARTS = dict(zip(BLOCKS, ("transformer_blocks.", "text_fusion.layerwise_blocks.", "text_fusion.refiner_blocks."), strict=True))
_INSIDE = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.gate": "attn.to_gate",
    "attn.wo": "attn.to_out.0",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
_OUTSIDE = {
    "first": "img_in",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtfusion.projector": "text_fusion.projector",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "last.linear": "final_layer.linear",
}
NAMES = Names(
    [Linear(f"{own}{{}}.{a}", (f"{theirs}{{}}.{b}",)) for own, theirs in _STARTS.items() for a, b in _INSIDE.items()],
    [Linear(own, (theirs,)) for own, theirs in _OUTSIDE.items()],
)
# Tensors that belong to no linear, by native name.
_NORMS = {"prenorm.scale": "norm1.weight", "postnorm.scale": "norm2.weight", "attn.qknorm.qnorm.scale": "attn.norm_q.weight"}
_NORMS["attn.qknorm.knorm.scale"] = "attn.norm_k.weight"


def tensors(blocks: int) -> Iterator[tuple[str, str]]:
    """(native, diffusers) names of every tensor of a network with so many blocks, but for biases that it may not have."""
    counts = BLOCKS | {"blocks.": blocks}
    for linear in NAMES.linears(counts):
        yield from ((f"{linear.native}.{kind}", f"{linear.parts[0]}.{kind}") for kind in ("weight", "bias"))
    for start, count in counts.items():
        for block in range(count):
            yield from ((f"{start}{block}.{own}", f"{_STARTS[start]}{block}.{theirs}") for own, theirs in _NORMS.items())
    yield from ((f"blocks.{block}.mod.lin", f"transformer_blocks.{block}.scale_shift_table") for block in range(blocks))
    yield from (("txtmlp.0.scale", "txt_in.norm.weight"), ("last.norm.scale", "final_layer.norm.weight"))
    yield "last.modulation.lin", "final_layer.scale_shift_table"


def _network() -> Network:
    inside = {"attn.wq": (_WIDTH, _WIDTH), "attn.wk": (_WIDTH, _KEYS), "attn.wv": (_WIDTH, _KEYS), "attn.gate": (_WIDTH, _WIDTH)}
    inside |= {"attn.wo": (_WIDTH, _WIDTH), "mlp.gate": (_WIDTH, _INNER), "mlp.up": (_WIDTH, _INNER), "mlp.down": (_INNER, _WIDTH)}
    return Network("Krea 2", {"blocks.": BLOCKS["blocks."]}, inside)


def _in_diffusers(module: Module, modules: Sequence[Module]) -> str | None:
    if module.prefix not in ("transformer.", "diffusion_model."):
        return "diffusers loads nothing under this naming, without an error"
    if any(other.alpha is not None for other in modules):
        return "diffusers refuses a file with alpha in this naming"
    return None if module.suffix == ".lora_A.weight" else f"diffusers does not read the suffix {module.suffix}"


LAYOUT = Layout(
    name="krea2",
    find_native=NAMES.find_native,
    find_part=NAMES.find_part,
    linears=partial(NAMES.linears, BLOCKS),
    networks=(_network(),),
    blocks=("blocks.",),
    pattern=re.compile(
        r"(^|[._])(text_fusion|txtfusion)[._]|(^|[._])transformer_blocks[._]\d+[._](attn[._]to_gate|ff[._](gate|up|down))[._]"
        r"|(^|[._])blocks[._]\d+[._](attn[._](wq|wk|wv|wo|gate)|mlp[._](gate|up|down))[._]"
    ),
    peft=("diffusers", "comfyui"),
    in_diffusers=_in_diffusers,
    loader="Krea2LoraLoaderMixin",
    runtime={
        ("same", "diffusers"): "needs a pipeline of byg_plugin: Krea2BygPipeline (Krea2Pipeline has no source tokens)",
        ("same", "comfyui"): "needs a node: ByG Source (ReferenceLatent gives the source frame 1)",
        ("same", "musubi"): "needs a patch: the Krea 2 script has no source tokens",
        ("reference", "diffusers"): "needs a pipeline of byg_plugin: Krea2BygPipeline (Krea2Pipeline has no source tokens)",
        ("reference", "comfyui"): "runs stock: ReferenceLatent, and the reference method set to index",
        ("reference", "musubi"): "needs a patch: the Krea 2 script has no source tokens",
    },
)
