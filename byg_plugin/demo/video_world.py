"""The tiny world moves: procedural clips, their captions, and edits whose exact result is known frame by frame.

A clip is a scene of the tiny world whose one object travels, straight or on a curve, while background and pebble (the
bystander) stay where they are. Captions name colour, shape, the corner where the object starts and the way it goes; how
far, how fast and how curved is visible and never named, so an editor can only get the path right by copying it.

Every frame is a `world.Scene` and every frame of an edit a `world.Edit`: drawing, masks and metrics are the image world's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from byg_plugin.data.clips import write_clip
from byg_plugin.demo import world

FRAMES = 5  # 4n + 1, as Wan's VAE takes them: two latent frames
FPS = 8  # frames a second
COLOURS = ("red", "green", "blue", "yellow")
OBJECT_RADIUS = (10.0, 12.0)  # pixels
TRAVEL = (14.0, 18.0)  # pixels from the first frame to the last, along the named way
BOW = (5.0, 9.0)  # pixels across it, towards the middle of the picture, of a curved path
CURVED = 0.5  # share of paths that are not straight
WAYS: dict[str, tuple[int, int]] = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
_CLEARANCE = 2.0  # pixels between the object, wherever it gets, and the pebble

# What each way can start from: corners it leads away from.
_WAYS_FROM = {
    "top left": ("right", "down"),
    "top right": ("left", "down"),
    "bottom left": ("right", "up"),
    "bottom right": ("left", "up"),
}


@dataclass(frozen=True)
class Motion:
    """Where the object goes: `travel` pixels the named way and, on a parabola, `bow` pixels across (0: straight)."""

    way: str
    travel: float
    bow: float


@dataclass(frozen=True)
class ClipEdit:
    """One tuple of the data set: the exact first frames before and after it, and the motion, which no edit changes."""

    id: str
    edit_type: str
    instruction: str
    reverse_instruction: str
    before: world.Scene
    after: world.Scene
    motion: Motion

    @property
    def src_caption(self) -> str:
        return caption(self.before, self.motion)

    @property
    def tgt_caption(self) -> str:
        return caption(self.after, self.motion)

    @cached_property
    def frames(self) -> tuple[world.Edit, ...]:
        """The edit of each frame."""
        pairs = zip(scenes(self.before, self.motion), scenes(self.after, self.motion), strict=True)
        words = self.edit_type, self.instruction, self.reverse_instruction
        return tuple(world.Edit(f"{self.id}, frame {k}", *words, *pair) for k, pair in enumerate(pairs))


def caption(scene: world.Scene, motion: Motion) -> str:
    """What the clip shows in words."""
    if not scene.things:
        return world.caption(scene)
    return f"{_describe(scene.things[0], motion)} on a {scene.background} background"


def _describe(thing: world.Thing, motion: Motion) -> str:
    return f"{world.describe(thing)} moving {motion.way}"


def vocabulary() -> list[str]:
    """Every word of captions and instructions, sorted."""
    gone = {*world.COLOURS} - {*COLOURS} | {"and"}
    return sorted({*world.vocabulary(), "moving", *WAYS} - gone)


# --- motion --------------------------------------------------------------------------------------------------------


def offset(motion: Motion, start: world.Thing, frame: int) -> tuple[float, float]:
    """Pixels (right, down) that the object, which starts as `start`, has gone at a frame."""
    done = frame / (FRAMES - 1)
    along, across = WAYS[motion.way], _inwards(motion.way, start)
    return (
        motion.travel * done * along[0] + motion.bow * done**2 * across[0],
        motion.travel * done * along[1] + motion.bow * done**2 * across[1],
    )


def _inwards(way: str, start: world.Thing) -> tuple[int, int]:
    """Unit vector across the way, towards the middle of the picture."""
    middle = world.SIZE / 2
    if WAYS[way][0]:
        return (0, 1 if start.y < middle else -1)
    return (1 if start.x < middle else -1, 0)


def scenes(first: world.Scene, motion: Motion) -> tuple[world.Scene, ...]:
    """The scene of every frame."""
    return tuple(replace(first, things=tuple(_moved(thing, motion, k) for thing in first.things)) for k in range(FRAMES))


def _moved(thing: world.Thing, motion: Motion, frame: int) -> world.Thing:
    right, down = offset(motion, thing, frame)
    return replace(thing, x=thing.x + right, y=thing.y + down)


def render(first: world.Scene, motion: Motion) -> np.ndarray:
    """The clip as `(FRAMES, SIZE, SIZE, 3)` uint8 RGB."""
    return np.stack([world.render(scene) for scene in scenes(first, motion)])


def sample_clip(rng: np.random.Generator, things: int = 1) -> tuple[world.Scene, Motion]:
    """A random first frame of 0 or 1 objects, and a path.

    The object stays in the picture and clear of the pebble, which lies in the corner opposite its start.
    """
    if things not in (0, 1):
        raise ValueError(f"things is {things}: a clip has 0 or 1 objects")
    background, colour = (str(name) for name in rng.permutation(COLOURS)[:2])
    number = int(rng.integers(len(world.CORNERS)))
    x, y, radius = world.draw_position(rng, number, OBJECT_RADIUS)
    thing = world.Thing(world.pick(rng, world.SHAPES), colour, x, y, radius, light=float(rng.uniform(0, 2 * np.pi)))
    bow = float(rng.uniform(*BOW)) if rng.random() < CURVED else 0.0
    motion = Motion(world.pick(rng, _WAYS_FROM[world.CORNERS[number]]), float(rng.uniform(*TRAVEL)), bow)
    empty = world.sample_scene(rng, 0)
    pebble_x, pebble_y, pebble_radius = _draw_pebble(rng, 3 - number, thing, motion)
    first = replace(
        empty,
        background=background,
        pebble_x=pebble_x,
        pebble_y=pebble_y,
        pebble_radius=pebble_radius,
        things=(thing,)[:things],
    )
    return first, motion


def _draw_pebble(rng: np.random.Generator, quadrant: int, thing: world.Thing, motion: Motion) -> tuple[float, float, float]:
    while True:
        x, y, radius = world.draw_position(rng, quadrant, world.PEBBLE_RADIUS)
        centres = [_moved(thing, motion, k) for k in range(FRAMES)]
        if all(np.hypot(at.x - x, at.y - y) >= at.radius + radius + _CLEARANCE for at in centres):
            return x, y, radius


# --- edits ---------------------------------------------------------------------------------------------------------

EDIT_TYPES = tuple(world.EDIT_TYPES)
DEFAULT_TYPES = world.DEFAULT_TYPES


def sample_edit(rng: np.random.Generator, name: str, edit_types: Sequence[str] = DEFAULT_TYPES) -> ClipEdit:
    """A random edit of one of `edit_types` of a random clip; `name` becomes its id."""
    edit_type = world.pick_type(rng, edit_types)
    first, motion = sample_clip(rng)
    if edit_type == "add":
        return _swapped(_edit(rng, name, "remove", first, motion), "add")
    return _edit(rng, name, edit_type, first, motion)


def _edit(rng: np.random.Generator, name: str, edit_type: str, first: world.Scene, motion: Motion) -> ClipEdit:
    """A random edit of a given clip with one object; of every type but "add"."""
    after, instruction, reverse = world.EDIT_TYPES[edit_type](rng, first, COLOURS)
    if edit_type == "remove":
        reverse = f"add {_describe(first.things[0], motion)}"
    return ClipEdit(name, edit_type, instruction, reverse, first, after, motion)


def _swapped(edit: ClipEdit, edit_type: str) -> ClipEdit:
    """The way back as an edit of its own."""
    words = {"instruction": edit.reverse_instruction, "reverse_instruction": edit.instruction}
    return replace(edit, edit_type=edit_type, before=edit.after, after=edit.before, **words)


def instruction_that_leads_to(rng: np.random.Generator, first: world.Scene, motion: Motion) -> str:
    """A random instruction whose result is this clip: the way back from a random edit of it."""
    if not first.things:
        gone, _ = sample_clip(rng)
        colours = [colour for colour in COLOURS if colour != first.background]
        return f"remove the {world.pick(rng, colours)} {gone.things[0].shape}"
    possible = [name for name in EDIT_TYPES if name != "add"]
    return _edit(rng, "", world.pick(rng, possible), first, motion).reverse_instruction


# --- data sets on disk ---------------------------------------------------------------------------------------------


def sample_split(n: int, seed: int, split: str, edit_types: Sequence[str] = DEFAULT_TYPES) -> list[ClipEdit]:
    """`n` edits; the same arguments give the same edits, and splits of one seed are independent of each other."""
    if n < 1:
        raise ValueError(f"n is {n}: a data set needs at least one tuple")
    rng = np.random.default_rng([seed, *b"clips", *split.encode()])
    return [sample_edit(rng, f"{split}-{i:05d}", edit_types) for i in range(n)]


def write_dataset(
    folder: str | Path,
    n: int,
    seed: int,
    split: str,
    edit_types: Sequence[str] = DEFAULT_TYPES,
    with_targets: bool = False,
) -> Path:
    """Write `n` tuples as a user's data set and return the path of its `tuples.jsonl`.

    Clips are lossless. Split "eval" also gets `truth/` (ground truths) and `scenes.json` (exact parameters, read by
    `load_scenes`). `with_targets` adds the `target` field for the paired baseline.
    """
    folder = Path(folder)
    edits = sample_split(n, seed, split, edit_types)
    exact = split == "eval"
    for name in ["clips", *(["truth"] if exact or with_targets else [])]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for edit in edits:
        _write(folder / "clips" / f"{edit.id}.mkv", render(edit.before, edit.motion))
        if exact or with_targets:
            _write(folder / "truth" / f"{edit.id}.mkv", render(edit.after, edit.motion))
        lines.append(json.dumps(world.tuple_fields(edit, f"clips/{edit.id}.mkv", f"truth/{edit.id}.mkv" if with_targets else None)))
    if exact:
        (folder / "scenes.json").write_text(json.dumps([asdict(edit) for edit in edits], indent=1), encoding="utf-8")
    path = folder / "tuples.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _write(path: Path, clip: np.ndarray) -> None:
    write_clip(path, [Image.fromarray(frame) for frame in clip], FPS, lossless=True)


def load_scenes(folder: str | Path) -> list[ClipEdit]:
    """The exact edits of an eval split that `write_dataset` wrote."""
    return [_read_edit(item) for item in world.scenes_file(folder)]


def _read_edit(item: dict) -> ClipEdit:
    scene_of = {name: world.read_scene(item[name]) for name in ("before", "after")}
    return ClipEdit(**{**item, **scene_of, "motion": Motion(**item["motion"])})
