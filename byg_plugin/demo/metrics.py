"""Exact metrics of edits of the tiny world, read from pixels. Fixed before any editor was tuned; not to be changed.

- **edit**: at least 80 % of the pixels that the edit must change are nearest the colour they must get.
- **preserved**: the mean absolute error to the source over the pixels that must not change is at most 0.06 (colours
  in 0..1), and every bystander (object, and the background when an object is edited) keeps its colour on 80 % of its
  pixels.
- **joint** (the headline): edit, preserved, and an intersection over union of at least 0.8 between the pixels whose
  colour name changed and those that had to change. (Asked for here, not for "preserved": joint success is the same.)

Since these rules were fixed, recolouring and the other edits of what is there score as they did, pinned by golden values
in tests/demo/test_metrics.py; adding came with all six edit types, and what reads the base's samples (`follows_caption`)
followed the world, all before the first reported run.

Pixels on the edge of two regions are counted nowhere. The pebble's survival is reported and not required.

An instruction to add an object names a corner and leaves its size and the place in there free: it is scored where the
picture has it. It must be of the named shape, of about the world's sizes, in that corner, wholly in the picture and clear
of what the source shows, or the edit fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from byg_plugin.demo import world

EDIT_SHARE = 0.8  # of pixels
KEEP_ERROR = 0.06  # mean absolute error, colours in 0..1
MASK_IOU = 0.8
PEBBLE_ERROR = 0.15  # mean absolute error over the pebble's pixels
ADDED_RADIUS = (0.8 * world.OBJECT_RADIUS[0], 1.2 * world.OBJECT_RADIUS[1])  # pixels

Table = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Score:
    """One edit: shares and errors in 0..1, verdicts as bools; `pebble` is None when no pixel is wholly its own."""

    edit_share: float
    outside_error: float
    iou: float
    edit: bool
    preserved: bool
    joint: bool
    pebble: bool | None


def score(image: np.ndarray, edit: world.Edit, *, in_corner: bool = True) -> Score:
    """Compare an edited `(SIZE, SIZE, 3)` uint8 image with the exact edit.

    An added object's size and place in its corner are free; without `in_corner`, its place in the picture.
    """
    _check(image, edit.id)
    source = world.render(edit.before)
    error = np.abs(image.astype(float) - source) / 255
    error = error.mean(-1)
    labels = world.nearest_labels(image)
    seen = added_object(labels, edit) if edit.edit_type == "add" else edit.after
    if seen and in_corner and [world.corner(one) for one in seen.things] != [world.corner(one) for one in edit.after.things]:
        seen = None
    after = seen or edit.after
    must, keep = world.true_mask(edit.before, after)
    wanted, had = world.true_labels(after), world.true_labels(edit.before)
    share = float((labels == wanted)[must].mean())
    outside = float(error[keep].mean())
    changed = (labels != had) & (must | keep)
    iou = _overlap(changed, must)
    edited = seen is not None and share >= EDIT_SHARE
    preserved = outside <= KEEP_ERROR and _bystanders_survive(labels, edit, keep)
    pebble = world.regions(edit.before) == world.PEBBLE
    return Score(
        edit_share=share,
        outside_error=outside,
        iou=iou,
        edit=edited,
        preserved=preserved,
        joint=edited and preserved and iou >= MASK_IOU,
        pebble=bool(error[pebble].mean() <= PEBBLE_ERROR) if pebble.any() else None,
    )


def _check(image: np.ndarray, name: str) -> None:
    shape = (world.SIZE, world.SIZE, 3)
    if image.shape != shape or image.dtype != np.uint8:
        raise ValueError(f"edit {name!r} is {image.dtype} {image.shape}: metrics read uint8 RGB images, {shape}")


def added_object(labels: np.ndarray, edit: world.Edit) -> world.Scene | None:
    """The scene after an "add" with the new object where the picture has it, in whichever corner; None where it has none."""
    (new,) = (thing for thing in edit.after.things if thing not in edit.before.things)
    free = world.regions(edit.before) == world.BACKGROUND
    seen = largest_piece(solid(free & (labels == world.LABELS.index(new.colour))))
    if not seen.any():
        return None
    changed = free & (labels != world.LABELS.index(edit.before.background))
    fits = {shape: _settled(shape, seen, changed) for shape in world.SHAPES}
    if max(fits, key=lambda shape: _overlap(world.inside(shape, *fits[shape]), changed)) != new.shape:
        return None
    x, y, radius = fits[new.shape]
    if not ADDED_RADIUS[0] <= radius <= ADDED_RADIUS[1] or not _is_clear(new.shape, x, y, radius, free):
        return None
    return replace(edit.before, things=(*edit.before.things, replace(new, x=x, y=y, radius=radius)))


def _settled(shape: str, seen: np.ndarray, changed: np.ndarray) -> tuple[float, float, float]:
    """A shape (x, y, radius) with the extent of its colour's pixels, then moved a little to cover what changed best.

    Colours mixed on its edge can be nearest a third one (red on blue is purple): its own pixels alone are then a ring
    too small. A triangle's tip comes and goes.
    """
    x, y, radius = _placed(seen, shape)
    shift = (0, -0.5, 0.5)
    options = [(x + i, y + j, radius + k) for k in (0, 0.5, 1, 1.5, -0.5) for j in shift for i in shift]
    return max(options, key=lambda at: _overlap(world.inside(shape, *at), changed))


def _is_clear(shape: str, x: float, y: float, radius: float, free: np.ndarray) -> bool:
    """Whether an object covers `free` pixels only and none of the outermost ones; its outline is known to a pixel."""
    pixels = world.inside(shape, x, y, radius - 1)
    frame = np.pad(np.zeros_like(pixels[1:-1, 1:-1]), 1, constant_values=True)
    return not (pixels & (frame | ~free)).any()


def _bystanders_survive(labels: np.ndarray, edit: world.Edit, keep: np.ndarray) -> bool:
    """Whether each region that the edit leaves alone still has its colour on `EDIT_SHARE` of its pixels."""
    where, had = world.regions(edit.before), world.true_labels(edit.before)
    for region in (world.BACKGROUND, *range(world.FIRST_OBJECT, world.FIRST_OBJECT + len(edit.before.things))):
        pixels = (where == region) & keep
        # Below half, what remains of a region is the part of an edited one that happens not to change.
        if pixels.sum() >= 0.5 * (where == region).sum() and (labels == had)[pixels].mean() < EDIT_SHARE:
            return False
    return True


def evaluate(edits: Mapping[str, np.ndarray], tuples: Sequence[Any], scorer: Callable[[np.ndarray, Any], Any] = score) -> Table:
    """Score the edited image (or clip, by its own scorer) of every tuple, by its id, and average: a row an edit type and "all"."""
    if not tuples:
        raise ValueError("there are no tuples to evaluate: write an eval split with at least one")
    missing = [edit.id for edit in tuples if edit.id not in edits]
    if missing:
        raise ValueError(f"{len(missing)} of {len(tuples)} tuples lack an edited image, first {missing[0]!r}: edit them")
    scores = [(edit.edit_type, scorer(edits[edit.id], edit)) for edit in tuples]
    kinds = [*dict.fromkeys(sorted(kind for kind, _ in scores)), "all"]
    return {kind: _average([s for name, s in scores if kind in (name, "all")]) for kind in kinds}


def _average(scores: list[Any]) -> dict[str, float]:
    rows = [asdict(s) for s in scores]
    means = {"n": float(len(rows))}
    for name in rows[0]:
        known = [float(row[name]) for row in rows if row[name] is not None]
        means[name] = float(np.mean(known)) if known else float("nan")
    return means


def baselines(tuples: Sequence[world.Edit]) -> dict[str, Table]:
    """What the exact edit and the untouched source score: the two ends that every table shows."""
    return {
        "ground truth": evaluate({edit.id: world.render(edit.after) for edit in tuples}, tuples),
        "copy the source": evaluate({edit.id: world.render(edit.before) for edit in tuples}, tuples),
    }


_COLUMNS = {
    "joint": "joint", "edit": "edit", "preserved": "source preserved", "pebble": "pebble kept",
    "iou": "mask IoU", "outside_error": "error outside",
    "tracked": "shape in every frame", "trajectory_error": "trajectory error (px)", "flicker": "flicker",
}  # fmt: skip
_PERCENT = ("joint", "edit", "preserved", "pebble", "tracked")


def markdown(tables: Mapping[str, Table]) -> str:
    """Tables by method as one Markdown table, a row for each method and edit type."""
    columns = {name: title for name, title in _COLUMNS.items() if all(name in row for table in tables.values() for row in table.values())}
    lines = ["| method | edits | n | " + " | ".join(columns.values()) + " |", "|---" * (3 + len(columns)) + "|"]
    for method, table in tables.items():
        for kind, row in table.items():
            cells = " | ".join(_cell(name, row[name]) for name in columns)
            lines.append(f"| {method} | {kind} | {row['n']:.0f} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(name: str, value: float) -> str:
    if np.isnan(value):
        return "-"
    return f"{100 * value:.1f} %" if name in _PERCENT else f"{value:.3f}"


def write_tables(folder: str | Path, tables: Mapping[str, Table]) -> None:
    """Write `figures.json` (what is not known: null) and `figures.md` into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = {
        method: {kind: {name: None if np.isnan(value) else value for name, value in row.items()} for kind, row in table.items()}
        for method, table in tables.items()
    }
    (folder / "figures.json").write_text(json.dumps(known, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "figures.md").write_text(markdown(tables), encoding="utf-8")


# --- samples of the base -------------------------------------------------------------------------------------------


def follows_caption(image: np.ndarray, scene: world.Scene) -> tuple[bool, bool]:
    """Whether a text-to-image sample has all the colours, and all the shapes, that the scene's caption names.

    Colours: the background's covers at least half of the picture, each object's at least 2 % in the corner that the
    caption names, and no other colour, nor an object's elsewhere, has solid parts of more than 1 % in all. Shapes: each
    named one fits what has its object's colour in its corner best, with an intersection over union of at least 0.75.
    """
    labels = world.nearest_labels(image)
    corners = {thing.colour: _corner(thing) for thing in scene.things}
    shapes = (is_shape((labels == world.LABELS.index(thing.colour)) & corners[thing.colour], thing.shape) for thing in scene.things)
    return colours_right(labels, scene.background, corners), all(shapes)


def colours_right(labels: np.ndarray, background: str, corners: Mapping[str, np.ndarray]) -> bool:
    """The rule of `follows_caption`; `corners` says in which pixels (bool) each object's colour has to be."""
    own = {name: (labels == world.LABELS.index(name)) & corners.get(name, True) for name in world.COLOURS}
    stray = [(labels == world.LABELS.index(name)) & ~corners.get(name, np.False_) for name in world.COLOURS if name != background]
    return bool(
        own[background].mean() >= 0.5
        and all(own[name].mean() >= 0.02 for name in corners)
        and sum(solid(pixels).mean() for pixels in stray) <= 0.01
    )


def _corner(thing: world.Thing) -> np.ndarray:
    """Pixels of the quadrant that an object lies in: bool `(SIZE, SIZE)`."""
    half = np.arange(world.SIZE) < world.SIZE / 2
    return (half == (thing.y < world.SIZE / 2))[:, None] & (half == (thing.x < world.SIZE / 2))


def is_shape(pixels: np.ndarray, shape: str) -> bool:
    """Whether what is solid of a mask fits a shape best, with an intersection over union of at least 0.75."""
    piece = solid(pixels)
    if not piece.any():
        return False
    fits = {name: _overlap(world.inside(name, *_settled(name, piece, piece)), piece) for name in world.SHAPES}
    return max(fits, key=fits.__getitem__) == shape and fits[shape] >= 0.75


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two bool masks that are not both empty."""
    return float((one & other).sum() / (one | other).sum())


def _placed(pixels: np.ndarray, shape: str) -> tuple[float, float, float]:
    """Centre x, y and radius in pixels of the shape that has the extent of a bool mask with at least one pixel."""
    rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
    top, left = rows[0], columns[0]
    height, width = rows[-1] + 1 - top, columns[-1] + 1 - left
    radius = {"circle": (height + width) / 4, "square": (height + width) / 4 * 2**0.5, "triangle": height / 1.5}
    below = {"circle": height / 2, "square": height / 2, "triangle": radius["triangle"]}  # centre below the top
    return float(left + width / 2), float(top + below[shape]), float(radius[shape])


def _around(mask: np.ndarray, how: np.ufunc, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    grown = np.pad(mask, 1)
    return how.reduce([grown[i : i + mask.shape[0], j : j + mask.shape[1]] for i, j in offsets])


def solid(pixels: np.ndarray) -> np.ndarray:
    """What hangs together with a full 3 x 3 block of the mask: mixed colours on other things' edges are thin."""
    return _grown(_around(pixels, np.logical_and, [(i, j) for i in range(3) for j in range(3)]), pixels)


def _grown(part: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """All of `pixels` that hangs together, side by side, with `part` of it."""
    while True:
        grown = _around(part, np.logical_or, [(1, 1), (0, 1), (2, 1), (1, 0), (1, 2)]) & pixels
        if (grown == part).all():
            return part
        part = grown


def largest_piece(pixels: np.ndarray) -> np.ndarray:
    """The largest part of a mask that hangs together; an empty mask's is empty."""
    largest, left = np.zeros_like(pixels), pixels.copy()
    while left.any():
        seed = np.zeros_like(pixels)
        seed.flat[left.argmax()] = True
        piece = _grown(seed, left)
        left &= ~piece
        largest = max(largest, piece, key=np.sum)
    return largest
