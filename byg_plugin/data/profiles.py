"""Colour profiles in pictures: their numbers become sRGB's, which is what models were trained on."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of the profile's colour space, those that pictures have
_SAME = 2  # levels of 255: so far apart are the sRGB profiles of different makers, through rounding
_BLACK_POINT_COMPENSATION: Any = 0x2000  # lcms's number; Pillow's names for it changed


class UnusableProfile(ValueError):
    """A profile that cannot be applied to its picture, and why."""


def convert(image: Image.Image) -> Image.Image:
    """The picture in sRGB by its embedded profile: RGB, or as it is where it has no profile or one that says sRGB.

    Relative colorimetric with black point compensation, as photo editors convert: colours inside sRGB stay what they are,
    others go to its border.

    Args:
        image: RGB, L or CMYK without transparency.

    Raises:
        UnusableProfile: the profile is damaged, or for pictures of another kind.
    """
    if (found := _transform(image)) is None:
        return image
    mode, transform = found
    # A grey picture may have a profile for RGB: equal parts of it.
    return transform.apply(image if image.mode == mode else image.convert(mode))


def is_foreign(image: Image.Image) -> bool:
    """Whether the numbers of a picture of any mode are not sRGB's by its profile. Decodes nothing.

    Raises:
        UnusableProfile: see `convert`.
    """
    return _transform(image) is not None


def _transform(image: Image.Image) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """The mode it takes, and the transform."""
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) and profile is not None:
        raise UnusableProfile("it is damaged")
    return None if profile is None or image.mode in _WITHOUT else _to_srgb(profile, _kind(image.mode))


# Black and white stay so; colours that are in no space of a profile.
_WITHOUT = ("1", "LAB", "HSV", "F")


def _kind(mode: str) -> str:
    """What a picture is to a profile, transparency, palette and depth aside."""
    if mode in ("L", "LA", "La") or mode.startswith("I"):
        return "L"
    return "CMYK" if mode == "CMYK" else "RGB"


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, kind: str) -> tuple[str, ImageCms.ImageCmsTransform] | None:
    """None where the profile's numbers are sRGB's."""
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
    except Exception as error:  # whatever a decoder raises is said of what it decodes
        raise UnusableProfile("it is damaged") from error
    mode = _MODES.get(space, space)
    if mode != kind and (mode, kind) != ("RGB", "L"):
        raise UnusableProfile(f"it is for {space} pictures")
    try:
        srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.ImageCmsTransform(opened, ImageCms.ImageCmsProfile(srgb), mode, "RGB", intent, flags=_BLACK_POINT_COMPENSATION)
        return None if mode != "CMYK" and _changes_nothing(transform, mode) else (mode, transform)
    except Exception as error:
        raise UnusableProfile("it is damaged") from error


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """By its numbers: sRGB profiles have many names and sizes."""
    levels = np.linspace(0, 255, 256 if mode == "L" else 9).round().astype(np.uint8)
    grid = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    made = transform.apply(Image.fromarray(grid))
    original = grid[..., None].repeat(3, axis=-1) if mode == "L" else grid
    return int(np.abs(np.asarray(made).astype(int) - original).max()) <= _SAME
