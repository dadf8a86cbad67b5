"""Files of clips: covers, titles, lists of other files, what is not ordinary video, and damage."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import av
import pytest

from byg_plugin.data import clips
from tests.support.clip_edits import b_frames
from tests.support.clip_files import encode, numbers, shade, shades, write


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
    boxes, offset = [], moov + 8
    while offset < end:
        size = int.from_bytes(data[offset : offset + 4], "big")
        boxes.append(data[offset : offset + size])
        offset += size
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
