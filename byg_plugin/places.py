"""Whether the models and LoRAs that a run names are there: asked before anything is imported that reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byg_plugin import families
from byg_plugin.documents import json_value

if TYPE_CHECKING:
    from byg_plugin.config.sections import ModelConfig

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
ENCODERS, NETWORKS = families.TEXT_ENCODERS, tuple(families.EXPERT_SUFFIXES)


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


def check_not_distilled(model: ModelConfig) -> None:
    """Whether the network's configuration or name says that it was distilled to few steps; silent where neither does.

    Raises:
        ValueError: it does; names what says so.
    """
    for key, where in (("transformer", model.transformer), ("path", model.path)):
        if where is None:
            continue
        index, distilled = _said_by_index(Path(where).expanduser())
        if distilled is None:
            said = _said_by_name(model, where) or _said_by_scheduler(model, Path(where).expanduser())
        else:
            said = f"{index} says is_distilled" if distilled else None
        if said is not None:
            raise ValueError(
                f"model.{key} = {where}: distilled weights ({said}), whose velocities are no longer those of its data: training on them "
                "gives grey blocks; train on the base model, or say --allow-distilled"
            )
        return  # model.transformer overrides model.path


def _said_by_index(path: Path) -> tuple[Path | None, bool | None]:
    """The model_index.json of a diffusers folder or beside a part of it, and its `is_distilled`; None where it has none."""
    for folder in (path, path.parent):
        index = folder / "model_index.json"
        if index.is_file():
            said = _object(index).get("is_distilled")
            return index, said if isinstance(said, bool) else None
    return None, None


def _object(path: Path) -> dict[str, Any]:
    try:
        content = json_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    return content if isinstance(content, dict) else {}


def _said_by_name(model: ModelConfig, where: str) -> str | None:
    name = _telling_name(where)
    pattern = model.spec.distilled
    return f"by its name, {name}" if pattern is not None and re.search(pattern, name) else None


def _telling_name(where: str) -> str:
    """The last name of a place that somebody chose: none of a diffusers folder's own, nor a snapshot's in the hub's cache."""
    names = where.replace("\\", "/").rstrip("/").split("/")
    while len(names) > 1 and (names[-1] == "transformer" or names[-1].startswith("diffusion_pytorch_model")):
        names.pop()
    return names[-3] if len(names) > 2 and names[-2] == "snapshots" else names[-1]


def _said_by_scheduler(model: ModelConfig, path: Path) -> str | None:
    """A diffusers folder's own shift, where the base's is one number and a distilled model has another."""
    wanted = model.spec.shift
    file = next((one for one in (folder / "scheduler" / "scheduler_config.json" for folder in (path, path.parent)) if one.is_file()), None)
    if model.spec.distilled is None or not isinstance(wanted, float) or file is None:
        return None
    shift = _object(file).get("shift")
    return f"{file} has shift {shift}, the base has {wanted}" if isinstance(shift, int | float) and shift != wanted else None


def check_path(path_or_id: str, label: str) -> None:
    """Whether a file or folder is there, or a name can be a hub id; `label` stands before it, e.g. `--model `.

    Raises:
        ValueError: neither.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists() and not (HUB_ID.match(path_or_id) and path.suffix.lower() != ".safetensors"):
        raise ValueError(f"{label}{path_or_id}: no such file or folder; give one that is there, or a hub id like owner/name")


def check_lora(lora: str, label: str) -> None:
    """Whether a LoRA is there: see `lora_at`.

    Raises:
        ValueError: it is not.
    """
    if not lora_at(lora):
        raise ValueError(f"{label}{lora}: no such file; give a LoRA as .safetensors")


def lora_at(lora: str) -> list[Path]:
    """What is there of a LoRA: the file itself, either file of a pair, or those of a pair that its common name means."""
    path = Path(lora).expanduser()
    names = (path.name, *(f"{path.stem}{suffix}.safetensors" for suffix in families.EXPERT_SUFFIXES.values()))
    return [path.with_name(name) for name in names if path.with_name(name).is_file()]
