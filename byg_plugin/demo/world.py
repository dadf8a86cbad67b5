"""The tiny world: procedural scenes, their captions, and edits whose exact result is known.

A scene is up to two plain shapes on a coloured background, each in a corner of its own. Captions name colours, shapes
and corners. Texture, shading, exact place and size, and a small pebble are visible but never named, so an editor can only
get them right by copying them from the source.
Everything is drawn from signed distances: a pixel is inside a region, outside it, or on its edge (shared by two
regions), and the metrics count edge pixels on neither side.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

SIZE = 64  # pixels of a side: of the image base sixteen latents, eight tokens (its VAE takes 4, FLUX's patch 2); of clips 8 and 4
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.20, 0.18),
    "green": (0.22, 0.64, 0.28),
    "blue": (0.18, 0.36, 0.85),
    "yellow": (0.95, 0.80, 0.22),
    "purple": (0.56, 0.26, 0.72),
    "cyan": (0.28, 0.78, 0.84),
}
PEBBLES: dict[str, tuple[float, float, float]] = {"light": (0.97, 0.97, 0.97), "dark": (0.08, 0.08, 0.10)}
SHAPES = ("circle", "square", "triangle")
LABELS = (*COLOURS, *PEBBLES)  # what a pixel can be nearest to; indices into this tuple are "labels"
PALETTE = np.array([*COLOURS.values(), *PEBBLES.values()])
INSTRUCTION_WORDS = ("make", "the", "turn", "into", "add", "remove", "replace", "with")
OBJECT_RADIUS = (11.0, 14.0)  # pixels
PEBBLE_RADIUS = (3.5, 4.5)
CORNERS = ("top left", "top right", "bottom left", "bottom right")
_QUADRANT = SIZE // 2
_MARGIN = 0.5  # pixels between what lies in a quadrant and the quadrant's edge: neighbours never touch

EDGE, BACKGROUND, PEBBLE = -1, 0, 1  # values of a region map; object number i has FIRST_OBJECT + i
FIRST_OBJECT = 2


@dataclass(frozen=True)
class Thing:
    """One object: `x`, `y` (centre) and `radius` in pixels; `light` is the direction (radians) its shading rises to."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    light: float


@dataclass(frozen=True)
class Scene:
    """A background with brightness stripes (`angle`, `phase` in radians, `period` in pixels), a pebble, and objects."""

    background: str
    angle: float
    phase: float
    period: float
    pebble: str
    pebble_x: float
    pebble_y: float
    pebble_radius: float
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Edit:
    """One tuple of the data set together with the exact scenes before and after it."""

    id: str
    edit_type: str
    instruction: str
    reverse_instruction: str
    before: Scene
    after: Scene

    @property
    def src_caption(self) -> str:
        return caption(self.before)

    @property
    def tgt_caption(self) -> str:
        return caption(self.after)


def caption(scene: Scene) -> str:
    """What the scene shows in words: shapes, colours and corners only."""
    if not scene.things:
        return f"an empty {scene.background} background"
    return f"{' and '.join(describe(thing) for thing in scene.things)} on a {scene.background} background"


def describe(thing: Thing) -> str:
    """An object in words."""
    return f"a {thing.colour} {thing.shape} {corner(thing)}"


def corner(thing: Thing) -> str:
    """In words, where an object lies."""
    return corner_of(thing.x, thing.y)


def corner_of(x: float, y: float) -> str:
    """The corner's name of a point in pixels."""
    return CORNERS[_quadrant(x, y)]


def pick(rng: np.random.Generator, options: Iterable[str], avoid: Sequence[str] = ()) -> str:
    """A random option that is not among those to avoid."""
    left = [option for option in options if option not in avoid]
    assert left, "nothing left to choose from"
    return left[int(rng.integers(len(left)))]


def sample_scene(rng: np.random.Generator, things: int = 1) -> Scene:
    """A random scene of `things` (0, 1 or 2) objects; objects and pebble lie in quadrants of their own.

    All colours of a scene differ; so do the shapes, so that an instruction can name each.
    """
    if things not in (0, 1, 2):
        raise ValueError(f"things is {things}: a scene has 0, 1 or 2 objects")
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))[: things + 1]]
    shapes = [str(shape) for shape in rng.permutation(SHAPES)[:things]]
    quadrants = [int(quadrant) for quadrant in rng.permutation(4)]
    pebble_x, pebble_y, pebble_radius = draw_position(rng, quadrants[things], PEBBLE_RADIUS)
    return Scene(
        background=colours[0],
        angle=float(rng.uniform(0, math.pi)),
        phase=float(rng.uniform(0, 2 * math.pi)),
        period=float(rng.uniform(40, 80)),
        pebble=pick(rng, PEBBLES),
        pebble_x=pebble_x,
        pebble_y=pebble_y,
        pebble_radius=pebble_radius,
        things=tuple(_thing(rng, shape, colour, quadrant) for shape, colour, quadrant in zip(shapes, colours[1:], quadrants, strict=False)),
    )


