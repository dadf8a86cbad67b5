"""The pixels of an item: source, edit, ground truth and mask, frame by frame in one size.

The edit's size counts. Sources, references and masks are scaled so that they just cover it and cropped at the centre, as edit.py
prepares what it edits. In folders of other tools' edits the shapes may differ by 2 % at most: more would compare other things.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from byg_plugin.data.buckets import cover
from byg_plugin.data.clips import Clip, clip_info, is_clip, read_clip
from byg_plugin.data.media import image_size, load_image
from byg_plugin.evaluation.items import Item, kind

_MOST_CUT = 0.02  # of a side
_RATES_EQUAL = 0.01  # of a rate: files round their clocks


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What metrics see of an item.

    Attributes:
        item: whose.
        source, edit, reference: (F, H, W, 3) uint8 of one shape; F = 1 for an image.
        outside: (H, W) bool, what must not change; None where there is no mask.
    """

    item: Item
    source: np.ndarray
    edit: np.ndarray
    reference: np.ndarray | None = None
    outside: np.ndarray | None = None

    @property
    def is_clip(self) -> bool:
        """Whether it has frames that follow one another."""
        return is_clip(self.item.edit)


def problems(item: Item) -> Iterator[str]:
    """Why an item's files do not go together, by their heads alone; all of them exist."""
    for role in ("source", "reference", "mask"):
        path: Path | None = getattr(item, role)
        if path is None:
            continue
        if role != "mask" and kind(path) != kind(item.edit):
            yield f"{item.id}: the {role} {path.name} is {_a(path)} and the edit {item.edit.name} {_a(item.edit)}"
            continue
        try:
            yield from (f"{item.id}: {reason}" for reason in _differences(item, role, path))
        except ValueError as error:
            yield f"{item.id}: {error}"


def look(item: Item) -> Seen:
    """The pixels of an item.

    Raises:
        ValueError: a file cannot be read, or they do not go together; names it.
    """
    refused = next(problems(item), None)
    if refused:
        raise ValueError(refused)
    edit, size, count = _edit(item)
    return Seen(
        item=item,
        source=_fitted(item.source, size, count),
        edit=edit,
        reference=None if item.reference is None else _fitted(item.reference, size, count),
        outside=None if item.mask is None else _outside(item.mask, size),
    )


def _edit(item: Item) -> tuple[np.ndarray, tuple[int, int], int]:
    """Frames, (width, height) and number of frames."""
    if not is_clip(item.edit):
        image = load_image(item.edit)
        return np.asarray(image)[None], image.size, 1
    info = clip_info(item.edit)
    # H.264 stores even sides: what was added for that is no part of the edit.
    width, height = size = item.size or info.size
    frames = np.stack([np.asarray(frame)[:height, :width] for frame in read_clip(item.edit, info.frames)])
    return frames, size, info.frames


def _fitted(path: Path, size: tuple[int, int], count: int) -> np.ndarray:
    frames: Iterable[Image.Image] = read_clip(path, count) if is_clip(path) else [load_image(path)]
    return np.stack([np.asarray(cover(frame, size)) for frame in islice(frames, count)])


def _outside(mask: Path, size: tuple[int, int]) -> np.ndarray:
    """What must not change; the mask lies on the source, and is cropped as it is."""
    return np.asarray(cover(load_image(mask), size, resample=Image.Resampling.NEAREST).convert("L")) < 128


def _differences(item: Item, role: str, path: Path) -> Iterator[str]:
    have, edit = _head(path), _head(item.edit)
    size = item.size or edit.size
    across, down = have.size[0] / size[0], have.size[1] / size[1]
    # edit.py crops sources to its sizes, which its manifest knows; nobody else's edit shows another part of its source.
    if item.size is None and max(across, down) / min(across, down) > 1 + _MOST_CUT:
        yield f"the {role} {path.name} has {_x(have.size)} pixels and the edit {_x(size)}: other shapes; crop one as the other"
    if not is_clip(item.edit) or role == "mask":
        return
    if have.frames < edit.frames:
        yield f"the {role} {path.name} has {have.frames} frames and the edit {edit.frames}; cut the edit"
    if abs(have.fps / edit.fps - 1) > _RATES_EQUAL:
        yield f"the {role} {path.name} has {have.fps:g} frames a second and the edit {edit.fps:g}; give both one rate"


def _head(path: Path) -> Clip:
    return clip_info(path) if is_clip(path) else Clip(size=image_size(path), frames=1, seconds=0.0)


def _a(path: Path) -> str:
    return f"{'an' if kind(path) == 'image' else 'a'} {kind(path)}"


def _x(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))
