"""The two names of every FLUX.2 module: Black Forest Labs' own ("native") and diffusers'. Data and look-ups, no torch.

Double blocks are fused natively as FLUX.1's are; a single block's two linears are fused in both. Modulation is shared by the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

from byg_plugin.lora.layout import Linear
from byg_plugin.lora.names import Names


def _stream(native: str, context: bool) -> tuple[Linear, ...]:
    """The linears of one stream of a double block: `img` or, with `context`, `txt`."""
    b, d = f"double_blocks.{{}}.{native}_", "transformer_blocks.{}."
    qkv = ("add_q_proj", "add_k_proj", "add_v_proj") if context else ("to_q", "to_k", "to_v")
    feed_forward = "ff_context" if context else "ff"
    return (
        Linear(f"{b}attn.qkv", tuple(f"{d}attn.{name}" for name in qkv), (1, 1, 1)),
        Linear(f"{b}attn.proj", (f"{d}attn.to_add_out" if context else f"{d}attn.to_out.0",)),
        Linear(f"{b}mlp.0", (f"{d}{feed_forward}.linear_in",)),
        Linear(f"{b}mlp.2", (f"{d}{feed_forward}.linear_out",)),
    )


_SINGLE = (
    Linear("single_blocks.{}.linear1", ("single_transformer_blocks.{}.attn.to_qkv_mlp_proj",)),
    Linear("single_blocks.{}.linear2", ("single_transformer_blocks.{}.attn.to_out",)),
)
_MODULATION = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
_OUTSIDE = (
    Linear("img_in", ("x_embedder",)),
    Linear("txt_in", ("context_embedder",)),
    Linear("time_in.in_layer", ("time_guidance_embed.timestep_embedder.linear_1",)),
    Linear("time_in.out_layer", ("time_guidance_embed.timestep_embedder.linear_2",)),
    *(Linear(f"{name}.lin", (f"{name}.linear",)) for name in _MODULATION),
    Linear("final_layer.linear", ("proj_out",)),
    Linear("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap=True),
)
NAMES = Names((*_stream("img", context=False), *_stream("txt", context=True), *_SINGLE), _OUTSIDE)
_NORMS = {
    "double_blocks.{}.img_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_q",
    "double_blocks.{}.img_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_k",
    "double_blocks.{}.txt_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_added_q",
    "double_blocks.{}.txt_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_added_k",
    "single_blocks.{}.norm.query_norm": "single_transformer_blocks.{}.attn.norm_q",
    "single_blocks.{}.norm.key_norm": "single_transformer_blocks.{}.attn.norm_k",
}


def norms(double: int, single: int) -> Iterator[tuple[str, str]]:
    """(native, diffusers) names of the tensor of every query and key norm."""
    for native, diffusers in _NORMS.items():
        for block in range(double if native.startswith("double") else single):
            yield f"{native.format(block)}.scale", f"{diffusers.format(block)}.weight"
