"""The model families by name, and what their authors publish beside the weights. Data alone: no torch.

A family is a file here (its `SPECS`), a file in `models/` (its weights), and its line below.
"""

from __future__ import annotations

from importlib import import_module
from typing import Literal

from byg_plugin.families.spec import EXPERT_SUFFIXES, HIGH, LOW, FamilySpec

_FILES = (
    "flux",
    "flux2",
    "qwen",
    "wan",
    "zimage",
)
SPECS: dict[str, FamilySpec] = {spec.name: spec for file in _FILES for spec in import_module(f"{__name__}.{file}").SPECS}
LoraFormat = Literal["diffusers", "comfyui", "musubi"]
LORA_FORMATS: tuple[LoraFormat, ...] = ("diffusers", "comfyui", "musubi")
POSITIONS: tuple[str, ...] = tuple(dict.fromkeys(position for spec in SPECS.values() for position in spec.positions))
TEXT_ENCODERS: tuple[str, ...] = tuple(dict.fromkeys(encoder for spec in SPECS.values() for encoder in spec.text_encoders))

__all__ = ["EXPERT_SUFFIXES", "HIGH", "LORA_FORMATS", "LOW", "POSITIONS", "SPECS", "TEXT_ENCODERS", "FamilySpec", "LoraFormat", "named"]


def named(name: str) -> FamilySpec:
    """The family of a name.

    Raises:
        ValueError: there is none; lists those that are there.
    """
    if name not in SPECS:
        raise ValueError(f"the model family {name!r} is unknown here; known: {', '.join(SPECS)}")
    return SPECS[name]
