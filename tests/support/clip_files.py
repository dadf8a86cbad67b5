"""Clips made for tests: their frames tell their numbers, their containers and tags are asked for."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from byg_plugin.data import clips


def shade(number: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A frame whose brightness tells its number."""
    return Image.new("RGB", size, (10 + 8 * number,) * 3)


def number_of(image: Image.Image) -> int:
    return round((np.asarray(image, dtype=float).mean() - 10) / 8)


def numbers(path: Path, count: int, fps: float | None = None) -> list[int]:
    return [number_of(image) for image in clips.read_clip(path, count, fps)]


def write(path: Path, frames: int = 20, fps: float = 16, size: tuple[int, int] = (64, 48)) -> Path:
    clips.write_clip(path, (shade(index, size) for index in range(frames)), fps)
    return path


def encode(
    path: Path,
    frames: Iterable[av.VideoFrame],
    codec: str = "libx264",
    *,
    rate: int = 16,
    options: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
    **settings: Any,
) -> Path:
    """Frames as they are, with `settings` (tags, aspect, time base) on the encoder."""
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no {codec}")
    with av.open(str(path), "w") as container:
        container.metadata.update(metadata or {})
        stream: Any = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream(codec, rate=rate)
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
                stream.options = options or {}
                for name, value in settings.items():
                    setattr(stream.codec_context, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shades(count: int, size: tuple[int, int] = (64, 48), times: Sequence[int] | None = None) -> list[av.VideoFrame]:
    """Numbered frames, at these thousandths of a second where they are given."""
    frames = [av.VideoFrame.from_image(shade(index, size)).reformat(format="yuv420p") for index in range(count)]
    for frame, time in zip(frames, times or (), strict=False):
        frame.pts, frame.time_base = time, Fraction(1, 1000)
    return frames


def plain(size: tuple[int, int], values: tuple[int, ...], count: int = 3, pixel_format: str = "yuv420p") -> list[av.VideoFrame]:
    """Frames of one colour, given as what is stored in each plane (8 bit)."""
    frames = []
    for _ in range(count):
        frame = av.VideoFrame(*size, pixel_format)
        for plane, value in zip(frame.planes, values, strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        frames.append(frame)
    return frames


def remux(source: Path, to: Path, skip: int = 0, edit: Callable[[list[av.Packet]], list[av.Packet]] = list) -> Path:
    """The same packets, after `edit`, in another container.

    The first `skip` frames lie before time 0, which an .mp4's edit list cuts off.
    """
    with av.open(str(source)) as old, av.open(str(to), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        frame = 1 / (stream.average_rate * stream.time_base)
        for packet in edit([packet for packet in old.demux(stream) if packet.size]):
            packet.pts -= int(skip * frame)
            packet.dts = None if packet.dts is None else packet.dts - int(skip * frame)
            packet.stream = copy
            new.mux(packet)
    return to


def with_matrix(path: Path, matrix: tuple[float, float, float, float]) -> Path:
    """An .mp4 whose header turns the picture: (x, y) is shown at (a x + c y, b x + d y)."""
    data = bytearray(path.read_bytes())
    offset = data.index(b"tkhd") + 44
    a, b, c, d = (round(value * 65536) for value in matrix)
    data[offset : offset + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path
