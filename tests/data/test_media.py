"""Images of every kind as the person who took them sees them, and refusals by file."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from byg_plugin.data.buckets import to_tensor
from byg_plugin.data.media import MAX_SIDE, READER, image_size, load_image, look
from dataset_tools.backend import encode_image
from tests.support.data_fakes import picture
from tests.support.png_files import chunk, png

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


@pytest.mark.parametrize("where", ["before the pixels", "after them"])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt"])
def test_long_texts_in_a_png_are_passed_over(tmp_path: Path, kind: str, where: str) -> None:
    packed = zlib.compress(WORKFLOW.encode())
    text = {"zTXt": b"workflow\0\0" + packed, "iTXt": b"workflow\0\1\0en\0\0" + packed, "tEXt": b"w\0" + 30 * WORKFLOW.encode()}[kind]
    image = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    upright().transpose(Image.Transpose.ROTATE_90).save(image, "PNG", exif=exif)
    data = image.getvalue()
    cut = 33 if where == "before the pixels" else len(data) - 12  # after the header, before the end
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


def test_tensor_range_and_layout() -> None:
    tensor = to_tensor(Image.fromarray(np.array([[[0, 255, 51]], [[255, 0, 0]]], dtype=np.uint8)))
    assert tensor.shape == (3, 2, 1) and tensor.dtype == torch.float32
    assert tensor[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6]) and tensor[0, 1, 0] == 1


def test_a_jpeg_in_memory_is_what_pillow_reads(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    upright().save(buffer, "JPEG")
    (tmp_path / "wrongly_named.png").write_bytes(buffer.getvalue())
    assert load_image(tmp_path / "wrongly_named.png").size == (64, 32)
