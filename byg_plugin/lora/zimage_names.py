"""The two names of every Z-Image module: those of single files ("native") and diffusers', which the authors publish under too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from byg_plugin.lora.layout import Linear
from byg_plugin.lora.names import Names

BLOCKS = {"layers.": 30, "noise_refiner.": 2, "context_refiner.": 2}
"""How many there are, by the start of their layers' names, which is the same in both."""
_QKV = ("to_q", "to_k", "to_v")
_MODULATED = ("layers.", "noise_refiner.")


def _block(start: str) -> Iterator[Linear]:
    name = f"{start}{{}}."
    yield Linear(f"{name}attention.qkv", tuple(f"{name}attention.{part}" for part in _QKV), (1, 1, 1))
    yield Linear(f"{name}attention.out", (f"{name}attention.to_out.0",))
    yield from (Linear(f"{name}feed_forward.{end}", (f"{name}feed_forward.{end}",)) for end in ("w1", "w2", "w3"))


_MODULATION = tuple(Linear(f"{start}{{}}.adaLN_modulation.0", (f"{start}{{}}.adaLN_modulation.0",)) for start in _MODULATED)
_BIASED = (
    Linear("x_embedder", ("all_x_embedder.2-1",)),
    Linear("final_layer.linear", ("all_final_layer.2-1.linear",)),
    Linear("final_layer.adaLN_modulation.1", ("all_final_layer.2-1.adaLN_modulation.1",)),
    *(Linear(name, (name,)) for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")),
)
NAMES = Names((*(linear for start in BLOCKS for linear in _block(start)), *_MODULATION), _BIASED)
_NORMS = {f"attention.{a}_norm.weight": f"attention.norm_{a}.weight" for a in "qk"} | {
    f"{part}_norm{number}.weight": f"{part}_norm{number}.weight" for part in ("attention", "ffn") for number in (1, 2)
}


def others(blocks: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """(native, diffusers) names of every tensor that is no weight of a linear."""
    yield from ((name, name) for name in ("cap_embedder.0.weight", "x_pad_token", "cap_pad_token"))
    yield from ((f"{linear.native}.bias", f"{linear.parts[0]}.bias") for linear in _BIASED)
    for start, count in blocks.items():
        for block in range(count):
            name = f"{start}{block}."
            yield from ((name + own, name + theirs) for own, theirs in _NORMS.items())
            if start in _MODULATED:
                yield f"{name}adaLN_modulation.0.bias", f"{name}adaLN_modulation.0.bias"
