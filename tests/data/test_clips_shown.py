"""Clips as players show them: order, what an edit list cuts off, turns and mirrors, the shape of pixels."""

from __future__ import annotations

import os
import random
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from byg_plugin.data import clips
from byg_plugin.data.orientation import square_pixels, turn_of
from tests.support.clip_edits import B_FRAMES, b_frames
from tests.support.clip_files import encode, number_of, numbers, remux, shades, with_matrix, write

# --- order, number and length ---


def packed(path: Path) -> Path:
    """An .avi whose B-frames have no times, in an .mp4: the order of decoding is written as if it were that of showing."""
    return remux(b_frames(path.with_suffix(".avi")), path)


def hidden(path: Path) -> Path:
    """VP8 whose sixth packet is a picture that later ones refer to and nobody sees: the encoder makes such of its own in two passes."""

    def hide(packets: list[av.Packet]) -> list[av.Packet]:
        data = bytearray(bytes(packets[5]))
        data[0] &= ~0x10  # show_frame
        unseen = av.Packet(bytes(data))
        unseen.pts, unseen.dts, unseen.time_base = packets[5].pts, packets[5].dts, packets[5].time_base
        return [*packets[:5], unseen, *packets[6:]]

    return remux(encode(path.with_name("whole.webm"), shades(28), "libvpx"), path, edit=hide)


def cut_out(path: Path) -> Path:
    """From an I-frame in the middle of a stream on: the B-frames that are shown before it refer to what is gone."""
    options = B_FRAMES | {"x264-params": "open-gop=1:scenecut=0"}

    def second_group(packets: list[av.Packet]) -> list[av.Packet]:
        group = packets[[number for number, packet in enumerate(packets) if packet.is_keyframe][1] :]
        assert min(packet.pts for packet in group) < group[0].pts
        return group

    return remux(encode(path.with_name("whole.mkv"), shades(28), options=options), path, edit=second_group)


def trimmed(path: Path) -> Path:
    """Without loss: 28 frames, the first 12 cut off by the edit list, and the packets that the first shown one needs kept."""
    if not hasattr(av.stream, "Disposition"):
        pytest.skip("PyAV 14.0 copies no stream's header")
    return remux(b_frames(path.with_name("whole.mp4")), path, skip=12)


@pytest.mark.parametrize(
    ("name", "make", "first"),
    [
        ("a.avi", b_frames, 0),
        ("a.mp4", b_frames, 0),
        ("a.mkv", b_frames, 0),
        ("packed.mp4", packed, 0),
        ("packed.mkv", packed, 0),
        ("trimmed.mp4", trimmed, 12),
        ("trimmed.mov", trimmed, 12),
    ],
)
def test_frames_are_in_order_and_counted_as_they_are_shown(tmp_path: Path, name: str, make: Any, first: int):
    path = make(tmp_path / name)
    clip = clips.clip_info(path)
    assert clip.frames == 28 - first and clip.seconds == pytest.approx(clip.frames / 16, abs=2e-3)
    assert numbers(path, clip.frames) == list(range(first, 28))
    with pytest.raises(ValueError, match=f"only {clip.frames} of 29 frames"):
        numbers(path, 29)
    for fps in (8.0, 32.0):
        count = clip.frames_at(fps)
        assert count == clip.frames * fps / 16
        assert numbers(path, count, fps) == [first + int(k * 16 / fps) for k in range(count)]


@pytest.mark.parametrize(("name", "make"), [("hidden.webm", hidden), ("cut.mkv", cut_out), ("cut.mp4", cut_out)])
def test_packets_that_give_no_frame_are_not_counted_and_move_no_other(tmp_path: Path, name: str, make: Any):
    path = make(tmp_path / name)
    clip = clips.clip_info(path)
    shown = numbers(path, clip.frames)
    with av.open(str(path)) as container:
        assert clip.frames < sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
    with pytest.raises(ValueError, match=f"only {clip.frames} of 29 frames"):
        numbers(path, 29)
    assert shown == sorted(set(shown)) and shown[-1] == 27
    # Each at the time that the whole clip shows it.
    assert numbers(path, clip.frames_at(16), 16) == [max(n for n in shown if n <= k) for k in range(shown[0], 28)]


