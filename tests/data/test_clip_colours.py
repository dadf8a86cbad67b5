"""The colours of clips: by tag and else by size, brought to BT.709."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from byg_plugin.data import clip_colours, clips
from tests.support.clip_files import encode, plain

RED = (200, 30, 30)


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


def test_transparency_is_put_on_white(tmp_path: Path):
    pixels = np.zeros((48, 64, 4), dtype=np.uint8)
    pixels[:, 32:] = (200, 30, 30, 255)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format="bgra")
    image = next(clips.read_clip(encode(tmp_path / "a.mkv", [frame], "ffv1"), 1))
    assert image.mode == "RGB" and image.getpixel((5, 5)) == (255, 255, 255) and image.getpixel((60, 5)) == RED
