"""Images from files, as the person who took them sees them."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Not everything that Pillow opens: a GIF is an animation of 256 colours, EPS is run by an outside program.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
MAX_SIDE = 16384  # pixels; beyond it a file is a mistake or an attack, and decoding it costs gigabytes


class _Refused(ValueError):
    """A whole image that is not taken, and why."""


# What Pillow's decoders raise on damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) after EXIF orientation.

    Raises:
        ValueError: see `load_image`.
    """
    with _opened(path) as image:
        width, height = image.size
        try:
            # Of a PNG this may decode the pixels: its orientation can stand after them.
            if image.format == "TIFF":  # newer Pillows turn these themselves, and say the turned size before they do
                return ImageOps.exif_transpose(image).size
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # those swap the sides
        except _DAMAGED as error:
            raise _damaged(path, error) from error
    return (height, width) if turned else (width, height)


def load_image(path: Path) -> Image.Image:
    """An 8-bit RGB image: EXIF orientation applied, transparency on white, greyscale, palette, 16 bit and CMYK converted.

    Colour profiles are not applied: the numbers in the file are taken as sRGB.

    Raises:
        ValueError: the file is missing, unreadable, truncated, animated, floating-point, or has a side over 16,384 pixels.
    """
    with _opened(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            upright.load()
            return to_rgb(upright)
        except _DAMAGED as error:
            raise _damaged(path, error) from error


def _opened(path: Path) -> Image.Image:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            # Pillow warns from 90 megapixels on; ours is the rule on sides below.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_readable_formats())
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ValueError(f"{path}: too large ({error}); scale it down to at most {MAX_SIDE} a side, {limit} megapixels in all") from error
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{path}: not an image that can be read (one of {', '.join(_readable_formats())}); replace it or remove its tuples"
        ) from error
    except _DAMAGED as error:
        raise _damaged(path, error) from error
    try:
        _check_header(image)
    except _DAMAGED as error:
        image.close()
        raise _damaged(path, error) from error
    return image


def _check_header(image: Image.Image) -> None:
    """Before any pixel is decoded."""
    if max(image.size) > MAX_SIDE:
        raise _Refused(f"{image.width} x {image.height} pixels; scale it down to at most {MAX_SIDE} a side")
    # A phone's MPO holds the photo first and a thumbnail or depth map after it.
    if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
        raise _Refused(f"has {frames} frames; save the one that is meant as a PNG")


def _readable_formats() -> list[str]:
    """Ours that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _damaged(path: Path, error: Exception) -> ValueError:
    if isinstance(error, _Refused):
        return ValueError(f"{path}: {error}")
    return ValueError(f"{path}: cannot be read, it is damaged or cut off ({error}); replace it or remove its tuples")


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: transparency on white, 16-bit greys scaled.

    Raises:
        ValueError: the range of its pixels is not known (32-bit integers, floats).
    """
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit greys at 255 instead of scaling them.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise _Refused("has 32-bit integer pixels, whose range is not known; save it with 8 or 16 bits")
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise _Refused("has floating-point pixels, whose range is not known; save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
