"""Images from files, as the person who took them sees them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from byg_plugin.data import png, profiles

# Not everything that Pillow opens: a GIF is an animation of 256 colours, EPS is run by an outside program.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
MAX_SIDE = 16384  # pixels; beyond it a file is a mistake or an attack, and decoding it costs gigabytes
READER = "2"  # raise when `load_image` gives other pixels of the files for which `look` names it
_HEAD = 64  # bytes by which a file that is no image is known
_REMEDY = "replace it or remove its tuples"
_reported: set[Path] = set()
logger = logging.getLogger(__name__)


class _Refused(ValueError):
    """A whole image that is not taken, and why."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is known of an image without its pixels.

    Attributes:
        size: (width, height) after EXIF orientation.
        reader: `READER` where the pixels are not the file's numbers but made of them by its colour profile or its transparent
            colour; else empty. A cache key has it, so that entries of all other files stay what they are.
    """

    size: tuple[int, int]
    reader: str


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) after EXIF orientation.

    Raises:
        ValueError: see `load_image`.
    """
    return look(path).size


def look(path: Path) -> Look:
    """Size of an image and how it is read.

    Raises:
        ValueError: see `load_image`.
    """
    with _opened(path) as (image, mended), _decoding(path):
        try:
            made = mended or profiles.is_foreign(image)
        except profiles.UnusableProfile:  # `load_image` tells
            made = mended
        width, height = image.size
        # Of a PNG this may decode the pixels: its orientation can stand after them.
        if image.format == "TIFF":  # newer Pillows turn these themselves, and say the turned size before they do
            width, height = ImageOps.exif_transpose(image).size
        elif image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # those swap the sides
            width, height = height, width
    return Look(size=(width, height), reader=READER if made else "")


