"""Clips as players show them: order, what an edit list cuts off, turns and mirrors, the shape of pixels, colours, covers."""

from __future__ import annotations

import json
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

from byg_plugin.data import clip_colours, clips
from byg_plugin.data.orientation import square_pixels, turn_of
from tests.support.clip_files import encode, number_of, numbers, plain, remux, shade, shades, with_matrix, write

B_FRAMES = {"bf": "3", "b-adapt": "0", "g": "10"}
RED = (200, 30, 30)


def b_frames(path: Path, count: int = 28) -> Path:
    return encode(path, shades(count), options=B_FRAMES)


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


# --- colours ---

# Kr, Kb of H.273's matrices.
MATRICES = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}


def stored(rgb: tuple[float, ...], matrix: int, full: bool = False) -> tuple[int, int, int]:
    """Y, Cb, Cr of a colour by the formulas of H.273."""
    kr, kb = MATRICES[matrix]
    r, g, b = (value / 255 for value in rgb)
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 - 2 * kb), (r - y) / (2 - 2 * kr)
    scale, chroma, black = (255, 255, 0) if full else (219, 224, 16)
    return round(black + scale * y), round(128 + chroma * cb), round(128 + chroma * cr)


def colour_of(path: Path) -> tuple[float, ...]:
    image = np.asarray(next(clips.read_clip(path, 1)), dtype=float)
    assert np.ptp(image.reshape(-1, 3), axis=0).max() <= 2, "a frame of one colour"
    return tuple(image.mean(axis=(0, 1)))


SD, HD, TALL = (64, 48), (1280, 720), (64, 640)


@pytest.mark.parametrize(
    ("size", "tag", "full", "matrix"),
    [
        (SD, 2, False, 6),
        (HD, 2, False, 1),
        (TALL, 2, False, 1),
        ((1024, 576), 2, False, 6),
        (SD, 1, False, 1),
        (HD, 5, False, 5),
        (HD, 6, False, 6),
        (SD, 4, False, 4),
        (SD, 7, False, 7),
        (SD, 9, False, 9),
        (SD, 1, True, 1),
        (SD, 6, True, 6),
        (HD, 1, True, 1),
        (SD, 2, True, 6),
    ],
)
@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "ffv1")])
def test_colours_are_read_by_tag_and_else_by_size(
    tmp_path: Path, suffix: str, codec: str, size: tuple[int, int], tag: int, full: bool, matrix: int
):
    tags = {"colorspace": tag, "color_range": 2 if full else 1} if tag != 2 or full else {}
    path = encode(tmp_path / f"a{suffix}", plain(size, stored(RED, matrix, full)), codec, options={}, **tags)
    assert np.abs(np.subtract(colour_of(path), RED)).max() <= 2


