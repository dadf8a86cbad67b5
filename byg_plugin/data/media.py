"""Images from files, as the person who took them sees them."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_SIDE = 16384  # pixels; beyond it a file is a mistake or an attack, and decoding it costs gigabytes


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) after EXIF orientation, from the header alone.

    Raises:
        ValueError: see `load_image`.
    """
    with _opened(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) >= 5  # orientations 5 to 8 swap the sides
    return (height, width) if turned else (width, height)


def load_image(path: Path) -> Image.Image:
    """An 8-bit RGB image: EXIF orientation applied, transparency on white, greyscale, palette, 16 bit and CMYK converted.

    Raises:
        ValueError: the file is missing, unreadable, truncated, or has a side over 16,384 pixels.
    """
    with _opened(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            upright.load()
        except (OSError, SyntaxError, ValueError, struct.error) as error:
            raise ValueError(f"{path}: cannot be read, it is damaged or cut off ({error}); replace it or remove its tuples") from error
    return _rgb(upright)


def _opened(path: Path) -> Image.Image:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            # Pillow warns from 90 megapixels on; ours is the rule on sides below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: too large ({error}); scale it down to at most {MAX_SIDE} pixels a side") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, struct.error) as error:
        raise ValueError(f"{path}: not an image that can be read ({error}); replace it or remove its tuples") from error
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"{path}: {image.width} x {image.height} pixels; scale it down to at most {MAX_SIDE} a side")
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "F"):
        # Pillow's own conversion clips 16-bit greys at 255 instead of scaling them.
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") and values.max() > 255 else max(255.0 if image.mode != "F" else 1.0, values.max())
        return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
