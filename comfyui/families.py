"""The model families: what ComfyUI calls their networks, and what `families.json` says of each.

`families.json` is a copy of what the trainer knows, made by `python -m benchmarks.comfyui_nodes`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# The networks of ComfyUI that are families of ours, by what `unet_config` must say.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "flux": {"image_model": "flux", "guidance_embed": True},
    "flux2": {"image_model": "flux2"},
    "zimage": {"image_model": "lumina2", "z_image_modulation": True},
    "qwen": {"image_model": "qwen_image"},
    "krea2": {"image_model": "krea2"},
    "wan": {"image_model": "wan2.1", "model_type": "t2v"},
}
POSITIONS = ("same", "kontext", "reference", "bernini")


@dataclass(frozen=True, kw_only=True)
class Family:
    """A checkpoint that LoRAs are trained for.

    Attributes:
        name: as a LoRA's card has it.
        architecture: a key of `ARCHITECTURES`.
        positions: of the source that it can be trained with.
        steps: of a published edit.
        embeds_guidance: whether guidance is an input of the network; else it is classifier-free.
        guidance_scales: the published ones at high and at low noise, in the family's own formula.
        unguided: the scale of that formula without guidance: 1 as in ComfyUI, or 0.
        negative: the published negative text.
        shift: of the schedule, a number or the numbers of a formula.
        boundary: t from which the high-noise network serves; None: one network.
        frame_multiple: clips have n times this many frames and one; None: images.
        pixel_multiple: sides are multiples of this many pixels.
        native: side of the square with as many pixels as an edit; None: as trained.
        fps: frames a second of its clips.
    """

    name: str
    architecture: str
    positions: tuple[str, ...]
    steps: int
    embeds_guidance: bool
    guidance_scales: tuple[float, float]
    unguided: float
    negative: str
    shift: Any
    boundary: float | None
    frame_multiple: int | None
    pixel_multiple: int
    native: int | None
    fps: int | None

    @property
    def cfg(self) -> tuple[float, float]:
        """The published scales at high and at low noise as ComfyUI's `cfg`, which is 1 without guidance."""
        high, low = (scale + 1.0 - self.unguided for scale in self.guidance_scales)
        return high, low


@cache
def families() -> dict[str, Family]:
    """All of them by name."""
    rows = json.loads(Path(__file__).with_name("families.json").read_text(encoding="utf-8"))
    return {row["name"]: Family(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}) for row in rows}


def family_named(name: str) -> Family:
    """The family of a card.

    Raises:
        ValueError: it is unknown here.
    """
    if name not in families():
        raise ValueError(f"this LoRA was trained for {name!r}, which these nodes do not know; known: {', '.join(families())}: update them")
    return families()[name]


def architecture_of(config: Mapping[str, Any]) -> str:
    """Which architecture a model's `unet_config` tells of.

    Raises:
        ValueError: none of ours.
    """
    for name, wanted in ARCHITECTURES.items():
        if all(config.get(key) == value for key, value in wanted.items()):
            return name
    kind = ", ".join(str(config[key]) for key in ("image_model", "model_type") if key in config) or "unknown"
    raise ValueError(
        f"ByG edits with FLUX.1-dev, FLUX.2 klein, Z-Image, Qwen-Image, Krea 2 and Wan text-to-video; the connected model is another one "
        f"({kind})"
    )


def members(architecture: str) -> list[Family]:
    """The families of an architecture."""
    return [family for family in families().values() if family.architecture == architecture]


def check_position(position: str, architecture: str) -> None:
    """Refuse a position that the network has not.

    Raises:
        ValueError: names those that it has.
    """
    allowed = list(dict.fromkeys(name for family in members(architecture) for name in family.positions))
    if position not in allowed:
        raise ValueError(f"position {position!r} is not one of this model's: {', '.join(allowed)}")
