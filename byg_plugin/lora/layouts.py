"""The LoRA layouts by name."""

from __future__ import annotations

from collections.abc import Iterable

from byg_plugin.families import SPECS
from byg_plugin.lora import flux2_layout, flux_layout, krea2_layout, qwen_layout, wan_layout, zimage_layout
from byg_plugin.lora.layout import Layout

LAYOUTS = {
    layout.name: layout
    for layout in (
        flux_layout.LAYOUT,
        flux2_layout.LAYOUT,
        wan_layout.LAYOUT,
        qwen_layout.LAYOUT,
        krea2_layout.LAYOUT,
        zimage_layout.LAYOUT,
    )
}
DEFAULT_FAMILY = "flux"
"""Of a file that does not say, and whose layers are named as in no other layout."""


def layout_of(family: str) -> Layout:
    """The layout of a model family's LoRA.

    Raises:
        ValueError: the family is unknown; lists those that are there.
    """
    if family not in SPECS:
        raise ValueError(f"LoRA of the unknown family {family!r}; known: {', '.join(SPECS)}")
    return LAYOUTS[SPECS[family].lora_layout]


def families_of_names(keys: Iterable[str]) -> list[str]:
    """The first family whose layout's pattern is in the keys; where no pattern is, a family of each layout, the default one first."""
    keys = list(keys)
    first = {SPECS[name].lora_layout: name for name in (*reversed(SPECS), DEFAULT_FAMILY)}
    named = [name for name in SPECS if (pattern := layout_of(name).pattern) is not None and any(map(pattern.search, keys))]
    return named[:1] or sorted(first.values(), key=lambda name: name != DEFAULT_FAMILY)
