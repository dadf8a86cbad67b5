"""Images of every kind as the person who took them sees them; sizes and crops of buckets."""

from __future__ import annotations

import io
import logging
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from byg_plugin.config.sections import DatasetConfig
from byg_plugin.data.buckets import all_buckets, bucket_for, bucket_step, crop_to_bucket, is_below_resolution, to_tensor
from byg_plugin.data.media import MAX_SIDE, READER, image_size, load_image, look, to_rgb
from byg_plugin.images import save_png
from dataset_tools.backend import encode_image
from tests.support.data_fakes import picture
from tests.support.icc import ADOBE, INKS, P3, SRGB, cmyk, grey, in_srgb, lab_in_srgb, rgb

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
        with pytest.raises(ValueError, match=r"x\.png: .*(not an image that can be read|damaged).* remove its tuples"):
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


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(depth: int, kind: int, size: tuple[int, int], pixels: bytes, *chunks: bytes) -> bytes:
    """A PNG of one row, or of what is promised and not there."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises this size and holds nothing."""
    return png(8, 2, (width, height), b"")


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


@pytest.mark.skipif("AVIF" not in Image.registered_extensions().values(), reason="this Pillow reads no AVIF")
def test_a_damaged_avif_is_damaged_whatever_its_decoder_raises(tmp_path: Path) -> None:
    whole = io.BytesIO()
    upright().save(whole, "AVIF")
    data = whole.getvalue()
    pixels = data.index(b"mdat") + 4
    path = tmp_path / "x.avif"
    path.write_bytes(data[:pixels] + bytes(len(data) - pixels))
    assert image_size(path) == (64, 32)
    with pytest.raises(ValueError, match=r"x\.avif: cannot be read, it is damaged or cut off \(.*replace it or remove its tuples"):
        load_image(path)


