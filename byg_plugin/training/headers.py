"""The header of a LoRA file that a run writes: its card, and what model browsers show."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from byg_plugin.config.sections import Config, OutputConfig
from byg_plugin.lora import modelspec
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.files import hashed
from byg_plugin.models.base import Family
from byg_plugin.training import preview


def header(
    config: Config, family: Family, tensors: Mapping[str, Tensor], *, step: int, weights: str, title: str, suffix: str
) -> dict[str, str]:
    """Keys and values of a file's metadata.

    Args:
        config, family: of the run.
        tensors: of the file.
        step: optimizer steps that were made.
        weights: `live` or `ema`.
        title: the file's stem.
        suffix: of the stem, which names the expert of a pair.
    """
    card = LoraCard.of(config, step, weights, family, suffix)
    picture = preview.thumbnail(config.output) if config.output.thumbnail else None
    shown = modelspec.metadata_of(card, title, date=datetime.now().isoformat(timespec="seconds"), thumbnail=picture)
    return hashed(tensors, card.to_metadata() | shown)


def exported(path: Path, output: OutputConfig) -> bytes:
    """A checkpoint's LoRA file as the run leaves it: it was saved before the previews of its step, whose picture it gets.

    Args:
        path: in the checkpoint.
        output: of the run.

    Raises:
        OSError: it cannot be read.
    """
    picture = preview.thumbnail(output) if output.thumbnail else None
    if picture is None:
        return path.read_bytes()
    with safe_open(path, framework="pt") as file:  # our own: nothing of it is doubted here
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        return save(tensors, metadata=file.metadata() | {f"{modelspec.PREFIX}thumbnail": picture})
