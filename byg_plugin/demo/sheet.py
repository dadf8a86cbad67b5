"""The contact sheet: source, instruction, edit and ground truth of a few tuples, side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from byg_plugin.demo import metrics, world

TILE = 3 * world.SIZE  # pixels of a side
GAP = 10
TEXT = 62  # pixels of height for three lines: "replace the yellow triangle with a purple square"
CAPTION = 84  # pixels of height for four lines: the caption of a scene with two objects
BAR = 5  # pixels of height of the verdict under an edit
LEGEND = 30  # pixels of height
MARGIN = 112  # pixels of width for the rows' names
PAPER, INK, GOOD, BAD = (255, 255, 255), (30, 30, 34), (40, 150, 70), (200, 60, 50)


def contact_sheet(path: str | Path, tuples: Sequence[world.Edit], edits: Mapping[str, np.ndarray], columns: int = 8, rows: int = 1) -> Path:
    """Draw the first `columns * rows` tuples as a PNG at `path`.

    `edits` maps tuple ids to `(SIZE, SIZE, 3)` uint8 images. The bar under an edit is green for a joint success, red
    otherwise; a legend below says so and counts them.
    """
    shown = tuples[: columns * rows]
    if not shown:
        raise ValueError("there are no tuples to draw: pass at least one")
    columns = min(columns, len(shown))
    rows = -(-len(shown) // columns)
    block = TEXT + 3 * (TILE + GAP) + 2 * GAP
    sheet = Image.new("RGB", (MARGIN + columns * (TILE + GAP), GAP + rows * block + LEGEND), PAPER)
    verdicts = []
    for number, edit in enumerate(shown):
        corner = MARGIN + number % columns * (TILE + GAP), GAP + number // columns * block
        if number % columns == 0:
            _names(sheet, corner[1])
        verdicts.append(metrics.score(edits[edit.id], edit).joint)
        _column(sheet, corner, edit, edits[edit.id], verdicts[-1])
    _legend(sheet, sum(verdicts), len(verdicts))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _row_tops() -> tuple[int, int, int, int]:
    """Offsets in pixels of source, instruction, edit and ground truth from the top of a block."""
    edit = TILE + TEXT + GAP
    return 0, TILE, edit, edit + TILE + 2 * GAP


def _names(sheet: Image.Image, top: int) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for name, offset in zip(("source", "instruction", "edit", "ground truth"), _row_tops(), strict=True):
        height = TEXT if name == "instruction" else TILE
        draw.text((GAP, top + offset + height / 2), name, INK, font, anchor="lm")


def _legend(sheet: Image.Image, successes: int, shown: int) -> None:
    draw, font, x, y = ImageDraw.Draw(sheet), ImageFont.load_default(15), MARGIN, sheet.height - GAP - LEGEND // 2
    for colour, words in ((GOOD, f"joint success ({successes} of {shown})"), (BAD, "no joint success")):
        draw.rectangle((x, y - BAR // 2, x + 29, y - BAR // 2 + BAR - 1), fill=colour)
        draw.text((x + 38, y), words, INK, font, anchor="lm")
        x += 38 + int(font.getlength(words)) + 3 * GAP


def _column(sheet: Image.Image, corner: tuple[int, int], edit: world.Edit, image: np.ndarray, success: bool) -> None:
    x, y = corner
    source, instruction, edited, truth = _row_tops()
    draw = ImageDraw.Draw(sheet)
    for offset, picture in ((source, world.render(edit.before)), (edited, image), (truth, world.render(edit.after))):
        sheet.paste(Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.NEAREST), (x, y + offset))
    words = "\n".join(textwrap.wrap(edit.instruction, 23))
    middle = (x + TILE / 2, y + instruction + (TEXT + GAP) / 2)
    draw.multiline_text(middle, words, INK, ImageFont.load_default(16), anchor="mm", align="center")
    bar = y + edited + TILE + 2
    draw.rectangle((x, bar, x + TILE - 1, bar + BAR - 1), fill=GOOD if success else BAD)


def sample_sheet(path: str | Path, images: np.ndarray, captions: Sequence[str], columns: int = 8) -> Path:
    """Draw text-to-image samples `(N, SIZE, SIZE, 3)` uint8 with their captions as a PNG at `path`."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (GAP + columns * (TILE + GAP), GAP + rows * (TILE + CAPTION)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = GAP + number % columns * (TILE + GAP), GAP + number // columns * (TILE + CAPTION)
        sheet.paste(Image.fromarray(image).resize((TILE, TILE), Image.Resampling.NEAREST), (x, y))
        words = "\n".join(textwrap.wrap(caption, 26))
        draw.multiline_text((x + TILE / 2, y + TILE + 4), words, INK, font, anchor="ma", align="center")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path
