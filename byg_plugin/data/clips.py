"""Clips from files and into files, frame by frame."""

from __future__ import annotations

import heapq
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from byg_plugin.config.extras import require
from byg_plugin.data.clip_colours import TO_BT709_OPTIONS, UNSPECIFIED, refuse_not_sdr, tag_bt709, to_bt709, to_rgb_options
from byg_plugin.data.media import MAX_SIDE, to_rgb
from byg_plugin.data.orientation import square_pixels, turn_of

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
# Seconds. Time stamps are rounded to a file's own clock: .mkv and .webm have thousandths, so a difference of two can be wrong by
# one. The price: a frame may be shown so much before its time.
_TICK = 1e-3
READER = "3"  # raise when `read_clip` gives other frames of a file, or `clip_info` another size or length
# What clips come in, also under another suffix. FFmpeg's playlists and scripts are left out: they open further files and addresses.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,apng,mxf,nut,ivf,rm,dv,wtv"


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
    """Size and length of a clip, as `read_clip` gives it.

    Decodes one frame, and all of them where the packets do not tell how many are shown.

    Raises:
        ValueError: no such file, not a clip, no video in it, no frame can be decoded, or it is not ordinary (SDR) video.
    """
    with _opened(path) as (container, stream):
        first, packets = None, []
        for packet in _packets(path, container, stream):
            if first is None:
                first = next(iter(_decoded(path, packet)), None)
            if packet.size and not packet.is_discard:
                packets.append((_time_of(packet), float((packet.duration or 0) * packet.time_base)))
        if first is None:
            raise ValueError(f"{path}: no frame can be decoded from it; replace it or remove its tuples")
        size = _Shown(path, stream)(first).size
        if _packets_tell(container, stream, first, [time for time, _ in packets]):
            times = [time for time, _ in packets if time is not None]
            start, last, lasts = min(times), max(times), packets[0][1]
            return Clip(size=size, frames=len(times), seconds=_end(start, last, len(times), lasts) - start)
    with _opened(path) as (container, stream):
        frames = [(frame.time, frame.lasts) for frame in _frames(path, container, stream)]
    if not frames:
        raise ValueError(f"{path}: its frames have no times; write it anew, e.g. with ffmpeg -i IN OUT")
    (start, lasts), (last, _) = frames[0], frames[-1]
    return Clip(size=size, frames=len(frames), seconds=_end(start, last, len(frames), lasts) - start)


def read_clip(path: Path, frames: int, fps: float | None = None) -> Iterator[Image.Image]:
    """The first `frames` frames as a player shows them: 8-bit RGB images, one after another; only one is in memory here.

    Upright, in the order and with the shape of pixels that the file asks for, without what its edit list cuts off; all of the
    first one's size. With `fps`, the frame that is shown at each multiple of 1 / fps seconds after the first one, whatever the
    file's own rate and however uneven it is.

    Raises:
        ValueError: no such file, not a clip, not ordinary (SDR) video, or it ends or breaks before that many frames.
    """
    with _opened(path) as (container, stream):
        decoded = _frames(path, container, stream)
        picture = _Shown(path, stream)
        count = 0
        for frame in islice(decoded if fps is None else _at_rate(decoded, fps), frames):
            count += 1
            yield picture(frame.decoded)
        if count < frames:
            raise ValueError(f"{path}: only {count} of {frames} frames can be decoded, it is damaged or cut off; replace it")