@pytest.mark.parametrize("size", [SD, HD, (1920, 1080)])
def test_written_clips_are_bt709_and_say_so(tmp_path: Path, size: tuple[int, int]):
    path = tmp_path / "a.mp4"
    clips.write_clip(path, [Image.new("RGB", size, RED)] * 2, 16)
    assert np.abs(np.subtract(colour_of(path), RED)).max() <= 2
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        frame = next(container.decode(video=0))
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert (frame.colorspace, frame.color_range) == (1, 1)
        assert [bytes(plane)[size[0] // 4] for plane in frame.planes] == pytest.approx(stored(RED, 1), abs=1)


@pytest.mark.parametrize("size", [SD, (34, 22)])
def test_lossless_clips_are_the_very_pixels(tmp_path: Path, size: tuple[int, int]):
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(3)]
    clips.write_clip(tmp_path / "a.mkv", images, 16, lossless=True)
    for image, read in zip(images, clips.read_clip(tmp_path / "a.mkv", 3), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(read))


# Linear light of BT.709 in wider primaries, rounded as ITU-R BT.2087 and Apple's profile give them.
WIDER = {
    9: ((0.6274, 0.3293, 0.0433), (0.0691, 0.9195, 0.0114), (0.0164, 0.0880, 0.8956)),
    12: ((0.8225, 0.1774, 0.0), (0.0332, 0.9669, 0.0), (0.0171, 0.0724, 0.9108)),
}


@pytest.mark.parametrize("primaries", [9, 12])
@pytest.mark.parametrize("rgb", [RED, (60, 180, 220), (128, 128, 128)])
def test_wide_primaries_are_brought_to_bt709(tmp_path: Path, primaries: int, rgb: tuple[int, int, int]):
    wide = (np.array(WIDER[primaries]) @ (np.array(rgb) / 255) ** 2.4) ** (1 / 2.4) * 255
    matrix = 9 if primaries == 9 else 1
    path = encode(
        tmp_path / "a.mp4", plain(SD, stored(tuple(wide), matrix)), colorspace=matrix, color_primaries=primaries, color_trc=1, color_range=1
    )
    assert np.abs(np.subtract(colour_of(path), rgb)).max() <= 4
    assert clip_colours.to_bt709(1) is None


@pytest.mark.parametrize(
    ("tags", "name"),
    [
        ({"color_trc": 16, "color_primaries": 9, "colorspace": 9}, r"is HDR \(PQ\)"),
        ({"color_trc": 18, "color_primaries": 9, "colorspace": 9}, r"is HDR \(HLG\)"),
        ({"color_trc": 16}, r"is HDR \(PQ\)"),
        ({"color_trc": 8}, "is linear light"),
        ({"color_trc": 9}, "is a logarithmic transfer"),
        ({"color_primaries": 11}, "is DCI-P3"),
        ({"colorspace": 8}, "stored as YCgCo"),
        ({"colorspace": 14}, "stored as ICtCp"),
    ],
)
@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "ffv1")])
def test_what_is_not_ordinary_video_is_refused_by_name(tmp_path: Path, suffix: str, codec: str, tags: dict[str, int], name: str):
    path = encode(tmp_path / f"a{suffix}", shades(3), codec, options={}, **tags)
    for read in (clips.clip_info, lambda path: list(clips.read_clip(path, 3))):
        with pytest.raises(ValueError, match=name) as error:
            read(path)
        assert str(path) in str(error.value)


def test_transparency_is_put_on_white(tmp_path: Path):
    pixels = np.zeros((48, 64, 4), dtype=np.uint8)
    pixels[:, 32:] = (200, 30, 30, 255)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format="bgra")
    image = next(clips.read_clip(encode(tmp_path / "a.mkv", [frame], "ffv1"), 1))
    assert image.mode == "RGB" and image.getpixel((5, 5)) == (255, 255, 255) and image.getpixel((60, 5)) == RED


# --- what is beside the pictures ---


def cover_first(path: Path) -> Path:
    """A cover picture, as music shops and phones put it in, before the film."""
    disposition = getattr(av.stream, "Disposition", None)
    if disposition is None:
        pytest.skip("this PyAV cannot mark a cover")
    plain_path = write(path.with_name("plain.mp4"))
    with av.open(str(plain_path)) as old, av.open(str(path), "w") as new:
        cover = new.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 320, 240, "yuvj420p"
        cover.disposition = disposition.attached_pic.value
        film = new.add_stream_from_template(old.streams.video[0])
        picture = cover.encode(av.VideoFrame.from_image(shade(3, (320, 240))).reformat(format="yuvj420p"))
        new.mux(picture)
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = film
                new.mux(packet)
    return path


def udta_first(path: Path) -> Path:
    """The header's boxes in another order: readers number streams as they come."""
    data = path.read_bytes()
    moov = data.index(b"moov") - 4
    end = moov + int.from_bytes(data[moov : moov + 4], "big")
    boxes, place = [], moov + 8
    while place < end:
        size = int.from_bytes(data[place : place + 4], "big")
        boxes.append(data[place : place + size])
        place += size
    boxes.sort(key=lambda box: box[4:8] != b"udta")
    path.write_bytes(data[: moov + 8] + b"".join(boxes) + data[end:])
    return path


@pytest.mark.parametrize("arrange", [lambda path: path, udta_first], ids=["after", "before"])
def test_a_cover_picture_is_not_the_clip(tmp_path: Path, arrange: Any):
    path = arrange(cover_first(tmp_path / "a.mp4"))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 2
        assert (container.streams.video[0].codec_context.name == "mjpeg") == (arrange is udta_first)
    clip = clips.clip_info(path)
    assert clip.size == (64, 48) and clip.frames == 20 and numbers(path, 20) == list(range(20))


@pytest.mark.parametrize("suffix", clips.SUFFIXES)
def test_a_title_that_is_not_utf8_is_no_reason_to_refuse_a_clip(tmp_path: Path, suffix: str):
    codec = "libvpx" if suffix == ".webm" else "libx264"
    path = encode(tmp_path / f"a{suffix}", shades(5), codec, metadata={"title": "cafe of Paris"})
    data = path.read_bytes()
    assert data.count(b"cafe of Paris") == 1
    path.write_bytes(data.replace(b"cafe of", b"caf\xe9 of"))
    assert clips.clip_info(path).frames == 5 and numbers(path, 5) == list(range(5))


