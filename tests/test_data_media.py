"""Images of every kind as the person who took them sees them; sizes and crops of buckets."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_fakes import picture
from PIL import Image

from byg_plugin.data.buckets import all_buckets, bucket_for, bucket_step, crop_to_bucket, is_below_resolution, to_tensor
from byg_plugin.data.media import MAX_SIDE, image_size, load_image
from byg_plugin.training.config import DatasetConfig

QUADRANTS = np.array([[[200, 30, 30], [30, 200, 30]], [[30, 30, 200], [220, 220, 30]]], dtype=np.uint8)


def upright(size: int = 32) -> Image.Image:
    """Red, green / blue, yellow: every turn and mirroring of it differs. Twice as wide as high."""
    return Image.fromarray(QUADRANTS).resize((2 * size, size), Image.Resampling.NEAREST)


def close(image: Image.Image, expected: Image.Image, tolerance: float = 2.0) -> bool:
    assert image.mode == "RGB" and image.size == expected.size, (image.mode, image.size, expected.size)
    return float(np.abs(np.asarray(image, dtype=float) - np.asarray(expected, dtype=float)).mean()) <= tolerance


# What a camera stores so that the viewer's turn gives the upright picture.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    turn = STORED[orientation]
    stored = upright() if turn is None else upright().transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{suffix}"
    stored.save(path, exif=exif, quality=95)
    assert image_size(path) == (64, 32)
    assert close(load_image(path), upright(), 6)


def test_transparency_becomes_white(tmp_path: Path) -> None:
    alpha = Image.new("L", (4, 2), 255)
    alpha.putpixel((0, 0), 0)
    alpha.putpixel((1, 0), 128)
    colour = Image.new("RGB", (4, 2), (200, 0, 0))
    colour.putalpha(alpha)
    colour.save(tmp_path / "x.png")
    image = load_image(tmp_path / "x.png")
    assert image.getpixel((0, 0)) == (255, 255, 255) and image.getpixel((3, 1)) == (200, 0, 0)
    red, green, _ = image.getpixel((1, 0))
    assert abs(red - 227) <= 1 and abs(green - 127) <= 1


def test_transparent_palette_grey_with_alpha_and_colour_key(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert [load_image(tmp_path / "p.png").getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (200, 100, 50)]
    grey = Image.new("LA", (2, 1), (40, 255))
    grey.putpixel((0, 0), (40, 0))
    grey.save(tmp_path / "la.png")
    assert [load_image(tmp_path / "la.png").getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 40, 40)]
    key = Image.new("RGB", (2, 1), (1, 2, 3))
    key.putpixel((1, 0), (9, 8, 7))
    key.save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert [load_image(tmp_path / "key.png").getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 8, 7)]


@pytest.mark.parametrize(("mode", "value", "expected"), [("L", 77, (77,) * 3), ("1", 1, (255,) * 3)])
def test_grey_and_bilevel(tmp_path: Path, mode: str, value: int, expected: tuple[int, int, int]) -> None:
    Image.new(mode, (3, 3), value).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png").getpixel((1, 1)) == expected


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    assert [load_image(tmp_path / f"x.{suffix}").getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_dark_16_bit_grey_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)).save(tmp_path / "x.png")
    assert load_image(tmp_path / "x.png").getpixel((0, 0)) == (1, 1, 1)


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=100)
    red, green, blue = load_image(tmp_path / "x.jpg").getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


def test_float_and_32_bit_images_are_refused(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "f.tif")
    Image.new("I", (4, 4), 1 << 20).save(tmp_path / "i.tif")
    for name, kind in (("f.tif", "floating-point"), ("i.tif", "32-bit")):
        with pytest.raises(ValueError, match=rf"{name}: has {kind} .* save it with 8 or 16 bits"):
            load_image(tmp_path / name)


# --- bad files ---


def test_missing(tmp_path: Path) -> None:
    for read in (image_size, load_image):
        with pytest.raises(ValueError, match=r"x\.png: no such file"):
            read(tmp_path / "x.png")


@pytest.mark.parametrize("contents", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"GIF89a" + bytes(20)])
def test_not_an_image(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "x.png").write_bytes(contents)
    for read in (image_size, load_image):
        with pytest.raises(ValueError, match=r"x\.png: .*not an image that can be read.* remove its tuples"):
            read(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_cut_off(tmp_path: Path, suffix: str) -> None:
    path = picture(tmp_path / f"x.{suffix}", (200, 200))
    load_image(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"x\.{suffix}: .*replace it or remove its tuples"):
        load_image(path)


def test_damaged_pixels(tmp_path: Path) -> None:
    path = picture(tmp_path / "x.png", (100, 100))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"x\.png: cannot be read, it is damaged"):
        load_image(path)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises this size and holds nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("size", [(20000, 100), (100, 20000), (20000, 20000)])
@pytest.mark.parametrize("kind", ["png", "ppm"])
def test_20000_pixels_a_side_are_refused_before_decoding(
    tmp_path: Path, size: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(png_header(*size) if kind == "png" else b"P6 %d %d 255\n" % size)
    for decoder in ("load", "draft"):
        monkeypatch.setattr("PIL.ImageFile.ImageFile." + decoder, lambda *_: pytest.fail("decoded"))
    for read in (image_size, load_image):
        with pytest.raises(ValueError, match=rf"x\.{kind}: .*scale it down to at most {MAX_SIDE}"):
            read(path)


def test_animation_is_refused(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(ValueError, match=r"x\.webp: has 2 frames"):
        image_size(tmp_path / "x.webp")


# --- buckets ---


def dataset(resolution: int = 512, **keys: object) -> DatasetConfig:
    return DatasetConfig.model_validate({"tuples": "t", "cache_dir": "c", "resolution": resolution, **keys})


@pytest.mark.parametrize("resolution", [64, 256, 512, 768, 1024])
@pytest.mark.parametrize("max_aspect", [1.0, 2.0, 3.5])
def test_buckets_have_about_the_asked_area_and_bounded_aspect(resolution: int, max_aspect: float) -> None:
    config = dataset(resolution, max_aspect=max_aspect)
    step = bucket_step(config, 16)
    assert step == (16 if resolution < 256 else 64)
    found = all_buckets(config, 16)
    assert (resolution, resolution) in found and len(set(found)) == len(found)
    for width, height in found:
        assert width % step == height % step == 0
        assert max(width / height, height / width) <= max_aspect
        # A side less than a step is lost by flooring.
        assert resolution**2 - width * step < width * height <= resolution**2


def test_every_bucket_has_its_turned_one() -> None:
    found = set(all_buckets(dataset(512), 16))
    assert {(height, width) for width, height in found} == found


SIZES = [(w, h) for w in (16, 17, 100, 333, 512, 640, 1000, 1920, 6000) for h in (16, 31, 99, 256, 511, 512, 1080, 4000)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keys", [{}, {"buckets": False}, {"max_aspect": 4.0}, {"resolution": 64}, {"bucket_step": 32}])
def test_never_scaled_up(size: tuple[int, int], keys: dict[str, object]) -> None:
    config = dataset(**keys)
    bucket = bucket_for(size, config, 16)
    assert bucket[0] <= size[0] and bucket[1] <= size[1] and not [side for side in bucket if side % 16]
    if not is_below_resolution(bucket, config, 16):
        assert bucket in all_buckets(config, 16)
    if min(size) >= 2 * config.resolution:
        assert bucket in all_buckets(config, 16)


def test_aspect_error_is_bounded() -> None:
    # In steps of 64 the widest bucket within 2:1 is 640 x 384; elsewhere the neighbours are nearer.
    for width in range(600, 1200, 7):
        bucket = bucket_for((width, 600), dataset(512), 16)
        assert abs(math.log(bucket[0] / bucket[1] * 600 / width)) < (0.183 if width > 1000 else 0.14), (width, bucket)


def test_small_pictures_fill_what_they_have() -> None:
    config = dataset(512)
    assert bucket_for((500, 500), config, 16) == (496, 496)
    assert bucket_for((511, 511), config, 16) == (496, 496)
    assert bucket_for((512, 512), config, 16) == (512, 512)
    assert bucket_for((100, 300), config, 16) == (96, 160)  # the shape of 384 x 640, the highest within 1:2
    assert is_below_resolution((496, 496), config, 16)
    # Exact multiples lose nothing to rounding.
    for side in range(16, 512, 16):
        assert bucket_for((side, side), config, 16) == (side, side)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (15, 15), (500, 15)])
def test_too_small_for_the_model(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels are too few: the model needs at least 16"):
        bucket_for(size, dataset(), 16)


def test_bucket_step_must_fit_the_model() -> None:
    with pytest.raises(ValueError, match=r"dataset\.bucket_step = 24 must be a multiple of 16"):
        bucket_step(dataset(bucket_step=24), 16)
    with pytest.raises(ValueError, match=r"dataset\.resolution = 64 is less than one bucket step of 128"):
        bucket_step(dataset(64, bucket_step=128), 16)


def ramp(width: int, height: int) -> Image.Image:
    """Red is the column, green the row, both from 0 to 255."""
    x = np.broadcast_to((np.arange(width) + 0.5) / width * 255, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5) / height * 255)[:, None], (height, width))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "bucket"), [((300, 100), (64, 64)), ((100, 300), (64, 64)), ((200, 150), (96, 48)), ((130, 131), (128, 128))]
)
def test_crop_is_centred_and_as_small_as_can_be(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    cropped = crop_to_bucket(ramp(*size), bucket)
    assert cropped.size == bucket
    pixels = np.asarray(cropped, dtype=float)
    first, last = pixels[bucket[1] // 2, [0, -1], 0] / 255, pixels[[0, -1], bucket[0] // 2, 1] / 255
    for ends, side, other, have, had in ((first, 0, 1, size, bucket), (last, 1, 0, size, bucket)):
        # The share of this side that is kept: all of it, or what the bucket's shape leaves of it.
        kept = min(1.0, have[other] * had[side] / (had[other] * have[side]))
        pixel = kept / had[side]
        assert ends[0] == pytest.approx((1 - kept) / 2 + pixel / 2, abs=0.012)
        assert ends[1] == pytest.approx((1 + kept) / 2 - pixel / 2, abs=0.012)


def test_crop_takes_the_frame_of_a_picture_in_another_size() -> None:
    # The middle half of a 2:1 frame; of its own 2.1:1 a square is 48 %.
    framed, own = (np.asarray(crop_to_bucket(ramp(210, 100), (64, 64), frame=frame), dtype=float)[32, :, 0] for frame in ((400, 200), None))
    assert framed[[0, -1]] / 255 == pytest.approx([0.25 + 0.5 / 128, 0.75 - 0.5 / 128], abs=0.005)
    assert own[0] - framed[0] > 2


def test_crop_that_would_scale_up_is_our_error() -> None:
    with pytest.raises(AssertionError, match="scaled up"):
        crop_to_bucket(ramp(60, 64), (64, 64))


def test_tensor_range_and_layout() -> None:
    tensor = to_tensor(Image.fromarray(np.array([[[0, 255, 51]], [[255, 0, 0]]], dtype=np.uint8)))
    assert tensor.shape == (3, 2, 1) and tensor.dtype == torch.float32
    assert tensor[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6]) and tensor[0, 1, 0] == 1


def test_a_jpeg_in_memory_is_what_pillow_reads(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    upright().save(buffer, "JPEG")
    (tmp_path / "wrongly_named.png").write_bytes(buffer.getvalue())
    assert load_image(tmp_path / "wrongly_named.png").size == (64, 32)
