"""Exact metrics of edits of moving clips, read from pixels. Fixed before any editor was tuned; not to be changed.

A clip is judged frame by frame with the rules of the image world (`metrics.py`), and a verdict holds for the clip when it
holds in every frame:

- **edit**, **preserved**, **joint**: in every frame. Shares and errors are means over the frames.
- **pebble**: the bystander survives in every frame.
- **trajectory error**: pixels between the centre of the edited shape and where the source has it, mean over the frames. The
  centre is that of the largest piece of the colour that the shape must have; a clip in which some frame has none is not
  *tracked* and has no error. There is none for adding and removing.
- **flicker**: how much what must not change moves against the source from frame to frame: mean absolute change of the
  difference to the source between neighbouring frames (colours in 0..1), over the pixels that must not change in either.

An added object's place and size are free, as in the image world: it must start in the named corner, be of the named shape
and colour in every frame, and go the named way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from byg_plugin.demo import metrics, video_world, world
from byg_plugin.demo.video_world import ClipEdit, Motion

LEAST_TRAVEL = video_world.TRAVEL[0] / 2  # pixels along the named way that count as going it
_ENDS = ("add", "remove")  # the object is not in both


@dataclass(frozen=True)
class Score:
    """One edited clip; see the module. `pebble`, `tracked` and `trajectory_error` (pixels) are None where there is none."""

    edit_share: float
    outside_error: float
    iou: float
    edit: bool
    preserved: bool
    joint: bool
    pebble: bool | None
    tracked: bool | None
    trajectory_error: float | None
    flicker: float


def score(clip: np.ndarray, edit: ClipEdit) -> Score:
    """Compare an edited `(FRAMES, SIZE, SIZE, 3)` uint8 clip with the exact edit."""
    _check(clip, edit.id)
    frames = [metrics.score(image, each, in_corner=number == 0) for number, (image, each) in enumerate(zip(clip, edit.frames, strict=True))]
    made = all(frame.edit for frame in frames) and (edit.edit_type != "add" or _added_goes(clip, edit))
    preserved = all(frame.preserved for frame in frames)
    pebbles = [frame.pebble for frame in frames if frame.pebble is not None]
    errors = trajectory_errors(clip, edit) if edit.edit_type not in _ENDS else None
    return Score(
        edit_share=float(np.mean([frame.edit_share for frame in frames])),
        outside_error=float(np.mean([frame.outside_error for frame in frames])),
        iou=float(np.mean([frame.iou for frame in frames])),
        edit=made,
        preserved=preserved,
        joint=made and preserved and all(frame.joint for frame in frames),
        pebble=all(pebbles) if pebbles else None,
        tracked=None if errors is None else not np.isnan(errors).any(),
        trajectory_error=None if errors is None or np.isnan(errors).any() else float(np.mean(errors)),
        flicker=flicker(clip, edit),
    )


def _check(clip: np.ndarray, name: str) -> None:
    shape = (video_world.FRAMES, world.SIZE, world.SIZE, 3)
    if clip.shape != shape or clip.dtype != np.uint8:
        raise ValueError(f"edit {name!r} is {clip.dtype} {clip.shape}: metrics read uint8 RGB clips, {shape}")


def trajectory_errors(clip: np.ndarray, edit: ClipEdit) -> np.ndarray:
    """Pixels between the edited shape's centre and the source's in each frame, NaN where it is not found: (FRAMES,)."""
    errors = []
    for image, each in zip(clip, edit.frames, strict=True):
        found, true = centre(image, each.after.things[0].colour), each.before.things[0]
        errors.append(np.nan if found is None else float(np.hypot(found[0] - true.x, found[1] - true.y)))
    return np.array(errors)


def centre(image: np.ndarray, colour: str) -> tuple[float, float] | None:
    """(x, y) in pixels of the largest solid piece of a colour, which is a shape's centre; None where there is none."""
    piece = metrics.largest_piece(metrics.solid(world.nearest_labels(image) == world.LABELS.index(colour)))
    if not piece.any():
        return None
    rows, columns = np.nonzero(piece)
    return float(columns.mean()) + 0.5, float(rows.mean()) + 0.5


def flicker(clip: np.ndarray, edit: ClipEdit) -> float:
    """See the module; 0..1."""
    off = (clip.astype(float) - video_world.render(edit.before, edit.motion)) / 255
    keep = np.stack([world.true_mask(each.before, each.after)[1] for each in edit.frames])
    both = keep[1:] & keep[:-1]
    return float(np.abs(off[1:] - off[:-1]).mean(-1)[both].mean())


def _added_goes(clip: np.ndarray, edit: ClipEdit) -> bool:
    colour = edit.after.things[0].colour
    return goes(centre(clip[0], colour), centre(clip[-1], colour), edit.motion)


def goes(first: tuple[float, float] | None, last: tuple[float, float] | None, motion: Motion) -> bool:
    """Whether a centre goes the named way from the first frame to the last: far enough, and more along than across."""
    if first is None or last is None:
        return False
    gone, way = (last[0] - first[0], last[1] - first[1]), video_world.WAYS[motion.way]
    along, across = gone[0] * way[0] + gone[1] * way[1], gone[0] * way[1] + gone[1] * way[0]
    return along >= LEAST_TRAVEL and along > abs(across)


def evaluate(edits: Mapping[str, np.ndarray], tuples: Sequence[ClipEdit]) -> metrics.Table:
    """Score the edited clip of every tuple (by its id) and average: one row an edit type and one for "all"."""
    return metrics.evaluate(edits, tuples, score)


def baselines(tuples: Sequence[ClipEdit]) -> dict[str, metrics.Table]:
    """What the exact edit and the untouched source score."""
    return {
        "ground truth": evaluate({edit.id: video_world.render(edit.after, edit.motion) for edit in tuples}, tuples),
        "copy the source": evaluate({edit.id: video_world.render(edit.before, edit.motion) for edit in tuples}, tuples),
    }


def follows_caption(clip: np.ndarray, first: world.Scene, motion: Motion) -> tuple[bool, bool, bool]:
    """Whether a text-to-video sample has the named colours, the named shape, and the named start and way.

    Colours and shape in every frame, by the image world's rules without its corners; the way by the centre of the shape's
    colour, which starts in the named corner.
    """
    labels = [world.nearest_labels(image) for image in clip]
    everywhere = {thing.colour: np.ones((world.SIZE, world.SIZE), dtype=bool) for thing in first.things}
    colours = all(metrics.colours_right(frame, first.background, everywhere) for frame in labels)
    if not first.things:
        return colours, True, True
    thing = first.things[0]
    shape = all(metrics.is_shape(frame == world.LABELS.index(thing.colour), thing.shape) for frame in labels)
    ends = centre(clip[0], thing.colour), centre(clip[-1], thing.colour)
    starts = ends[0] is not None and world.corner_of(*ends[0]) == world.corner(thing)
    return colours, shape, starts and goes(*ends, motion)
