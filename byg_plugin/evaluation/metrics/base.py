"""What a metric is, and what several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from byg_plugin.data.placeholders import known
from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.items import Item

Scores = dict[str, float | None]
"""By column; None where the item has not what the column needs (a mask, frames that follow one another)."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What metrics with a model are given.

    Attributes:
        clip, dino: folder or hub id of the model.
        lpips_net: alex, vgg or squeeze.
        device: cpu or cuda.
        judged: files of judge.py's answers.
        vie_reading: official or paper; see `metrics/viescore.py`.
        aesthetic: the linear head; see `metrics/aesthetic.py`.
        cotracker: the tracker's weights; see `metrics/motion.py`.
    """

    clip: str = "openai/clip-vit-large-patch14"
    dino: str = "facebook/dino-vits16"
    lpips_net: str = "alex"
    device: str = "cpu"
    judged: tuple[Path, ...] = ()
    vie_reading: str = "official"
    aesthetic: Path | None = None
    cotracker: Path | None = None


class Metric(Protocol):
    """A metric: made from `Options`, which loads its model, then called with each item's pixels.

    Attributes:
        columns: what it gives, each with whether more is better.
        texts: fields of an item that it needs.
    """

    columns: ClassVar[Mapping[str, bool]]
    texts: ClassVar[tuple[str, ...]]

    @property
    def settings(self) -> Mapping[str, Any]:
        """What its scores depend on beside the item; scores of other settings are made anew."""
        ...

    def __call__(self, seen: Seen) -> Scores:
        """The scores of one item."""
        ...


def check_device(device: str, said: str, remedy: str) -> None:
    """Refuse CUDA where there is none; `said` names the option with its value.

    Raises:
        ValueError: it is asked for and torch finds no such device; with the remedy.
    """
    if device != "cuda":
        return
    import torch  # not above: it takes seconds

    if not torch.cuda.is_available():
        raise ValueError(f"{said}: torch finds no CUDA device; {remedy}")


def missing_texts(metric: str, texts: tuple[str, ...], item: Item) -> list[str]:
    """Problems: what a metric needs of an item's texts and does not find."""
    lacking = [name for name in texts if known(name, getattr(item, name)) is None]
    return [f"{item.id}: {metric} needs {' and '.join(lacking)}; give tuples, or leave {metric} out of --metrics"] if lacking else []


def unit(pixels: np.ndarray) -> np.ndarray:
    """uint8, or floats in [0, 1], as float64 in [0, 1].

    Raises:
        ValueError: floats beyond [0, 1], such as [-1, 1] or 0 to 255, or another type.
    """
    if pixels.dtype == np.uint8:
        return pixels / 255
    if not np.issubdtype(pixels.dtype, np.floating) or not (pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"pixels are uint8, or floats in [0, 1], not {pixels.dtype} from {pixels.min()} to {pixels.max()}")
    return pixels.astype(np.float64)


class Compared:
    """A metric that is a distance, or a likeness, of frames: of the edit to the source, to it outside the mask and to the ground truth.

    A subclass says its name and whether more is better; columns are `<name>_source`, `<name>_outside` and `<name>_truth`.
    """

    columns: ClassVar[Mapping[str, bool]]
    texts: ClassVar[tuple[str, ...]] = ()
    settings: Mapping[str, Any] = {}

    def __init_subclass__(cls, *, name: str, more_is_better: bool):
        cls.columns = dict.fromkeys((f"{name}_source", f"{name}_outside", f"{name}_truth"), more_is_better)

    def __init__(self, options: Options):
        """Needs nothing, unless the subclass says otherwise."""

    def distance(self, one: np.ndarray, other: np.ndarray, where: np.ndarray | None) -> float | None:
        """Of two frames (H, W, 3) over the pixels of a (H, W) bool (None: all); None where it is not defined."""
        raise NotImplementedError

    def __call__(self, seen: Seen) -> Scores:
        """Three columns, means over the frames."""
        outside = None if seen.outside is None or not seen.outside.any() else seen.outside
        values = (
            _mean(self.distance(*pair, None) for pair in zip(seen.edit, seen.source, strict=True)),
            None if outside is None else _mean(self.distance(*pair, outside) for pair in zip(seen.edit, seen.source, strict=True)),
            None if seen.reference is None else _mean(self.distance(*pair, None) for pair in zip(seen.edit, seen.reference, strict=True)),
        )
        return dict(zip(self.columns, values, strict=True))


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