def write_clip(
    path: Path, frames: Iterable[Image.Image], fps: float, settings: Mapping[str, Any] | None = None, *, lossless: bool = False
) -> None:
    """Write RGB images of one size, atomically, with `settings` as JSON in the comment.

    H.264 in an .mp4, its colours stored and tagged as limited-range BT.709 at any size; `lossless`, FFV1 of the very pixels in an .mkv.

    Raises:
        OSError: it cannot be written.
    """
    av = _av()
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()
    partial = path.with_name(f".partial-{path.name}")
    container_format, codec = ("matroska", "ffv1") if lossless else ("mp4", "libx264")
    try:
        with av.open(str(partial.absolute()), "w", format=container_format) as container:
            container.metadata["comment"] = json.dumps(settings or {}, ensure_ascii=True)
            stream: Any = None
            for image in frames:
                if stream is None:
                    stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
                    # H.264 stores colours of 2 x 2 pixels together.
                    stream.width, stream.height = image.width + image.width % 2, image.height + image.height % 2
                    stream.pix_fmt, stream.options = ("bgr0", {}) if lossless else ("yuv420p", {"crf": "16"})
                    if not lossless:
                        tag_bt709(stream.codec_context)
                if image.size != (stream.width, stream.height):
                    whole = Image.new("RGB", (stream.width, stream.height), "white")
                    whole.paste(image, (0, 0))
                    image = whole
                frame = av.VideoFrame.from_image(image)
                container.mux(stream.encode(frame if lossless else reformatter.reformat(frame, **TO_BT709_OPTIONS)))
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
    """(container, its first video stream that is no cover picture)."""
    av = _av()
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with _damage_named(path):
        # Absolute: FFmpeg would take "a:b.mp4" for an address. Only the file itself: a playlist under a clip's name opens others.
        # Titles need not be UTF-8.
        options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
        container = av.open(str(path.absolute()), container_options=options, metadata_errors="ignore")
    with container:
        stream = _film(container)
        if stream is None:
            what = "only sound" if container.streams.audio else "no video"
            raise ValueError(f"{path}: has {what} in it; replace it or remove its tuples")
        if stream.codec_context is None:
            raise ValueError(f"{path}: its video is stored in a way that this PyAV has no decoder for; save it as H.264 in an .mp4")
        if max(size := (stream.codec_context.width, stream.codec_context.height)) > MAX_SIDE:
            raise ValueError(f"{path}: {_too_large(*size)}")
        stream.thread_type = "AUTO"
        yield container, stream


def _film(container: Any) -> Any:
    """The first video stream whose frames follow one another; None where there is none."""
    import av.stream

    if not hasattr(av.stream, "Disposition"):  # PyAV 14.0
        return container.streams.best("video")
    pictures = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    return next((stream for stream in container.streams.video if not stream.disposition & pictures), None)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Around calls of PyAV alone: decoders raise all kinds of things, and each means that the file is damaged."""
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{path}: cannot be read, it is damaged or no clip ({reason}); replace it") from error


def _too_large(width: int, height: int) -> str:
    return f"{width} x {height} pixels; scale it down to at most {MAX_SIDE} a side"


def _packets(path: Path, container: Any, stream: Any) -> Iterator[Any]:
    """In the order of decoding; the last one is empty and lets the decoder give what it still holds."""
    packets = container.demux(stream)
    while True:
        with _damage_named(path):
            packet = next(packets, None)
        if packet is None:
            return
        if packet.size or packet.dts is None:  # AVI has empty ones where a frame stays; the decoder would take one for the end
            yield packet


def _decoded(path: Path, packet: Any) -> list[Any]:
    with _damage_named(path):
        return packet.decode()


def _time_of(packet: Any) -> float | None:
    """Seconds."""
    stamp = packet.dts if packet.pts is None else packet.pts
    return None if stamp is None else float(stamp * packet.time_base)


class _Frame(NamedTuple):
    """A decoded frame, the second it is shown from, and how long its clip's first packet says it lasts (0: it does not)."""

    decoded: Any
    time: float
    lasts: float