@pytest.mark.parametrize("error", [RuntimeError, KeyError, AttributeError, OverflowError, AssertionError])
def test_any_exception_of_a_decoder_is_the_file_s(tmp_path: Path, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error("in the decoder")

    path = picture(tmp_path / "x.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ValueError, match=r"x\.png: cannot be read, it is damaged or cut off \(.*in the decoder"):
        load_image(path)


def test_an_exception_of_our_own_statements_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("byg_plugin.data.media._parts", fail)
    with pytest.raises(RuntimeError, match="ours"):
        load_image(picture(tmp_path / "x.png"))


def test_too_little_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    path = picture(tmp_path / "x.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ValueError, match=r"x\.png: there is not enough memory"):
        load_image(path)


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "a HEIC photo; save it as a JPEG or PNG"),
        (b"\0\0\0\x24ftypmif1\0\0\0\0mif1heic", "a HEIC photo; save it as a JPEG or PNG"),
        (b"\0\0\0\x20ftypisom\0\0\2\0", "a clip; give it the suffix"),
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "what a Mac keeps beside a file"),
        (b"GIF89a", "a GIF"),
        (b"8BPS\0\1", "a Photoshop document"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "text"),
        (b"\x89PNG\r\n\x1a\n\0\0", "damaged or cut off"),
        (b"", "an empty file"),
    ],
)
def test_what_is_no_image_is_named_as_what_it_is(tmp_path: Path, head: bytes, said: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(head + bytes(32) if head else head)
    for read in (image_size, load_image):
        with pytest.raises(ValueError, match=rf"x\.jpg: .*{said}.*remove its tuples"):
            read(path)


# --- texts in a PNG ---

WORKFLOW = "a workflow of an editor " * 100_000  # 2.4 MB


@pytest.mark.parametrize("place", ["before the pixels", "after them"])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt"])
def test_long_texts_in_a_png_are_passed_over(tmp_path: Path, kind: str, place: str) -> None:
    packed = zlib.compress(WORKFLOW.encode())
    text = {"zTXt": b"workflow\0\0" + packed, "iTXt": b"workflow\0\1\0en\0\0" + packed, "tEXt": b"w\0" + 30 * WORKFLOW.encode()}[kind]
    image = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    upright().transpose(Image.Transpose.ROTATE_90).save(image, "PNG", exif=exif)
    data = image.getvalue()
    cut = 33 if place == "before the pixels" else len(data) - 12  # after the header, before the end
    path = tmp_path / "x.png"
    path.write_bytes(data[:cut] + chunk(kind.encode(), text) + data[cut:])
    assert image_size(path) == (64, 32) and close(load_image(path), upright(), 0)


@pytest.mark.parametrize("packed", [False, True])
def test_an_orientation_in_a_text_is_heard_beside_long_ones(tmp_path: Path, packed: bool) -> None:
    info = PngInfo()
    info.add_text("workflow", WORKFLOW, zip=True)
    info.add_itxt("XML:com.adobe.xmp", "<x tiff:Orientation='6'><tiff:Orientation>6</tiff:Orientation></x>", zip=packed)
    path = tmp_path / "x.png"
    upright().transpose(Image.Transpose.ROTATE_90).save(path, pnginfo=info)
    assert image_size(path) == (64, 32) and close(load_image(path), upright(), 0)


def test_a_cut_off_png_with_a_long_text_is_damaged(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("workflow", WORKFLOW, zip=True)
    path = tmp_path / "x.png"
    picture(path, (200, 200))
    with Image.open(path) as image:
        image.save(path, pnginfo=info)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"x\.png: cannot be read, it is damaged"):
        load_image(path)


def test_long_texts_are_no_matter_to_a_model_that_is_shown_the_picture(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("workflow", WORKFLOW, zip=True)
    upright().save(tmp_path / "x.png", pnginfo=info)
    assert encode_image(tmp_path / "x.png", 512).data.startswith(b"\xff\xd8")


# --- transparent colours, in the depth of the file ---


@pytest.mark.parametrize(
    ("depth", "kind", "size", "row", "key", "expected"),
    [
        (16, 0, 3, struct.pack(">3H", 1000, 1001, 257 * 128), (1000,), [255, 4, 128]),
        (8, 0, 3, bytes([100, 101, 128]), (100,), [255, 101, 128]),
        (4, 0, 4, bytes([0x05, 0x8F]), (5,), [0, 255, 136, 255]),
        (2, 0, 4, bytes([0b00011011]), (1,), [0, 255, 170, 255]),
        (1, 0, 2, bytes([0b01000000]), (0,), [255, 255]),
        (16, 2, 2, struct.pack(">6H", 1000, 2000, 3000, 257 * 60, 257 * 60, 257 * 60), (1000, 2000, 3000), [255, 60]),
        (8, 2, 2, bytes([1, 2, 3, 60, 60, 60]), (1, 2, 3), [255, 60]),
    ],
)
def test_a_transparent_colour_is_white_in_every_depth(
    tmp_path: Path, depth: int, kind: int, size: int, row: bytes, key: tuple[int, ...], expected: list[int]
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(depth, kind, (size, 1), b"\0" + row, chunk(b"tRNS", struct.pack(f">{len(key)}H", *key))))
    assert np.asarray(load_image(path))[0].tolist() == [[value] * 3 for value in expected]
    assert look(path).reader == ("" if depth == 8 else READER)


# --- colour profiles ---


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize(("primaries", "gamma"), [(P3, None), (ADOBE, 563 / 256), (SRGB, 1.8)])
def test_a_display_s_profile_becomes_srgb(tmp_path: Path, suffix: str, primaries: np.ndarray, gamma: float | None) -> None:
    path = tmp_path / f"x.{suffix}"
    for colour in ((200, 60, 60), (60, 140, 90), (30, 30, 30), (255, 255, 255)):
        Image.new("RGB", (16, 16), colour).save(path, icc_profile=rgb(primaries, gamma), quality=100)
        with Image.open(path) as stored:
            numbers = stored.convert("RGB").getpixel((8, 8))
        assert np.abs(load_image(path).getpixel((8, 8)) - in_srgb(numbers, primaries, gamma)).max() <= 1.5
    assert look(path).reader == READER


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "I;16"])
def test_a_profile_of_a_picture_of_another_mode(tmp_path: Path, mode: str) -> None:
    profile, expected = (grey(1.8), 76.9) if mode in ("L", "LA", "I;16") else (rgb(SRGB, 1.8), 76.9)
    picture = {
        "1": Image.new("1", (8, 8), 1),
        "P": Image.new("RGB", (8, 8), (60, 60, 60)).quantize(2),
        "I;16": Image.fromarray(np.full((8, 8), 60 * 257, dtype=np.uint16)),
    }.get(mode) or Image.new(mode, (8, 8), {"L": 60, "LA": (60, 255), "RGBA": (60, 60, 60, 255)}[mode])
    picture.save(tmp_path / "x.png", icc_profile=profile)
    value = load_image(tmp_path / "x.png").getpixel((4, 4))
    assert value == (255, 255, 255) if mode == "1" else np.abs(np.array(value) - expected).max() < 1.5
    assert look(tmp_path / "x.png").reader == ("" if mode == "1" else READER)


