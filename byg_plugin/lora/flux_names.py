"""The two names of every FLUX.1 module: Black Forest Labs' own ("native") and diffusers'. Data and look-ups, no torch.

Native files fuse what diffusers keeps apart: `img_attn.qkv` is to_q, to_k, to_v stacked on the output rows, `linear1`
of a single block is to_q, to_k, to_v, proj_mlp. In both, `{}` stands for the block's number.
"""

from __future__ import annotations

from collections.abc import Iterator

from byg_plugin.lora.layout import Linear
from byg_plugin.lora.names import Names


def _stream(native: str, context: bool) -> tuple[Linear, ...]:
    """The linears of one stream of a double block: `img` or, with `context`, `txt`."""
    b, d = f"double_blocks.{{}}.{native}_", "transformer_blocks.{}."
    qkv = ("add_q_proj", "add_k_proj", "add_v_proj") if context else ("to_q", "to_k", "to_v")
    tail = "_context" if context else ""
    return (
        Linear(f"{b}attn.qkv", tuple(f"{d}attn.{name}" for name in qkv), (1, 1, 1)),
        Linear(f"{b}attn.proj", (f"{d}attn.to_add_out" if context else f"{d}attn.to_out.0",)),
        Linear(f"{b}mlp.0", (f"{d}ff{tail}.net.0.proj",)),
        Linear(f"{b}mlp.2", (f"{d}ff{tail}.net.2",)),
        Linear(f"{b}mod.lin", (f"{d}norm1{tail}.linear",)),
    )


DOUBLE = _stream("img", context=False) + _stream("txt", context=True)
_S = "single_transformer_blocks.{}."
SINGLE = (
    Linear(
        "single_blocks.{}.linear1",
        (f"{_S}attn.to_q", f"{_S}attn.to_k", f"{_S}attn.to_v", f"{_S}proj_mlp"),
        (1, 1, 1, 4),
    ),
    Linear("single_blocks.{}.linear2", (f"{_S}proj_out",)),
    Linear("single_blocks.{}.modulation.lin", (f"{_S}norm.linear",)),
)
_TIME = "time_text_embed."
GUIDANCE = (
    Linear("guidance_in.in_layer", (f"{_TIME}guidance_embedder.linear_1",)),
    Linear("guidance_in.out_layer", (f"{_TIME}guidance_embedder.linear_2",)),
)
OUTSIDE = (
    Linear("img_in", ("x_embedder",)),
    Linear("txt_in", ("context_embedder",)),
    Linear("time_in.in_layer", (f"{_TIME}timestep_embedder.linear_1",)),
    Linear("time_in.out_layer", (f"{_TIME}timestep_embedder.linear_2",)),
    Linear("vector_in.in_layer", (f"{_TIME}text_embedder.linear_1",)),
    Linear("vector_in.out_layer", (f"{_TIME}text_embedder.linear_2",)),
    Linear("final_layer.linear", ("proj_out",)),
    Linear("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True),
)

# Native `.scale` tensors of the query and key norms -> diffusers `.weight` tensors.
DOUBLE_NORMS = {
    "double_blocks.{}.img_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_q",
    "double_blocks.{}.img_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_k",
    "double_blocks.{}.txt_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_added_q",
    "double_blocks.{}.txt_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_added_k",
}
SINGLE_NORMS = {
    "single_blocks.{}.norm.query_norm": f"{_S}attn.norm_q",
    "single_blocks.{}.norm.key_norm": f"{_S}attn.norm_k",
}


def linears(double: int, single: int, guidance: bool) -> Iterator[Linear]:
    """Every linear of a FLUX.1 with so many double and single blocks."""
    yield from OUTSIDE
    if guidance:
        yield from GUIDANCE
    for table, blocks in ((DOUBLE, double), (SINGLE, single)):
        for block in range(blocks):
            yield from (linear.at(block) for linear in table)


def norms(double: int, single: int) -> Iterator[tuple[str, str]]:
    """(native, diffusers) names of the tensor of every query and key norm."""
    for table, blocks in ((DOUBLE_NORMS, double), (SINGLE_NORMS, single)):
        for block in range(blocks):
            yield from ((f"{native.format(block)}.scale", f"{diffusers.format(block)}.weight") for native, diffusers in table.items())


NAMES = Names((*DOUBLE, *SINGLE), (*OUTSIDE, *GUIDANCE))
find_native, find_part = NAMES.find_native, NAMES.find_part