def _frames(path: Path, container: Any, stream: Any) -> Iterator[_Frame]:
    """In the order they are shown.

    AVI stores no times: what its packets carry counts the order of decoding, also after a remux to another container. Decoders give
    frames in the order of showing, so there the k-th one has the k-th smallest time. Packets that are out of order tell that their
    times are those of showing.
    """
    waiting: list[float] = []
    latest, begun, lasts, shown_times = -math.inf, -math.inf, None, False
    for packet in _packets(path, container, stream):
        time = _time_of(packet)
        if time is not None:
            shown_times |= time < latest
            latest = time
            if not packet.is_discard:
                heapq.heappush(waiting, time)
                lasts = float((packet.duration or 0) * packet.time_base) if lasts is None else lasts
        for frame in _decoded(path, packet):
            time = frame.time
            if waiting and (time is None or (stream.codec_context.has_b_frames and not shown_times)):
                time = heapq.heappop(waiting)
            if time is None:
                continue
            begun = max(begun, time)  # time does not go back, whatever a damaged file says
            yield _Frame(frame, begun, lasts or 0.0)
            while waiting and waiting[0] <= begun:
                heapq.heappop(waiting)


def _packets_tell(container: Any, stream: Any, first: Any, times: list[float | None]) -> bool:
    """Whether each packet is a frame that is shown."""
    # Hidden frames are packets of VP8, a field may be one of interlaced video, AVI packs two frames into one. A stream that begins
    # in the middle has frames before its first one that nothing can be decoded from.
    doubtful = container.format.name == "avi" or stream.codec_context.name in ("vp8", "libvpx") or first.interlaced_frame
    known = [time for time in times if time is not None]
    return not doubtful and 0 < len(known) == len(times) and known[0] == min(known)


def _end(start: float, last: float, count: int, lasts: float) -> float:
    """The second at which a clip ends whose `count` frames begin between `start` and `last`.

    The last frame lasts as long as an average one; stored durations are often missing. `lasts`: of an only one.
    """
    return start + (last - start) * count / (count - 1) if count > 1 else start + lasts


def _at_rate(frames: Iterator[_Frame], fps: float) -> Iterator[_Frame]:
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
    end = max(_end(start, shown.time, count, shown.lasts) - start, 1 / fps)
    while number / fps < end - _TICK:
        yield shown
        number += 1


class _Shown:
    """Frames of a stream as a player shows them: RGB, square pixels, upright, of the first one's size."""

    def __init__(self, path: Path, stream: Any):
        from av.video.reformatter import VideoReformatter

        self.path, self.stream = path, stream
        self._reformatter = VideoReformatter()
        self._size: tuple[int, int] | None = None  # before it is turned
        self._turn: Image.Transpose | None = None
        self._gamut: Callable[[Image.Image], Image.Image] | None = None

    def __call__(self, frame: Any) -> Image.Image:
        """An image of a decoded frame.

        Raises:
            ValueError: its colours or its turn are none that can be shown here.
        """
        try:
            if self._size is None:
                self._begin(frame)
            assert self._size is not None
            options = to_rgb_options(frame)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        with _damage_named(self.path):
            pixels = self._reformatter.reformat(frame, *self._size, **options).to_ndarray()
        image = to_rgb(Image.fromarray(pixels))
        image = image if self._gamut is None else self._gamut(image)
        return image if self._turn is None else image.transpose(self._turn)

    def _begin(self, frame: Any) -> None:
        transfer, primaries = (_tag(name, frame, self.stream) for name in ("color_trc", "color_primaries"))
        refuse_not_sdr(transfer, primaries)
        self._gamut = to_bt709(primaries)
        matrix = frame.side_data.get("DISPLAYMATRIX")
        self._turn = None if matrix is None else turn_of(bytes(matrix))
        width, height = square_pixels(frame.width, frame.height, self.stream.sample_aspect_ratio)
        if max(width, height) > MAX_SIDE:
            raise ValueError(_too_large(width, height))
        self._size = width, height


def _tag(name: str, frame: Any, stream: Any) -> int:
    """A tag of H.273: PyAV has it on frames from 17 on."""
    of_frame = getattr(frame, name, UNSPECIFIED)
    return getattr(stream.codec_context, name) if of_frame == UNSPECIFIED else of_frame
