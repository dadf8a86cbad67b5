"""The LoRA layouts by name."""

from __future__ import annotations

from collections.abc import Iterable

from byg_plugin.families import SPECS
from byg_plugin.lora import flux_layout, wan_layout
from byg_plugin.lora.layout import Layout

LAYOUTS = {
    layout.name: layout
    for layout in (
        flux_layout.LAYOUT,
        wan_layout.LAYOUT,
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


def family_of_names(keys: Iterable[str]) -> str:
    """The first family whose layout has keys like these."""
    keys = list(keys)
    for family in SPECS:
        pattern = layout_of(family).pattern
        if pattern is not None and any(map(pattern.search, keys)):
            return family
    return DEFAULT_FAMILY
