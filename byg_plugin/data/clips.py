"""Clips from files and into files, frame by frame."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from byg_plugin.data.media import MAX_SIDE
from byg_plugin.training.extras import require

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
# Seconds. Time stamps are rounded to a file's own clock: .mkv and .webm have thousandths, so a difference of two can be wrong by
# one. The price: a frame may be shown so much before its time.
_TICK = 1e-3
READER = "2"  # raise when `read_clip` gives other frames of a file


def is_clip(path: Path) -> bool:
    """Whether a file is read as a clip, by its name."""
    return path.suffix.lower() in SUFFIXES


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What a file says of its first video stream, and its first frame.

    Attributes:
        size: (width, height) in pixels as it is shown.
        frames: number of frames.
        seconds: from the first frame's time to the end of the last.
    """

    size: tuple[int, int]
    frames: int
    seconds: float

    @property
    def fps(self) -> float:
        """Average frames a second."""
        return self.frames / self.seconds if self.seconds else 1.0

    def frames_at(self, fps: float | None) -> int:
        """How many frames it has at so many a second; None: as they are."""
        return self.frames if fps is None else max(1, math.floor((self.seconds + _TICK) * fps))


def clip_info(path: Path) -> Clip:
    """Size and length of a clip. Decodes one frame.

    Raises:
        ValueError: no such file, not a clip, no video in it, or no frame can be decoded.
    """
    with _opened(path) as (container, stream):
        first = next(_frames(container, stream), None)
        if first is None:
            raise ValueError(f"{path}: no frame can be decoded from it; replace it or remove its tuples")
        size = _upright(first).size
        if max(size) > MAX_SIDE:
            raise ValueError(f"{path}: {size[0]} x {size[1]} pixels; scale it down to at most {MAX_SIDE} a side")
        container.seek(0)
        packets = [p for p in container.demux(stream) if p.size and p.pts is not None]
        times = sorted(float(p.pts * p.time_base) for p in packets)
        if len(times) < 2:
            return Clip(size=size, frames=max(len(times), 1), seconds=_duration(packets))
        # The last frame lasts as long as an average one; stored durations are often missing.
        return Clip(size=size, frames=len(times), seconds=(times[-1] - times[0]) * len(times) / (len(times) - 1))


def read_clip(path: Path, frames: int, fps: float | None = None) -> Iterator[Image.Image]:
    """The first `frames` frames as 8-bit RGB images, one after another; only one is in memory here.

    With `fps`, the frame that is shown at each multiple of 1 / fps seconds after the first one, whatever the file's own
    rate and however uneven it is.

    Raises:
        ValueError: no such file, not a clip, or it ends or breaks before that many frames.
    """
    with _opened(path) as (container, stream):
        decoded = _frames(container, stream)
        shown = decoded if fps is None else _at_rate(decoded, fps)
        count = 0
        for frame in islice(shown, frames):
            count += 1
            yield _upright(frame)
        if count < frames:
            raise ValueError(f"{path}: only {count} of {frames} frames can be decoded, it is damaged or cut off; replace it")


def write_clip(
    path: Path, frames: Iterable[Image.Image], fps: float, settings: Mapping[str, Any] | None = None, *, lossless: bool = False
) -> None:
    """Write RGB images of one size, atomically, with `settings` as JSON in the comment.

    H.264 in an .mp4; `lossless`, FFV1 of the very pixels in an .mkv.

    Raises:
        OSError: it cannot be written.
    """
    av = _av()
    partial = path.with_name(f".partial-{path.name}")
    container_format, codec = ("matroska", "ffv1") if lossless else ("mp4", "libx264")
    try:
        with av.open(str(partial), "w", format=container_format) as container:
            container.metadata["comment"] = json.dumps(settings or {}, ensure_ascii=True)
            stream: Any = None
            for image in frames:
                if stream is None:
                    stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
                    # H.264 stores colours of 2 x 2 pixels together.
                    stream.width, stream.height = image.width + image.width % 2, image.height + image.height % 2
                    stream.pix_fmt, stream.options = ("bgr0", {}) if lossless else ("yuv420p", {"crf": "16"})
                if image.size != (stream.width, stream.height):
                    whole = Image.new("RGB", (stream.width, stream.height), "white")
                    whole.paste(image, (0, 0))
                    image = whole
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            assert stream is not None, "a clip has frames"
            container.mux(stream.encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _av() -> Any:
    require("av", "reading or writing clips", "video")
    import av

    return av


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream)."""
    av = _av()
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                what = "only sound" if container.streams.audio else "no video"
                raise ValueError(f"{path}: has {what} in it; replace it or remove its tuples")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(f"{path}: cannot be read, it is damaged or no clip ({error.strerror or error}); replace it") from error


def _frames(container: Any, stream: Any) -> Iterator[Any]:
    for frame in container.decode(stream):
        if frame.time is not None:
            yield frame


def _at_rate(frames: Iterator[Any], fps: float) -> Iterator[Any]:
    """The latest frame at each multiple of 1 / fps after the first."""
    start, shown, count, number = 0.0, None, 0, 0
    for frame in frames:
        start = start if count else frame.time
        while shown is not None and start + number / fps < frame.time - _TICK:
            yield shown
            number += 1
        shown, count = frame, count + 1
    if shown is None:
        return
    # The last one is shown as long as an average one, as in `clip_info`.
    last = shown.time - start
    end = last * count / (count - 1) if count > 1 else 1 / fps
    while number / fps < end - _TICK:
        yield shown
        number += 1


def _upright(frame: Any) -> Image.Image:
    """RGB as it is shown: a phone stores a portrait clip as a landscape one with a turn in its header."""
    image = frame.to_image()
    turn = int(getattr(frame, "rotation", 0) or 0) % 360
    return image.rotate(turn, expand=True) if turn else image


def _duration(packets: list[Any]) -> float:
    known = [float(p.duration * p.time_base) for p in packets if p.duration]
    return known[0] if known else 0.0