def test_a_profile_leaves_transparency_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (60, 60, 60, 0)).save(tmp_path / "x.png", icc_profile=rgb(SRGB, 1.8))
    assert load_image(tmp_path / "x.png").getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
@pytest.mark.parametrize(("inks", "node"), [((255, 0, 0, 0), 8), ((0, 255, 255, 0), 6), ((0, 255, 0, 0), 4), ((0, 0, 0, 0), 0)])
def test_a_press_s_profile_becomes_srgb(tmp_path: Path, suffix: str, inks: tuple[int, ...], node: int) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.new("CMYK", (16, 16), inks).save(path, icc_profile=cmyk(), quality=100)
    assert np.abs(load_image(path).getpixel((8, 8)) - lab_in_srgb(*INKS[node])).max() <= 3


def test_a_profile_too_large_for_pillow(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), (200, 60, 60)).save(tmp_path / "x.png", icc_profile=rgb(P3, padding=3 << 20))
    assert np.abs(load_image(tmp_path / "x.png").getpixel((4, 4)) - in_srgb((200, 60, 60), P3)).max() <= 1


@pytest.mark.parametrize("profile", [rgb(SRGB), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_srgb_s_own_numbers_stay(tmp_path: Path, profile: bytes) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    image.save(tmp_path / "x.png", icc_profile=profile)
    assert np.array_equal(np.asarray(load_image(tmp_path / "x.png")), np.asarray(image)) and look(tmp_path / "x.png").reader == ""


@pytest.mark.parametrize(
    ("profile", "why"),
    [(b"garbage" * 30, "it is damaged"), (b"", "it is damaged"), (cmyk(), "it is for CMYK pictures"), (rgb(P3)[:300], "damaged")],
)
def test_a_profile_that_cannot_be_used_is_told_once(tmp_path: Path, profile: bytes, why: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.png"
    packed = b"name\0\0" + zlib.compress(profile)
    path.write_bytes(png(8, 2, (1, 1), b"\0\xc8\x1e\x1e", chunk(b"iCCP", packed)))
    with caplog.at_level(logging.WARNING):
        assert [load_image(path).getpixel((0, 0)) for _ in range(2)] == [(200, 30, 30)] * 2 and look(path).reader == ""
    assert len(caplog.messages) == 1 and f"{path}: its colour profile cannot be used" in caplog.text and why in caplog.text


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_nothing_but_pixels_comes_of_a_file_or_goes_into_one(tmp_path: Path, mode: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "a place"
    profile = {"RGB": rgb(P3), "CMYK": cmyk(), "L": grey(1.8)}[mode]
    Image.new(mode, (32, 32)).save(tmp_path / "x.jpg", icc_profile=profile, exif=exif, comment=b"a name", dpi=(300, 300))
    image = load_image(tmp_path / "x.jpg")
    assert image.info == {} and image.resize((16, 16)).info == {} and to_rgb(Image.open(tmp_path / "x.jpg")).info == {}
    with Image.open(tmp_path / "x.jpg") as carrying:
        save_png(carrying.convert("RGB"), tmp_path / "y.png", {"steps": 1})
        assert carrying.info
    with Image.open(tmp_path / "y.png") as saved:
        assert saved.info == {"byg": '{"steps": 1}'} and not saved.getexif()


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
