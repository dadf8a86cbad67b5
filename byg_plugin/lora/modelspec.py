"""What ComfyUI's and model sites' browsers show of a LoRA: the `modelspec.*` keys of its header.

Source: Stability AI's ModelSpec 1.0.0, with the values that sd-scripts and musubi-tuner (`utils/sai_model_spec.py`) write.
The hashes beside them are of `files.write_lora`, which knows the tensors.
"""

from __future__ import annotations

from byg_plugin.families import SPECS
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.check import runtime
from byg_plugin.lora.files import HASHES

PREFIX = "modelspec."


def metadata_of(card: LoraCard, title: str, *, date: str, thumbnail: str | None = None) -> dict[str, str]:
    """The header's keys and values; the hashes are empty until the file is written.

    Args:
        card: of the file.
        title: what it is called, its stem.
        date: ISO 8601, to the second.
        thumbnail: a picture as `data:image/jpeg;base64,...`.
    """
    spec = SPECS[str(card.family)]
    assert spec.modelspec is not None, f"{spec.name} is written by no trainer"
    architecture, implementation = spec.modelspec
    expert = "" if card.expert in (None, "both") else f" of the {str(card.expert).replace('_', '-')} expert"
    keys = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/lora",
        "implementation": implementation,
        "title": title,
        "description": f"Edits by instruction (byg_plugin {card.version}). LoRA{expert} on {card.base}, rank {card.rank}, "
        f"{card.weights} weights after {card.step} steps; source tokens at position {card.position!r}.",
        "date": date,
        "resolution": f"{card.resolution}x{card.resolution}",
        "usage_hint": f"Give a source and an instruction. ComfyUI {runtime('comfyui', card)}. diffusers {runtime('diffusers', card)}.",
    }
    if thumbnail is not None:
        keys["thumbnail"] = thumbnail
    return {PREFIX + key: value for key, value in keys.items()} | dict.fromkeys(HASHES, "")