def _thing(rng: np.random.Generator, shape: str, colour: str, quadrant: int) -> Thing:
    return Thing(shape, colour, *draw_position(rng, quadrant, OBJECT_RADIUS), light=float(rng.uniform(0, 2 * math.pi)))


def draw_position(rng: np.random.Generator, quadrant: int, radii: tuple[float, float]) -> tuple[float, float, float]:
    """A disc (x, y, radius) somewhere in a quadrant; its number is the index of its name in CORNERS."""
    radius = float(rng.uniform(*radii))
    left, top = quadrant % 2 * _QUADRANT, quadrant // 2 * _QUADRANT
    x, y = (float(v) for v in rng.uniform(radius + _MARGIN, _QUADRANT - radius - _MARGIN, 2))
    return left + x, top + y, radius


def _quadrant(x: float, y: float) -> int:
    return int(y >= _QUADRANT) * 2 + int(x >= _QUADRANT)


_Y, _X = np.mgrid[0:SIZE, 0:SIZE] + 0.5


def _distance(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Signed distance in pixels of each pixel's centre to the shape's edge, negative inside: `(SIZE, SIZE)`.

    Every shape lies within the circle of `radius`.
    """
    dx, dy = _X - x, _Y - y
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - radius / math.sqrt(2)
    assert shape == "triangle", shape
    slope = math.sqrt(3) / 2
    return np.maximum(dy, slope * np.abs(dx) - dy / 2) - radius / 2


def inside(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    """Pixels whose centre lies in the shape: bool `(SIZE, SIZE)`."""
    return _distance(shape, x, y, radius) < 0


def _layers(scene: Scene) -> list[tuple[np.ndarray, np.ndarray]]:
    """(distance, colours) of what lies on the background, from the bottom up; colours broadcast to `(S, S, 3)`."""
    pebble = _distance("circle", scene.pebble_x, scene.pebble_y, scene.pebble_radius)
    layers = [(pebble, np.array(PEBBLES[scene.pebble]))]
    for thing in scene.things:
        distance = _distance(thing.shape, thing.x, thing.y, thing.radius)
        along = ((_X - thing.x) * math.cos(thing.light) + (_Y - thing.y) * math.sin(thing.light)) / thing.radius
        shade = 1 + 0.12 * np.clip(along, -1, 1)
        layers.append((distance, np.array(COLOURS[thing.colour]) * shade[..., None]))
    return layers


def render(scene: Scene) -> np.ndarray:
    """The scene as `(SIZE, SIZE, 3)` uint8 RGB."""
    wave = np.sin((_X * math.cos(scene.angle) + _Y * math.sin(scene.angle)) * 2 * math.pi / scene.period + scene.phase)
    image = np.array(COLOURS[scene.background]) * (1 + 0.12 * wave)[..., None]
    for distance, colours in _layers(scene):
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        image = image * (1 - cover) + colours * cover
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def regions(scene: Scene) -> np.ndarray:
    """Which region each pixel belongs to wholly: BACKGROUND, PEBBLE, FIRST_OBJECT + i or EDGE; `(SIZE, SIZE)` int."""
    out = np.full((SIZE, SIZE), BACKGROUND)
    for number, (distance, _) in enumerate(_layers(scene)):
        out[distance < 0.5] = EDGE
        out[distance <= -0.5] = PEBBLE + number
    return out


def true_labels(scene: Scene) -> np.ndarray:
    """Index into LABELS of each pixel's colour, EDGE where two regions share the pixel: `(SIZE, SIZE)` int."""
    names = [scene.background, scene.pebble, *(thing.colour for thing in scene.things)]
    table = np.array([LABELS.index(name) for name in names])
    where = regions(scene)
    return np.where(where == EDGE, EDGE, table[np.maximum(where, 0)])


def nearest_labels(image: np.ndarray) -> np.ndarray:
    """Index into LABELS of the colour nearest (Euclidean in RGB) to each pixel of a uint8 `(..., 3)` image."""
    distance = np.linalg.norm(image[..., None, :] / 255.0 - PALETTE, axis=-1)
    return distance.argmin(-1)


def true_mask(before: Scene, after: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that the edit changes and that it must not change, two bool `(SIZE, SIZE)`; edges are in neither."""
    one, two = true_labels(before), true_labels(after)
    known = (one != EDGE) & (two != EDGE)
    return known & (one != two), known & (one == two)


# --- edits ---------------------------------------------------------------------------------------------------------


def _swap_thing(scene: Scene, index: int, thing: Thing) -> Scene:
    return replace(scene, things=(*scene.things[:index], thing, *scene.things[index + 1 :]))


def _recolour_object(rng: np.random.Generator, scene: Scene, colours: Iterable[str] = COLOURS) -> tuple[Scene, str, str]:
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    colour = pick(rng, colours, (scene.background, *(other.colour for other in scene.things)))
    after = _swap_thing(scene, index, replace(thing, colour=colour))
    return after, f"make the {thing.shape} {colour}", f"make the {thing.shape} {thing.colour}"


def _recolour_background(rng: np.random.Generator, scene: Scene, colours: Iterable[str] = COLOURS) -> tuple[Scene, str, str]:
    colour = pick(rng, colours, (scene.background, *(other.colour for other in scene.things)))
    after = replace(scene, background=colour)
    return after, f"make the background {colour}", f"make the background {scene.background}"


def _change_shape(rng: np.random.Generator, scene: Scene, colours: Iterable[str] = COLOURS) -> tuple[Scene, str, str]:
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    shape = pick(rng, SHAPES, [other.shape for other in scene.things])
    after = _swap_thing(scene, index, replace(thing, shape=shape))
    return after, f"turn the {thing.shape} into a {shape}", f"turn the {shape} into a {thing.shape}"


def _add(rng: np.random.Generator, scene: Scene, colours: Iterable[str] = COLOURS) -> tuple[Scene, str, str]:
    """The exact place in the corner is free: the metrics look where the picture has the object."""
    used = {_quadrant(scene.pebble_x, scene.pebble_y), *(_quadrant(other.x, other.y) for other in scene.things)}
    colour = pick(rng, colours, (scene.background, *(other.colour for other in scene.things)))
    shape = pick(rng, SHAPES, [other.shape for other in scene.things])
    free = [quadrant for quadrant in range(4) if quadrant not in used]
    thing = _thing(rng, shape, colour, free[int(rng.integers(len(free)))])
    return replace(scene, things=(*scene.things, thing)), f"add a {colour} {shape} {corner(thing)}", f"remove the {colour} {shape}"


def _remove(rng: np.random.Generator, scene: Scene, colours: Iterable[str] = COLOURS) -> tuple[Scene, str, str]:
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    after = replace(scene, things=scene.things[:index] + scene.things[index + 1 :])
    return after, f"remove the {thing.colour} {thing.shape}", f"add a {thing.colour} {thing.shape} {corner(thing)}"


def _replace(rng: np.random.Generator, scene: Scene, colours: Iterable[str] = COLOURS) -> tuple[Scene, str, str]:
    index = int(rng.integers(len(scene.things)))
    thing = scene.things[index]
    colour = pick(rng, colours, (scene.background, *(other.colour for other in scene.things)))
    shape = pick(rng, SHAPES, [other.shape for other in scene.things])
    old, new = f"{thing.colour} {thing.shape}", f"{colour} {shape}"
    after = _swap_thing(scene, index, replace(thing, colour=colour, shape=shape))
    return after, f"replace the {old} with a {new}", f"replace the {new} with a {old}"


# A new kind of edit is one function here: scene (and the colours there are) -> (scene after it, instruction, reverse
# instruction).
EDIT_TYPES: dict[str, Callable[..., tuple[Scene, str, str]]] = {
    "recolour_object": _recolour_object,
    "recolour_background": _recolour_background,
    "change_shape": _change_shape,
    "add": _add,
    "remove": _remove,
    "replace": _replace,
}
DEFAULT_TYPES = ("recolour_object", "recolour_background")
_OBJECTS_BEFORE = {"add": (0, 1)}  # how many objects a scene may have before an edit; (1, 2) if not named


def pick_type(rng: np.random.Generator, edit_types: Sequence[str]) -> str:
    """A random one of `edit_types`.

    Raises:
        ValueError: one of them is unknown.
    """
    for edit_type in edit_types:
        if edit_type not in EDIT_TYPES:
            raise ValueError(f"edit type {edit_type!r} is unknown: choose from {', '.join(EDIT_TYPES)}")
    return pick(rng, edit_types)


def sample_edit(rng: np.random.Generator, name: str, edit_types: Sequence[str] = DEFAULT_TYPES) -> Edit:
    """A random edit of one of `edit_types` of a random scene; `name` becomes its id."""
    edit_type = pick_type(rng, edit_types)
    scene = sample_scene(rng, int(rng.choice(_OBJECTS_BEFORE.get(edit_type, (1, 2)))))
    after, instruction, reverse = EDIT_TYPES[edit_type](rng, scene)
    return Edit(name, edit_type, instruction, reverse, scene, after)


def instruction_that_leads_to(rng: np.random.Generator, scene: Scene) -> str:
    """A random instruction whose result is this scene: the way back from a random edit of it."""
    possible = [name for name in EDIT_TYPES if len(scene.things) in _OBJECTS_BEFORE.get(name, (1, 2))]
    *_, back = EDIT_TYPES[pick(rng, possible)](rng, scene)
    return back


def vocabulary() -> list[str]:
    """Every word of captions and instructions, sorted."""
    return sorted({*COLOURS, *SHAPES, *INSTRUCTION_WORDS, "a", "an", "and", "on", "empty", "background", *" ".join(CORNERS).split()})


# --- data sets on disk ---------------------------------------------------------------------------------------------


def sample_split(n: int, seed: int, split: str, edit_types: Sequence[str] = DEFAULT_TYPES) -> list[Edit]:
    """`n` edits; the same arguments give the same edits, and splits of one seed are independent of each other."""
    if n < 1:
        raise ValueError(f"n is {n}: a data set needs at least one tuple")
    rng = np.random.default_rng([seed, *split.encode()])
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

    Split "eval" also gets `truth/` (ground truths), `mask/` (255 changes, 0 must not, 128 edge, counted in neither)
    and `scenes.json` (exact parameters, read by `load_scenes`). `with_targets` adds the `target` field for the paired
    baseline; the unpaired objective never needs it.
    """
    folder = Path(folder)
    edits = sample_split(n, seed, split, edit_types)
    exact = split == "eval"
    for name in ["images", *(["truth"] if exact or with_targets else []), *(["mask"] if exact else [])]:
        (folder / name).mkdir(parents=True, exist_ok=True)
    lines = []
    for edit in edits:
        Image.fromarray(render(edit.before)).save(folder / "images" / f"{edit.id}.png")
        if exact or with_targets:
            Image.fromarray(render(edit.after)).save(folder / "truth" / f"{edit.id}.png")
        if exact:
            Image.fromarray(_mask_image(edit)).save(folder / "mask" / f"{edit.id}.png")
        lines.append(json.dumps(tuple_fields(edit, f"images/{edit.id}.png", f"truth/{edit.id}.png" if with_targets else None)))
    if exact:
        (folder / "scenes.json").write_text(json.dumps([asdict(edit) for edit in edits], indent=1), encoding="utf-8")
    path = folder / "tuples.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _mask_image(edit: Edit) -> np.ndarray:
    changed, kept = true_mask(edit.before, edit.after)
    return np.where(changed, 255, np.where(kept, 0, 128)).astype(np.uint8)


class Tuple(Protocol):
    """The words of an edit."""

    @property
    def id(self) -> str: ...
    @property
    def edit_type(self) -> str: ...
    @property
    def instruction(self) -> str: ...
    @property
    def reverse_instruction(self) -> str: ...
    @property
    def src_caption(self) -> str: ...
    @property
    def tgt_caption(self) -> str: ...


def tuple_fields(edit: Tuple, source: str, target: str | None) -> dict[str, str]:
    """A line of tuples.jsonl; files are named from its folder."""
    fields = {
        "id": edit.id,
        "source": source,
        "src_caption": edit.src_caption,
        "tgt_caption": edit.tgt_caption,
        "instruction": edit.instruction,
        "reverse_instruction": edit.reverse_instruction,
        "edit_type": edit.edit_type,
    }
    return fields | ({"target": target} if target else {})


def load_scenes(folder: str | Path) -> list[Edit]:
    """The exact edits of an eval split that `write_dataset` wrote."""
    return [_read_edit(item) for item in scenes_file(folder)]


def scenes_file(folder: str | Path) -> list[dict]:
    """The edits of an eval split as they lie in its `scenes.json`.

    Raises:
        ValueError: there is none.
    """
    path = Path(folder) / "scenes.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: only the eval split has exact scenes; write it with split='eval'")
    return json.loads(path.read_text(encoding="utf-8"))


def _read_edit(item: dict) -> Edit:
    return Edit(**{**item, "before": read_scene(item["before"]), "after": read_scene(item["after"])})


def read_scene(item: dict) -> Scene:
    """The scene of an `asdict` that was JSON in between."""
    return Scene(**{**item, "things": tuple(Thing(**thing) for thing in item["things"])})
