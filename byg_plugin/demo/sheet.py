"""The contact sheet: source, instruction, edit and ground truth of a few tuples, as pictures or as strips of frames."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from byg_plugin.demo import metrics, video_metrics, video_world, world

SCALE = 3  # of a picture
CLIP_SCALE = 2  # of a frame
TILE = SCALE * world.SIZE  # pixels of a side
GAP = 10
TEXT = 62  # pixels of height for three lines: "replace the yellow triangle with a purple square"
BAR = 5  # pixels of height of the verdict under an edit
LEGEND = 30  # pixels of height
MARGIN = 112  # pixels of width for the rows' names
LETTER = 8.3  # pixels of width of a letter of an instruction
PAPER, INK, GOOD, BAD = (255, 255, 255), (30, 30, 34), (40, 150, 70), (200, 60, 50)


class _Entry(NamedTuple):
    """One tuple: pictures (H, W, 3) uint8 of one size, and whether the edit is a joint success."""

    instruction: str
    source: np.ndarray
    edit: np.ndarray
    truth: np.ndarray
    success: bool


def contact_sheet(path: str | Path, tuples: Sequence[world.Edit], edits: Mapping[str, np.ndarray], columns: int = 8, rows: int = 1) -> Path:
    """Draw the first `columns * rows` tuples as a PNG at `path`.

    `edits` maps tuple ids to `(SIZE, SIZE, 3)` uint8 images. The bar under an edit is green for a joint success, red
    otherwise; a legend below says so and counts them.
    """
    entries = [
        _Entry(e.instruction, world.render(e.before), edits[e.id], world.render(e.after), metrics.score(edits[e.id], e).joint)
        for e in tuples[: columns * rows]
    ]
    return _draw(path, entries, columns, SCALE, TEXT)


def clip_contact_sheet(
    path: str | Path, tuples: Sequence[video_world.ClipEdit], edits: Mapping[str, np.ndarray], columns: int = 2, rows: int = 6
) -> Path:
    """The same of clips `(FRAMES, SIZE, SIZE, 3)`, each as a strip of its frames."""
    entries = []
    for edit in tuples[: columns * rows]:
        source, made, truth = (
            strip(clip)
            for clip in (video_world.render(edit.before, edit.motion), edits[edit.id], video_world.render(edit.after, edit.motion))
        )
        entries.append(_Entry(edit.instruction, source, made, truth, video_metrics.score(edits[edit.id], edit).joint))
    return _draw(path, entries, columns, CLIP_SCALE, TEXT // 3)


def strip(clip: np.ndarray) -> np.ndarray:
    """(F, H, W, 3) -> frames side by side, two white pixels apart."""
    gap = np.full((clip.shape[1], 2, 3), 255, np.uint8)
    return np.concatenate([part for frame in clip for part in (gap, frame)][1:], axis=1)


def _draw(path: str | Path, entries: Sequence[_Entry], columns: int, scale: int, text: int) -> Path:
    """Entries in rows of `columns`, pictures enlarged by `scale`, `text` pixels of height for an instruction."""
    if not entries:
        raise ValueError("there are no tuples to draw: pass at least one")
    columns = min(columns, len(entries))
    height, width = (scale * side for side in entries[0].source.shape[:2])
    block = text + 3 * (height + GAP) + 2 * GAP
    sheet = Image.new("RGB", (MARGIN + columns * (width + GAP), GAP + -(-len(entries) // columns) * block + LEGEND), PAPER)
    for number, entry in enumerate(entries):
        corner = MARGIN + number % columns * (width + GAP), GAP + number // columns * block
        if number % columns == 0:
            _names(sheet, corner[1], height, text)
        _column(sheet, corner, entry, (width, height), text)
    _legend(sheet, sum(entry.success for entry in entries), len(entries))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _row_tops(height: int, text: int) -> tuple[int, int, int, int]:
    """Offsets in pixels of source, instruction, edit and ground truth from the top of a block."""
    edit = height + text + GAP
    return 0, height, edit, edit + height + 2 * GAP


def _names(sheet: Image.Image, top: int, height: int, text: int) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for name, offset in zip(("source", "instruction", "edit", "ground truth"), _row_tops(height, text), strict=True):
        middle = (text if name == "instruction" else height) / 2
        draw.text((GAP, top + offset + middle), name, INK, font, anchor="lm")


def _legend(sheet: Image.Image, successes: int, shown: int) -> None:
    draw, font, x, y = ImageDraw.Draw(sheet), ImageFont.load_default(15), MARGIN, sheet.height - GAP - LEGEND // 2
    for colour, words in ((GOOD, f"joint success ({successes} of {shown})"), (BAD, "no joint success")):
        draw.rectangle((x, y - BAR // 2, x + 29, y - BAR // 2 + BAR - 1), fill=colour)
        draw.text((x + 38, y), words, INK, font, anchor="lm")
        x += 38 + int(font.getlength(words)) + 3 * GAP


def _column(sheet: Image.Image, corner: tuple[int, int], entry: _Entry, size: tuple[int, int], text: int) -> None:
    x, y = corner
    source, instruction, edited, truth = _row_tops(size[1], text)
    draw = ImageDraw.Draw(sheet)
    for offset, picture in ((source, entry.source), (edited, entry.edit), (truth, entry.truth)):
        sheet.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), (x, y + offset))
    words = "\n".join(textwrap.wrap(entry.instruction, int(size[0] / LETTER)))
    middle = (x + size[0] / 2, y + instruction + (text + GAP) / 2)
    draw.multiline_text(middle, words, INK, ImageFont.load_default(16), anchor="mm", align="center")
    bar = y + edited + size[1] + 2
    draw.rectangle((x, bar, x + size[0] - 1, bar + BAR - 1), fill=GOOD if entry.success else BAD)