@pytest.mark.parametrize("name", ["take:2.mp4", "http:a.mp4", "50%d.mp4", "-i.mp4", "caf\u00e9 \u6d77.mp4", os.fsdecode(b"caf\xe9.mp4")])
def test_names_are_files_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    path = write(Path(name), 3)
    assert clips.clip_info(path).frames == 3 and numbers(path, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    "text",
    ["ffconcat version 1.0\nfile 'real.mp4'\n", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nreal.mp4\n#EXT-X-ENDLIST\n"],
    ids=["script", "playlist"],
)
def test_a_list_of_other_files_is_no_clip(tmp_path: Path, text: str):
    write(tmp_path / "real.mp4")
    (tmp_path / "a.mp4").write_text(text)
    with pytest.raises(ValueError, match="a.mp4: cannot be read, it is damaged or no clip"):
        clips.clip_info(tmp_path / "a.mp4")


# --- damage ---


@pytest.mark.parametrize("error", [RuntimeError("no"), UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "no"), MemoryError(), KeyError("x")])
@pytest.mark.parametrize("where", ["open", "demux", "decode", "convert"])
def test_whatever_a_decoder_raises_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception):
    path = write(tmp_path / "a.mp4")

    def failing(*_: Any, **__: Any) -> Any:
        raise error

    class Reader:
        reformat = failing

    class Container:
        def __init__(self, container: Any):
            self.container = container

        def __enter__(self) -> Container:
            return self

        def __exit__(self, *_: Any) -> None:
            self.container.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.container, name)

        def demux(self, stream: Any) -> Any:
            if where == "demux":
                failing()
            for packet in self.container.demux(stream):
                yield Packet(packet)

    class Packet:
        def __init__(self, packet: Any):
            self.packet = packet

        def __getattr__(self, name: str) -> Any:
            return failing if name == where else getattr(self.packet, name)

    opened = av.open
    monkeypatch.setattr(av, "open", failing if where == "open" else lambda *a, **k: Container(opened(*a, **k)))
    if where == "convert":
        monkeypatch.setattr("av.video.reformatter.VideoReformatter", Reader)
    for read in (clips.clip_info, lambda path: list(clips.read_clip(path, 3))):
        with pytest.raises(ValueError, match="a.mp4: cannot be read, it is damaged or no clip"):
            read(path)


def test_our_own_mistakes_are_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(clips, "square_pixels", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        clips.clip_info(write(tmp_path / "a.mp4"))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi"])
def test_damaged_clips_are_read_or_refused_by_name(tmp_path: Path, name: str):
    whole = b_frames(tmp_path / name).read_bytes()
    draw, refused = random.Random(0), 0
    for number in range(60):
        data = bytearray(whole)
        if number % 3 == 0:
            del data[draw.randrange(len(data)) :]
        else:
            for _ in range(draw.choice((1, 8, 64))):
                data[draw.randrange(len(data))] = draw.randrange(256)
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(data)
        try:
            clip = clips.clip_info(path)
            for _ in clips.read_clip(path, min(clip.frames_at(16), 100), 16):
                pass
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert 10 < refused < 60


# --- what follows a change of reading ---


def test_sizes_and_lengths_of_another_reader_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from byg_plugin.data.cache import ImageFiles

    path = write(tmp_path / "a.mp4")
    os.utime(path, (1, 1))
    files = ImageFiles.load(tmp_path)
    assert files.clip(path).frames == 20
    files.save()
    looked: list[Path] = []
    look = clips.clip_info
    monkeypatch.setattr(clips, "clip_info", lambda file: looked.append(file) or look(file))
    assert ImageFiles.load(tmp_path).clip(path).frames == 20 and looked == []
    (tmp_path / "files.json").write_text(json.dumps({str(path): [*files.known[str(path)][:5], 7, 1.25]}))  # before readers were kept
    assert ImageFiles.load(tmp_path).clip(path).frames == 20 and looked == [path]
    files.save()
    monkeypatch.setattr(clips, "READER", "other")
    assert ImageFiles.load(tmp_path).clip(path).frames == 20 and looked == [path, path]
