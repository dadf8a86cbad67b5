"""The card in the header of a LoRA file: which family it was trained for, and how."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_LONGEST_HEADER = 100 * 2**20  # bytes, safetensors' own limit
_SUFFIX = re.compile(r"\.(lora_A|lora_B|lora_down|lora_up)(\.default)?(\.weight)?$|\.(alpha|dora_scale|diff|diff_b)$")
_EXPERTS = ("_high_noise", "_low_noise")
SAMPLERS = {"euler": "euler", "stochastic": "lcm"}
"""What a card calls a sampler -> ComfyUI's name. The stochastic one predicts the data and goes on with fresh noise, without guidance."""
FEW_STEPS = "stochastic"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What an edit needs of it; None is what the file does not say.

    Attributes:
        family: a name of `families.json`.
        position: of the source tokens.
        guidance: of FLUX.1's guidance embedding.
        schedule: `shifted` or `uniform`.
        max_text_tokens: to which FLUX.1's texts were padded.
        resolution: side in pixels of the square with as many pixels as the trained pictures.
        boundary: t from which the high-noise network serves.
        expert: `high_noise`, `low_noise` or `both`, of a family of two networks.
        step: optimizer steps that were made.
        base: name of the frozen network's file.
        sampler: a key of `SAMPLERS`.
        steps: of that sampler, as it was trained; None: those of the family.
    """

    family: str
    position: str
    guidance: float | None = None
    schedule: str = "shifted"
    max_text_tokens: int | None = None
    resolution: int | None = None
    boundary: float | None = None
    expert: str | None = None
    step: int | None = None
    base: str | None = None
    sampler: str = "euler"
    steps: int | None = None

    @property
    def guided(self) -> bool:
        """Whether an edit has guidance by a second call; a few-step editor has none."""
        return self.sampler != FEW_STEPS


def read_header(path: str | Path) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Metadata, and the shape of each tensor, of a safetensors file.

    Raises:
        ValueError: it is none, or cut off.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"{path.name} is no safetensors file, or it is cut off: download it again")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        return metadata, {key: tuple(entry["shape"]) for key, entry in header.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is no safetensors file: its header cannot be read") from error


def card_of(metadata: Mapping[str, str], name: str) -> Card:
    """The card in a header.

    Args:
        metadata: of the header.
        name: of the file, for messages.

    Raises:
        ValueError: there is none, it is damaged, or it names a sampler that these nodes have not.
    """
    if "byg.family" not in metadata or "byg.position" not in metadata:
        raise ValueError(
            f"{name} has no ByG card: byg_plugin has not trained it, or a tool has dropped its metadata. How its source tokens are placed "
            "is unknown: load it with ComfyUI's own LoRA loader and choose the position in ByG Source yourself"
        )

    if (sampler := metadata.get("byg.sampler", "euler")) not in SAMPLERS:
        raise ValueError(
            f"{name} edits in {metadata.get('byg.steps', 'a few')} {sampler} steps, which these nodes do not make: update them, or use "
            "byg_plugin's edit.py"
        )

    def number(key: str, kind: type[int] | type[float]) -> float | int | None:
        text = metadata.get(f"byg.{key}")
        try:
            return None if text is None else kind(text)
        except ValueError as error:
            raise ValueError(f"{name}: the card is damaged, byg.{key} = {text!r} is no number: download the file again") from error

    return Card(
        family=metadata["byg.family"],
        position=metadata["byg.position"],
        guidance=number("guidance", float),
        schedule=metadata.get("byg.schedule", "shifted"),
        max_text_tokens=number("max_text_tokens", int),
        resolution=number("resolution", int),
        boundary=number("boundary", float),
        expert=metadata.get("byg.expert"),
        step=number("step", int),
        base=metadata.get("byg.base"),
        sampler=sampler,
        steps=number("steps", int),
    )


def layer_of(key: str) -> str:
    """The layer that a tensor of a LoRA belongs to."""
    return _SUFFIX.sub("", key)


def partner_of(name: str) -> str | None:
    """The low-noise file's name beside a high-noise file's; None: the name is none of a high-noise file."""
    high, low = _EXPERTS
    return low.join(name.rsplit(high, 1)) if high in name else None