@pytest.mark.parametrize(
    ("packets", "decoded", "times"),
    [
        # (time of the packet, times of the frames that the decoder gives for it)
        ([0, 4, 2, 1, 3], [[], [], [0], [1], [2, 3, 4]], [0, 1, 2, 3, 4]),
        ([0, 4, 2, 1, 3], [[], [], [0], [1], [3, 4]], [0, 1, 3, 4]),  # it drops one in silence: the others keep their times
        ([0, 1, 2, 3, 4], [[], [], [0], [3], [2, 4, 1]], [0, 1, 2, 3, 4]),  # what the packets carry is the order of decoding
        ([0, 4, 2, 1, 3], [[], [], [0], [4], [2, 1, 5]], [0, 4, 4, 4, 5]),  # time does not go back
    ],
)
def test_times_of_frames(packets: list[int], decoded: list[list[int]], times: list[int]):
    given = [
        SimpleNamespace(
            pts=time,
            dts=None,
            time_base=1,
            duration=1,
            size=1,
            is_discard=False,
            decode=lambda frames=frames: [SimpleNamespace(time=t) for t in frames],
        )
        for time, frames in zip(packets, decoded, strict=True)
    ]
    stream = SimpleNamespace(codec_context=SimpleNamespace(has_b_frames=True))
    frames = clips._frames(Path("a.mkv"), SimpleNamespace(demux=lambda _: iter(given)), stream)
    assert [frame.time for frame in frames] == times


def test_the_trimmed_clip_is_one(tmp_path: Path):
    with av.open(str(trimmed(tmp_path / "a.mp4"))) as container:
        discarded = [packet.is_discard for packet in container.demux(container.streams.video[0]) if packet.size]
    assert len(discarded) > 16 and sum(discarded) > 0


def test_an_avi_holds_a_frame_where_it_has_empty_packets(tmp_path: Path):
    path = encode(tmp_path / "gap.avi", shades(6, times=[0, 62, 250, 312, 375, 625]), "mpeg4", time_base=Fraction(1, 16))
    clip = clips.clip_info(path)
    assert clip.frames == 6 and numbers(path, 6) == list(range(6))
    assert numbers(path, 11, 16) == [0, 1, 1, 1, 2, 3, 4, 4, 4, 4, 5]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_what_is_promised_can_be_read_at_any_rate(tmp_path: Path, suffix: str, seed: int):
    draw = random.Random(seed)
    times = sorted(draw.sample(range(2000), draw.randint(1, 14)))
    path = encode(tmp_path / f"a{suffix}", shades(len(times), times=times), rate=1000, time_base=Fraction(1, 1000), options=B_FRAMES)
    clip = clips.clip_info(path)
    assert clip.frames == len(times) and numbers(path, clip.frames) == list(range(len(times)))
    for fps in (1.0, 7.5, 16.0, 24000 / 1001, 60.0):
        shown = numbers(path, clip.frames_at(fps), fps)
        assert shown == sorted(shown) and shown[0] == 0


def test_a_single_frame_is_shown_as_long_as_the_file_says(tmp_path: Path):
    path = encode(tmp_path / "still.mp4", shades(1), rate=1)
    clip = clips.clip_info(path)
    assert clip.frames == 1 and clip.frames_at(16) == 16 and numbers(path, 16, 16) == [0] * 16


# --- turns, mirrors, shape ---

QUARTERS = [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1), (0, 1, -1, 0), (0, -1, 1, 0), (0, 1, 1, 0), (0, -1, -1, 0)]
CORNERS = {(-1, -1): (200, 40, 40), (1, -1): (40, 200, 40), (-1, 1): (40, 40, 200), (1, 1): (20, 20, 20)}


def four_colours() -> Image.Image:
    image = Image.new("RGB", (96, 64))
    for (x, y), colour_ in CORNERS.items():
        image.paste(colour_, (48 * (x > 0), 32 * (y > 0), 48 + 48 * (x > 0), 32 + 32 * (y > 0)))
    return image


