"""Colour profiles: what they mean in sRGB, and that nothing else comes of a file."""

from __future__ import annotations

import logging
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from byg_plugin.data.media import READER, load_image, look, to_rgb
from byg_plugin.images import save_png
from tests.support.icc import ADOBE, INKS, P3, SRGB, cmyk, grey, in_srgb, lab_in_srgb, rgb
from tests.support.png_files import chunk, png


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
