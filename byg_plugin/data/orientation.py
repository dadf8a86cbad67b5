"""Which way up and how wide a clip is shown: phones store frames as the sensor has them and say in the header how a player turns them."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

from PIL import Image

_Turn = Image.Transpose
# The image of the right (x, y) and of the down (x, y) direction; y grows downwards.
_TURNS: dict[tuple[tuple[int, int], tuple[int, int]], Image.Transpose | None] = {
    ((1, 0), (0, 1)): None,
    ((-1, 0), (0, 1)): _Turn.FLIP_LEFT_RIGHT,
    ((1, 0), (0, -1)): _Turn.FLIP_TOP_BOTTOM,
    ((-1, 0), (0, -1)): _Turn.ROTATE_180,
    ((0, 1), (-1, 0)): _Turn.ROTATE_270,  # Pillow counts counterclockwise
    ((0, -1), (1, 0)): _Turn.ROTATE_90,
    ((0, 1), (1, 0)): _Turn.TRANSPOSE,
    ((0, -1), (-1, 0)): _Turn.TRANSVERSE,
}
_SLACK = 0.02  # of a unit vector, about a degree: what a header's fixed-point numbers and careless writers are off by


def turn_of(display_matrix: bytes) -> Image.Transpose | None:
    """What a display matrix does to a picture: one of the seven turns and mirrors, None for nothing.

    Its scale is none of our business: the container's reader has put it into the pixel aspect.

    Args:
        display_matrix: 9 native 32-bit integers by rows, for (x, y, 1) from the left.

    Raises:
        ValueError: it turns by something else than quarters, or shears.
    """
    a, b, _, c, d, *_ = struct.unpack("=9i", display_matrix[:36])
    right, down = _direction(a, b), _direction(c, d)
    if right is None or down is None:  # players take an empty matrix for none
        return None
    for (to_right, to_down), turn in _TURNS.items():
        if math.dist(right, to_right) < _SLACK and math.dist(down, to_down) < _SLACK:
            return turn
    degrees = math.degrees(math.atan2(right[1], right[0]))
    raise ValueError(f"its header turns the picture by {degrees:.0f} degrees or shears it; save it upright")


def _direction(x: int, y: int) -> tuple[float, float] | None:
    length = math.hypot(x, y)
    return (x / length, y / length) if length else None


def square_pixels(width: int, height: int, aspect: Fraction | None) -> tuple[int, int]:
    """The size at which a picture of pixels that are `aspect` times as wide as high has its shape; the short side grows.

    Half a per cent is what rounding to even sizes makes, and none.
    """
    if not aspect or aspect < 0 or abs(aspect - 1) <= 0.005:
        return width, height
    return (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
