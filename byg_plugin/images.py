"""Pixels in and out: tensors to PIL images, PNG files with their settings inside, side-by-side pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from torch import Tensor


def to_pil(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> 8-bit RGB image."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    return Image.fromarray(array.cpu().numpy())


def side_by_side(*images: Image.Image, gap: int = 4) -> Image.Image:
    """Images of one height in a row on white."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    sheet = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + gap
    return sheet


def frames_of(pixels: Tensor) -> list[Image.Image]:
    """(3, F, H, W) in [-1, 1] -> F images."""
    return [to_pil(pixels[:, index]) for index in range(pixels.shape[1])]


def strip(clips: Sequence[Sequence[Image.Image]], shown: int = 5, gap: int = 4) -> Image.Image:
    """Clips of one size and length as rows, of each the first, the last and evenly spaced frames between."""
    count = len(clips[0])
    picked = sorted({round(k * (count - 1) / max(1, min(shown, count) - 1)) for k in range(min(shown, count))})
    rows = [side_by_side(*(clip[index] for index in picked), gap=gap) for clip in clips]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows) + gap * (len(rows) - 1)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + gap
    return sheet


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a PNG atomically, with `settings` as JSON in its text chunk `byg`; nothing else that the image carries is written."""
    image = image.copy()
    image.info.clear()  # Pillow writes the profile of the file it came from
    info = PngInfo()
    info.add_text("byg", json.dumps(settings, ensure_ascii=True))
    partial = path.with_name(f".partial-{path.name}")
    try:
        image.save(partial, format="PNG", pnginfo=info)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
