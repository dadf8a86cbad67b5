"""Colours of clips: RGB from what is stored, and back: which matrix, which range, and what is not ordinary video.

Numbers are those of ITU-T H.273, which FFmpeg and the containers share.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

BT709 = 1  # matrix, primaries and transfer alike
UNSPECIFIED = 2
_BT601 = 6
LIMITED, FULL = 1, 2
_DEFAULT = 5  # FFmpeg's scaler has numbers of its own for some matrices
TO_BT709_OPTIONS = {
    "format": "yuv420p",
    "src_colorspace": _DEFAULT,
    "dst_colorspace": BT709,
    "src_color_range": FULL,
    "dst_color_range": LIMITED,
}
"""What PyAV's reformatter is asked for, to give an RGB frame as the YUV that `tag_bt709` declares."""
# Matrices that the scaler has.
_MATRICES = {1: BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: 9, 10: 9}
_UNKNOWN_MATRICES = (UNSPECIFIED, 0, 3)  # 0 would be RGB and 3 is reserved: on YUV both are slips of a writer
_OTHER_MATRICES = {8: "YCgCo", 11: "YDzDx", 12: "constants of its primaries", 13: "constants of its primaries", 14: "ICtCp", 15: "IPT-PQ"}
_NOT_SDR = {8: "linear light", 9: "a logarithmic transfer", 10: "a logarithmic transfer", 16: "HDR (PQ)", 17: "cinema XYZ", 18: "HDR (HLG)"}
# (x, y) of red, green, blue. All have the white of BT.709, D65; what is not here differs from BT.709 by less than one sees.
_WIDE_PRIMARIES = {
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),  # BT.2020
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # Display P3
}
_BT709_PRIMARIES = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
_WHITE = (0.3127, 0.3290)
_OTHER_PRIMARIES = {10: "XYZ", 11: "DCI-P3"}
_GAMMA = 2.4  # of the display that ordinary video is made for (BT.1886)


def matrix_of(tag: int, width: int, height: int) -> int:
    """The matrix that turned a frame's RGB into what is stored.

    Args:
        tag: what the frame says.
        width, height: stored pixels. Untagged frames are BT.709 at HD sizes and BT.601 below, as players take them.

    Raises:
        ValueError: it is none that can be undone here.
    """
    if tag in _UNKNOWN_MATRICES:
        return BT709 if width >= 1280 or height > 576 else _BT601
    if tag not in _MATRICES:
        name = _OTHER_MATRICES.get(tag, f"matrix {tag}")
        raise ValueError(f"its colours are stored as {name}, which cannot be read; convert it to BT.709, e.g. with ffmpeg")
    return _MATRICES[tag]


def refuse_not_sdr(transfer: int, primaries: int) -> None:
    """Refuse what would come out grey or of other colours if its numbers were taken for ordinary video's.

    Raises:
        ValueError: names what it is, and the remedy.
    """
    name = _NOT_SDR.get(transfer) or _OTHER_PRIMARIES.get(primaries)
    if name is not None:
        raise ValueError(f"is {name}, only ordinary (SDR) video is read; convert it first (docs/video.md says how)")


def to_rgb_options(frame: Any) -> dict[str, Any]:
    """What PyAV's reformatter is asked for, to give a decoded frame as 8-bit RGB, or RGBA where it has transparency.

    Sets the tags on the frame itself: every version of PyAV heeds those.

    Raises:
        ValueError: see `matrix_of`.
    """
    name, components = frame.format.name, frame.format.components
    for tag in ("color_trc", "color_primaries"):
        if hasattr(frame, tag):  # PyAV 17 shows them to the scaler, which refuses reserved ones
            setattr(frame, tag, UNSPECIFIED)
    options: dict[str, Any] = {"format": "rgba" if any(component.is_alpha for component in components) else "rgb24"}
    if frame.format.is_rgb or frame.format.has_palette:
        return options
    full = frame.color_range == FULL or name.startswith("yuvj") or (len(components) == 1 and frame.color_range != LIMITED)  # grey
    frame.colorspace = matrix_of(frame.colorspace, frame.width, frame.height)
    # RGB has no matrix of its own, but versions before 17 heed the source's only where the target's is another.
    return options | {"dst_colorspace": _DEFAULT, "src_color_range": FULL if full else LIMITED, "dst_color_range": FULL}


def tag_bt709(codec_context: Any) -> None:
    """Say in an encoder's stream what `TO_BT709_OPTIONS` make: players guess by size where nothing is said."""
    codec_context.colorspace = codec_context.color_primaries = codec_context.color_trc = BT709
    codec_context.color_range = LIMITED


@cache
def to_bt709(primaries: int) -> Callable[[Image.Image], Image.Image] | None:
    """What brings RGB images of these primaries to BT.709's, clipped; None where they are near enough as they are."""
    if primaries not in _WIDE_PRIMARIES:
        return None
    to_xyz, from_xyz = _to_xyz(_WIDE_PRIMARIES[primaries]), np.linalg.inv(_to_xyz(_BT709_PRIMARIES))
    matrix = (from_xyz @ to_xyz).astype(np.float32)
    linear = (np.arange(256, dtype=np.float32) / 255) ** _GAMMA

    def convert(image: Image.Image) -> Image.Image:
        light = np.clip(linear[np.asarray(image)] @ matrix.T, 0, 1)
        return Image.fromarray((light ** (1 / _GAMMA) * 255).round().astype(np.uint8))

    return convert


def _to_xyz(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """RGB to CIE XYZ, where (1, 1, 1) is D65."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    x, y = _WHITE
    return columns * np.linalg.solve(columns, [x / y, 1, (1 - x - y) / y])
