"""What a base makes of captions, as one picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from byg_plugin.demo import sheet

CAPTION = 84  # pixels of height for four lines: the caption of a scene with two objects


def draw(path: str | Path, images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8) -> Path:
    """Draw text-to-image samples `(N, SIZE, SIZE, 3)` uint8 with their captions as a PNG at `path`."""
    return _captioned(path, images, captions, columns, sheet.SCALE, CAPTION)


def draw_clips(path: str | Path, clips: np.ndarray, captions: Sequence[str], columns: int = 2) -> Path:
    """The same of text-to-video samples `(N, FRAMES, SIZE, SIZE, 3)`, each as a strip of its frames."""
    return _captioned(path, [sheet.strip(clip) for clip in clips], captions, columns, sheet.CLIP_SCALE, CAPTION // 3)


def _captioned(path: str | Path, images: Sequence[np.ndarray], captions: Sequence[str], columns: int, scale: int, text: int) -> Path:
    rows = -(-len(images) // columns)
    height, width = (scale * side for side in images[0].shape[:2])
    page = Image.new("RGB", (sheet.GAP + columns * (width + sheet.GAP), sheet.GAP + rows * (height + text)), sheet.PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = sheet.GAP + number % columns * (width + sheet.GAP), sheet.GAP + number // columns * (height + text)
        page.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        words = "\n".join(textwrap.wrap(caption, width * 26 // sheet.TILE))
        draw.multiline_text((x + width / 2, y + height + 4), words, sheet.INK, font, anchor="ma", align="center")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page.save(path)
    return path