@pytest.mark.parametrize("matrix", QUARTERS)
def test_every_turn_and_mirror_of_a_header_is_applied(tmp_path: Path, matrix: tuple[int, int, int, int]):
    clips.write_clip(tmp_path / "a.mp4", [four_colours()] * 3, 16)
    path = with_matrix(tmp_path / "a.mp4", matrix)
    a, b, c, d = matrix
    image = list(clips.read_clip(path, 3))[-1]
    assert image.size == clips.clip_info(path).size == ((96, 64) if a else (64, 96))
    for (x, y), expected in CORNERS.items():
        right, below = a * x + c * y, b * x + d * y
        seen = image.getpixel(((right > 0) * (image.width - 17) + 8, (below > 0) * (image.height - 17) + 8))
        assert np.abs(np.subtract(seen, expected)).max() <= 6


@pytest.mark.parametrize("matrix", [(0.966, 0.259, -0.259, 0.966), (1, 0.5, 0, 1)])
def test_other_turns_are_refused_by_name(tmp_path: Path, matrix: tuple[float, float, float, float]):
    path = with_matrix(write(tmp_path / "a.mp4"), matrix)
    for read in (clips.clip_info, lambda path: list(clips.read_clip(path, 3))):
        with pytest.raises(ValueError, match="a.mp4: its header turns the picture"):
            read(path)


def test_a_matrix_of_zeros_turns_nothing():
    assert turn_of(bytes(36)) is None


@pytest.mark.parametrize(
    ("aspect", "size"),
    [
        (None, (64, 48)),
        (Fraction(1), (64, 48)),
        (Fraction(2), (128, 48)),
        (Fraction(1, 2), (64, 96)),
        (Fraction(4, 3), (85, 48)),
        (Fraction(1279, 1280), (64, 48)),
    ],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_pixels_are_square(tmp_path: Path, suffix: str, aspect: Fraction | None, size: tuple[int, int]):
    settings = {} if aspect is None else {"sample_aspect_ratio": aspect}
    path = encode(tmp_path / f"a{suffix}", shades(3), **settings)
    images = list(clips.read_clip(path, 3))
    assert clips.clip_info(path).size == size == square_pixels(64, 48, aspect)
    assert [image.size for image in images] == [size] * 3 and [number_of(image) for image in images] == [0, 1, 2]


@pytest.mark.parametrize(
    ("stored_size", "aspect", "size"),
    [
        ((1440, 1080), Fraction(4, 3), (1920, 1080)),
        ((720, 576), Fraction(16, 15), (768, 576)),
        ((720, 480), Fraction(8, 9), (720, 540)),
        ((1280, 720), Fraction(1279, 1280), (1280, 720)),
        ((1280, 720), Fraction(-2), (1280, 720)),
    ],
)
def test_the_short_side_grows(stored_size: tuple[int, int], aspect: Fraction, size: tuple[int, int]):
    assert square_pixels(*stored_size, aspect) == size


def test_pixels_are_made_square_before_the_picture_is_turned(tmp_path: Path):
    path = with_matrix(encode(tmp_path / "a.mp4", shades(3), sample_aspect_ratio=Fraction(2)), (0, 1, -1, 0))
    assert clips.clip_info(path).size == (48, 128) == next(clips.read_clip(path, 1)).size


def test_frames_of_another_size_are_scaled_to_the_first_ones(tmp_path: Path):
    """Recorders of video calls change the size midway."""
    small, large = (encode(tmp_path / f"{w}.h264", shades(4, (w, 48))) for w in (64, 128))
    (tmp_path / "both.h264").write_bytes(small.read_bytes() + large.read_bytes())
    with av.open(str(tmp_path / "both.h264"), format="h264") as old, av.open(str(tmp_path / "a.mpg"), "w", format="mpegts") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(packet for packet in old.demux(old.streams.video[0]) if packet.size):
            packet.pts = packet.dts = number * 3600
            packet.time_base, packet.stream = Fraction(1, 90000), copy
            new.mux(packet)
    os.replace(tmp_path / "a.mpg", tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert {frame.width for frame in container.decode(video=0)} == {64, 128}
    assert {image.size for image in clips.read_clip(tmp_path / "a.mp4", 8)} == {(64, 48)}
