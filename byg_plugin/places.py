"""Whether the models and LoRAs that a run names are there: asked before anything is imported that reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from byg_plugin import families

if TYPE_CHECKING:
    from byg_plugin.config.sections import ModelConfig

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
ENCODERS, NETWORKS = ("t5", "clip"), ("transformer", "transformer_2")


def check_model(model: ModelConfig, *parts: str) -> None:
    """Whether the places of these parts of the base model are there; those that the family has not are passed over.

    Raises:
        ValueError: one is not set, or is neither here nor a hub id.
    """
    spec = model.spec
    own = {*spec.experts, "vae", *spec.text_encoders}
    for part in parts:
        if part in own:
            check_path(model.part(part), f"model.{part if getattr(model, part) else 'path'} = ")


def check_path(path_or_id: str, label: str) -> None:
    """Whether a file or folder is there, or a name can be a hub id; `label` stands before it, e.g. `--model `.

    Raises:
        ValueError: neither.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists() and not (HUB_ID.match(path_or_id) and path.suffix.lower() != ".safetensors"):
        raise ValueError(f"{label}{path_or_id}: no such file or folder; give one that is there, or a hub id like owner/name")


def check_lora(lora: str, label: str) -> None:
    """Whether a LoRA is there: the file itself, either file of a pair, or one of those that a pair's common name means.

    Raises:
        ValueError: it is not.
    """
    path = Path(lora).expanduser()
    names = (path.name, *(f"{path.stem}{suffix}.safetensors" for suffix in families.EXPERT_SUFFIXES.values()))
    if not any(path.with_name(name).is_file() for name in names):
        raise ValueError(f"{label}{lora}: no such file; give a LoRA as .safetensors")
