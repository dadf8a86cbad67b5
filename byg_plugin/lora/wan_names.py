"""The two names of every Wan module and tensor: Wan's own ("native") and diffusers'. Data and look-ups, no torch.

Nothing is fused or split between the two; `{}` stands for the block's number.
"""

from __future__ import annotations

from collections.abc import Iterator

from byg_plugin.lora.layout import Linear
from byg_plugin.lora.names import Names


def _attention(native: str, diffusers: str) -> tuple[Linear, ...]:
    names = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    return tuple(Linear(f"blocks.{{}}.{native}.{a}", (f"blocks.{{}}.{diffusers}.{b}",)) for a, b in names)


BLOCK = (
    *_attention("self_attn", "attn1"),
    *_attention("cross_attn", "attn2"),
    Linear("blocks.{}.ffn.0", ("blocks.{}.ffn.net.0.proj",)),
    Linear("blocks.{}.ffn.2", ("blocks.{}.ffn.net.2",)),
)
_C = "condition_embedder."
OUTSIDE = (
    Linear("text_embedding.0", (f"{_C}text_embedder.linear_1",)),
    Linear("text_embedding.2", (f"{_C}text_embedder.linear_2",)),
    Linear("time_embedding.0", (f"{_C}time_embedder.linear_1",)),
    Linear("time_embedding.2", (f"{_C}time_embedder.linear_2",)),
    Linear("time_projection.1", (f"{_C}time_proj",)),
    Linear("head.head", ("proj_out",)),
)
# Tensors that belong to no linear. The norms of self-attention and feed-forward have none; norm3 is cross-attention's.
BLOCK_TENSORS = {
    "blocks.{}.self_attn.norm_q.weight": "blocks.{}.attn1.norm_q.weight",
    "blocks.{}.self_attn.norm_k.weight": "blocks.{}.attn1.norm_k.weight",
    "blocks.{}.cross_attn.norm_q.weight": "blocks.{}.attn2.norm_q.weight",
    "blocks.{}.cross_attn.norm_k.weight": "blocks.{}.attn2.norm_k.weight",
    "blocks.{}.norm3.weight": "blocks.{}.norm2.weight",
    "blocks.{}.norm3.bias": "blocks.{}.norm2.bias",
    "blocks.{}.modulation": "blocks.{}.scale_shift_table",
}
OUTSIDE_TENSORS = {
    "patch_embedding.weight": "patch_embedding.weight",
    "patch_embedding.bias": "patch_embedding.bias",
    "head.modulation": "scale_shift_table",
}


def linears(blocks: int) -> Iterator[Linear]:
    """Every linear of a Wan text-to-video transformer with so many blocks."""
    return NAMES.linears({"blocks.": blocks})


def tensors(blocks: int) -> Iterator[tuple[str, str]]:
    """(native, diffusers) names of every tensor."""
    for linear in linears(blocks):
        yield from ((f"{linear.native}.{kind}", f"{linear.parts[0]}.{kind}") for kind in ("weight", "bias"))
    yield from OUTSIDE_TENSORS.items()
    for block in range(blocks):
        yield from ((native.format(block), diffusers.format(block)) for native, diffusers in BLOCK_TENSORS.items())


NAMES = Names(BLOCK, OUTSIDE)
find_native, find_part = NAMES.find_native, NAMES.find_part