def load_image(path: Path) -> Image.Image:
    """An 8-bit RGB image: EXIF orientation applied, transparency on white, greyscale, palette, 16 bit and CMYK converted.

    Colours are sRGB's: an embedded profile is applied (see `profiles.convert`), numbers without one are taken as they are. A
    profile that cannot be applied is said in a warning, once a file. Nothing else that the file holds stays with the image.

    Raises:
        ValueError: the file is missing, unreadable, truncated, animated, floating-point, or has a side over 16,384 pixels.
    """
    with _opened(path) as (image, _):
        with _decoding(path):
            upright = ImageOps.exif_transpose(image)
            upright.load()
        try:
            return _to_rgb(upright, path)
        except _Refused as error:
            raise ValueError(f"{path}: {error}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Image.Image, bool]]:
    """The image before its pixels are decoded, and whether its transparent colour is not what Pillow says it is."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        opened = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; {_REMEDY}") from error
    with opened as file:
        with _decoding(path):
            readable, profile = png.readable(file)
            with warnings.catch_warnings():
                # Pillow warns from 90 megapixels on; ours is the rule on sides below.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(readable, formats=_readable_formats())
            _check_header(image)
            mended = png.mend_transparency(image)
        if profile is not None:
            image.info["icc_profile"] = profile
        with image:
            yield image, mended


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """What a decoder raises is said of the file. There is no list of what they raise: of a damaged AVIF a RuntimeError."""
    try:
        yield
    except _Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise ValueError(f"{path}: too large ({error}); scale it down to at most {MAX_SIDE} a side, {limit} megapixels in all") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: {_what_it_is(path)}") from error
    except MemoryError as error:
        raise ValueError(f"{path}: there is not enough memory to decode it; scale it down") from error
    except Exception as error:  # a statement of ours in such a block raises _Refused alone
        raise ValueError(f"{path}: cannot be read, it is damaged or cut off ({error}); {_REMEDY}") from error


_HEIC = "a HEIC photo; save it as a JPEG or PNG"
# First bytes: what begins so, how to go on. Those that are downloaded, exported or renamed in place of an image.
_KINDS = (
    (b"\x00\x05\x16\x07", "what a Mac keeps beside a file on another disk, no image; remove it"),
    (b"GIF8", "a GIF; save the picture that is meant as a PNG"),
    (b"8BPS", "a Photoshop document; save it as a PNG"),
    (b"\xff\x0a", "a JPEG XL image; save it as a JPEG or PNG"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image; save it as a JPEG or PNG"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image; save it as a JPEG or PNG"),
    (b"%PDF", "a PDF; save its picture as a PNG"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file itself with `git lfs pull`"),
    (b"\x1aE\xdf\xa3", "a clip; give it the suffix .mkv"),
)

_OURS = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def _what_it_is(path: Path) -> str:
    """Words for a file that is no image that is read, with the remedy."""
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return f"an empty file, not an image that can be read; {_REMEDY}"
    known = next((words for magic, words in _KINDS if head.startswith(magic)), None)
    if head[4:8] == b"ftyp":
        known = _iso_kind(head[8:])
    if known:
        return f"not an image that can be read but {known}, or remove its tuples"
    if head.startswith(_OURS) or head[4:11] == b"ftypavi":
        return f"cannot be read, it is damaged or cut off at its beginning; {_REMEDY}"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"{")):
        return f"not an image that can be read but text (a page of a failed download?); {_REMEDY}"
    return f"not an image that can be read (one of {', '.join(_readable_formats())}); {_REMEDY}"


def _iso_kind(brands: bytes) -> str | None:
    """Of the family of files that MP4 is; None for an AVIF that is damaged."""
    if b"avi" in brands:
        old = "an AVIF image, for which this Pillow is too old; install a newer one, or save the image as a PNG"
        return None if "AVIF" in _readable_formats() else old
    return _HEIC if brands.startswith((b"hei", b"hev", b"mif1", b"msf1")) else "a clip; give it the suffix .mp4"


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


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB in sRGB: transparency on white, 16-bit greys scaled, colours by the embedded profile; see `load_image`.

    Raises:
        ValueError: the range of its pixels is not known (32-bit integers, floats), or they cannot be converted.
    """
    return _to_rgb(image, None)


def _to_rgb(image: Image.Image, path: Path | None) -> Image.Image:
    colour, alpha = _parts(image)
    try:
        colour = profiles.convert(colour)
    except profiles.UnusableProfile as error:
        _report_profile(path, error)
    colour = _convert(colour, "RGB")
    if alpha is not None:
        colour.putalpha(alpha)
        colour = Image.alpha_composite(Image.new("RGBA", colour.size, "white"), colour).convert("RGB")
    colour.info.clear()  # what is made of it would carry the file's profile, comments and places along
    return colour


def _parts(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Its colours in 8 bits with its profile, and its opacity where it has any; neither is the image itself."""
    if image.mode == "F":
        raise _Refused("has floating-point pixels, whose range is not known; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit greys at 255 instead of scaling them, and forgets the transparent one.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise _Refused("has 32-bit integer pixels, whose range is not known; save it with 8 or 16 bits")
        grey = Image.fromarray((values / 257).round().astype(np.uint8))
        grey.info |= {name: value for name, value in image.info.items() if name == "icc_profile"}
        key = image.info.get("transparency")
        return grey, None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        rgba = _convert(image, "RGBA")
        colour = _convert(rgba, "RGB")
        # Back to grey, which loses nothing here, for a profile of greys.
        return (_convert(colour, "L") if image.mode in ("1", "L", "LA", "La") else colour), rgba.getchannel("A")
    return (image if image.mode in ("L", "CMYK", "1", "LAB", "HSV") else _convert(image, "RGB")), None


def _convert(image: Image.Image, mode: str) -> Image.Image:
    try:
        return image.convert(mode)
    except Exception as error:  # of a damaged palette, for one
        raise _Refused(f"its pixels cannot be converted from {image.mode} to {mode} ({error}); save it as an RGB PNG") from error


def _report_profile(path: Path | None, error: profiles.UnusableProfile) -> None:
    if path is None or path not in _reported:
        where = "an image" if path is None else str(path)
        logger.warning("%s: its colour profile cannot be used, %s; its numbers are taken as sRGB", where, error)
    if path is not None:
        _reported.add(path)
