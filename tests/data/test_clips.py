"""Clips: reading at a rate, refusals by file, and their way through the cache."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from byg_plugin.config.sections import Config
from byg_plugin.data import cache, clips
from byg_plugin.data.dataset import CachedTuples
from byg_plugin.data.tuples import read_tuples
from tests.support.clip_files import encode, number_of, shade, shades, write
from tests.support.data_fakes import CPU, FakeFamily, entries, picture, record, write_tuples
from tests.support.tiny_wan import wan_config


def write_as(path: Path, frames: int, fps: int) -> Path:
    """In the container that the suffix names: .mkv and .webm store whole thousandths of a second."""
    codec = {".mp4": "libx264", ".mkv": "ffv1", ".webm": "libvpx"}[path.suffix]
    options = {"deadline": "realtime", "cpu-used": "8"} if codec == "libvpx" else {}
    return encode(path, shades(frames), codec, rate=fps, options=options)


def write_uneven(path: Path, times: list[int]) -> Path:
    """Frames at these thousandths of a second."""
    return encode(path, shades(len(times), times=times), rate=1000, time_base=Fraction(1, 1000))


# --- reading ---


def test_length_and_frames_as_they_are(tmp_path: Path):
    path = write(tmp_path / "a.mp4", 20, 30)
    clip = clips.clip_info(path)
    assert clip.size == (64, 48) and clip.frames == 20 and clip.fps == pytest.approx(30) and clip.seconds == pytest.approx(20 / 30)
    assert [clip.frames_at(fps) for fps in (None, 30, 16, 15, 60)] == [20, 20, 10, 10, 40]
    assert [number_of(image) for image in clips.read_clip(path, 20)] == list(range(20))
    assert [number_of(image) for image in clips.read_clip(path, 3)] == [0, 1, 2]


@pytest.mark.parametrize("fps", [16.0, 15.0, 30.0, 45.0])
def test_at_another_rate_each_moment_shows_the_frame_of_its_time(tmp_path: Path, fps: float):
    path = write(tmp_path / "a.mp4", 20, 30)
    count = clips.clip_info(path).frames_at(fps)
    shown = [number_of(image) for image in clips.read_clip(path, count, fps)]
    assert shown == [int(k * 30 / fps + 1e-6) for k in range(count)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize(("stored", "fps"), [(16, 16), (24, 24), (30, 30), (30, 15), (32, 16), (24, 48)])
def test_rates_are_exact_in_every_container(tmp_path: Path, suffix: str, stored: int, fps: int):
    path = write_as(tmp_path / f"a{suffix}", 28, stored)
    count = clips.clip_info(path).frames_at(fps)
    assert count == 28 * fps // stored
    assert [number_of(image) for image in clips.read_clip(path, count, fps)] == [k * stored // fps for k in range(count)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
@pytest.mark.parametrize("fps", [16, 24, 30])
def test_81_frames_are_81_in_every_container(tmp_path: Path, suffix: str, fps: int):
    clip = clips.clip_info(write_as(tmp_path / f"a{suffix}", 81, fps))
    assert clip.frames == clip.frames_at(fps) == 81


def test_variable_frame_rate_goes_by_time(tmp_path: Path):
    path = write_uneven(tmp_path / "uneven.mkv", [0, 40, 50, 60, 300, 500, 510, 900])
    clip = clips.clip_info(path)
    assert clip.frames == 8 and clip.seconds == pytest.approx(0.9 * 8 / 7, abs=2e-3)
    shown = [number_of(image) for image in clips.read_clip(path, clip.frames_at(10), 10)]
    assert shown == [0, 3, 3, 4, 4, 5, 6, 6, 6, 7]


@pytest.mark.parametrize("fps", [None, 16.0, 8.0])
def test_frames_are_decoded_as_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fps: float | None):
    """Whoever reads two frames of a long clip pays for a few: a whole clip is never in memory."""
    path = write(tmp_path / "long.mp4", 200)
    decoded, decode = 0, clips._decoded

    def counting(path: Path, packet: Any) -> Any:
        nonlocal decoded
        frames = decode(path, packet)
        decoded += len(frames)
        return frames

    monkeypatch.setattr(clips, "_decoded", counting)
    shown = clips.read_clip(path, 90, fps)
    next(shown), next(shown)
    assert 0 < decoded <= 5
    shown.close()


def test_written_clips_keep_odd_sizes_whole_and_say_how_they_were_made(tmp_path: Path):
    clips.write_clip(tmp_path / "odd.mp4", [shade(3, (33, 21))] * 3, 24, {"seed": 7})
    assert clips.clip_info(tmp_path / "odd.mp4").size == (34, 22)
    with av.open(str(tmp_path / "odd.mp4")) as container:
        assert container.metadata["comment"] == '{"seed": 7}'
    assert [path.name for path in tmp_path.iterdir()] == ["odd.mp4"]


# --- refusals ---


def sound_only(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def no_frames(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path, "no such file"),
        (lambda path: path.write_bytes(b"not a clip at all") and path, "damaged or no clip"),
        (lambda path: path.write_bytes(write(path).read_bytes()[:700]) and path, "damaged or no clip"),
        (sound_only, "only sound in it"),
        (no_frames, "no frame can be decoded|damaged or no clip|no video in it"),
    ],
    ids=["missing", "text", "cut", "sound", "empty"],
)
def test_unusable_clips_are_named_with_the_reason(tmp_path: Path, make: Any, reason: str):
    make(path := tmp_path / "bad.mp4")
    with pytest.raises(ValueError, match=reason) as error:
        clips.clip_info(path)
    assert str(path) in str(error.value)


def test_a_clip_that_ends_early(tmp_path: Path):
    with pytest.raises(ValueError, match="a.mp4: only 4 of 9 frames can be decoded"):
        list(clips.read_clip(write(tmp_path / "a.mp4", 4), 9))


# --- the cache ---


class ClipFamily(FakeFamily):
    """Means over 4 frames and 8 x 8 pixels after the first frame, as a causal video VAE has them."""

    name = "fake video"

    def clip_frames(self, frames: int) -> int:
        return (frames - 1) // 4 * 4 + 1

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        assert pixels.shape[2] % 4 == 1
        self.images += len(pixels)
        first, rest = pixels[:, :, :1], pixels[:, :, 1:]
        pooled = [nn.functional.avg_pool3d(first, (1, 8, 8))]
        if rest.shape[2]:
            pooled.append(nn.functional.avg_pool3d(rest, (4, 8, 8)))
        return torch.cat(pooled, dim=2)


def video_set(folder: Path, **dataset: Any) -> Config:
    """Two clips of 20 and 12 frames and an image, a tuple on each."""
    write(folder / "long.mp4", 20)
    write(folder / "short.mp4", 12)
    picture(folder / "still.png", (64, 48))
    write_tuples(folder / "tuples.jsonl", [record(name) for name in ("long.mp4", "short.mp4", "still.png")])
    return wan_config(folder, dataset={"resolution": 48, "bucket_step": 16, **dataset}, sample={"every": 0})


def cached(config: Config, family: FakeFamily) -> CachedTuples:
    tuples = read_tuples(config.dataset)
    cache.cache_latents(config, family, tuples, CPU)
    cache.cache_texts(config, family, tuples, CPU)
    return CachedTuples(config, family)


def test_clips_and_images_in_one_run(tmp_path: Path):
    config = video_set(tmp_path, frames=11)
    data = cached(config, ClipFamily())
    assert data.bucket(0) == data.bucket(1) == (*data.bucket(2), 9) and len(data.bucket(2)) == 2
    shapes = [tuple(data[index]["source"].shape) for index in range(3)]
    assert shapes[0] == shapes[1] and shapes[0][1] == 3 and shapes[2][1] == 1 and shapes[0][2:] == shapes[2][2:]
    means = (data[0]["source"].mean(dim=(0, 2, 3)) + 1) * 127.5
    expected = [10 + 8 * number for number in (0, 2.5, 6.5)]
    assert means.tolist() == pytest.approx(expected, abs=2)


def test_latents_of_another_rate_length_content_or_reader_are_other_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = video_set(tmp_path, frames=5)
    family = ClipFamily()
    cached(config, family)
    done = family.images
    cached(config, family)
    assert family.images == done == 3
    for change in ({"frames": 9}, {"fps": 8.0}):
        cached(video_set(tmp_path, **({"frames": 5} | change)), family)
        assert family.images == done + 2
        done = family.images
    before = entries(config)
    write(tmp_path / "long.mp4", 24)
    cached(config, family)
    assert family.images == done + 1 and entries(config).items() >= before.items()
    monkeypatch.setattr(clips, "READER", "other")
    cached(config, family)
    assert family.images == done + 3  # both clips, not the image


def test_one_frame_of_a_clip_follows_the_reader_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, family = video_set(tmp_path, frames=1), ClipFamily()
    cached(config, family)
    assert family.images == 3
    monkeypatch.setattr(clips, "READER", "other")
    cached(config, family)
    assert family.images == 3 + 2


def test_a_target_is_as_long_as_its_source_is_read(tmp_path: Path):
    config = video_set(tmp_path, frames=17)
    tuples = [record("long.mp4", target="short.mp4"), record("long.mp4", target="same.mp4")]
    write(tmp_path / "same.mp4", 17)
    write_tuples(tmp_path / "tuples.jsonl", tuples)
    with pytest.raises(cache.UnusableImages) as error:
        cached(config, ClipFamily())
    assert "1 image(s) or clip(s)" in str(error.value)
    assert "short.mp4: 12 frames, its source is read with 17; a target is as long as its source" in str(error.value)


def test_short_and_broken_clips_are_listed_and_stop_the_run_after_the_others_are_cached(tmp_path: Path):
    config, family = video_set(tmp_path, frames=17), ClipFamily()
    (tmp_path / "long.mp4").write_bytes(b"nothing")
    write(tmp_path / "fine.mp4", 17)
    write_tuples(tmp_path / "tuples.jsonl", [record(name) for name in ("long.mp4", "short.mp4", "still.png", "fine.mp4")])
    with pytest.raises(cache.UnusableImages) as error:
        cached(config, family)
    text = str(error.value)
    assert "2 image(s) or clip(s)" in text and "2 new" in text
    assert "short.mp4: too short: 12 frames at 16 frames a second (0.75 s), 17 are asked for" in text
    assert "long.mp4: cannot be read" in text
    allowed = wan_config(tmp_path, dataset={**config.dataset.model_dump(), "max_lost": 0.5}, sample={"every": 0})
    summary = cache.cache_latents(allowed, family, read_tuples(allowed.dataset), CPU)
    assert summary.encoded == 0 and summary.kept == 2 and len(summary.lost) == 2
    data = cached(allowed, family)
    assert [item.source.name for item in data.tuples] == ["still.png", "fine.mp4"]
    strict = wan_config(tmp_path, dataset={**config.dataset.model_dump(), "max_lost": 0.4}, sample={"every": 0})
    with pytest.raises(ValueError, match=r"2 of 4 tuples cannot be used, dataset.max_lost = 0.4 allows fewer; the first: .*long.mp4"):
        CachedTuples(strict, family)
    records = [record("short.mp4", split="validation"), record("still.png"), record("fine.mp4")]
    write_tuples(tmp_path / "tuples.jsonl", records)
    with pytest.raises(ValueError, match=r"none of the 1 tuples held out can be used, the first because: .*short.mp4.*validation_items"):
        CachedTuples(allowed, family, "validation")
    assert len(CachedTuples(allowed, family).tuples) == 2


def test_a_clip_that_breaks_while_it_is_decoded_is_remembered_until_it_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config, family = video_set(tmp_path, frames=5, max_lost=0.4), ClipFamily()
    read = clips.read_clip

    def breaking(path: Path, *rest: Any) -> Any:
        if path.name == "long.mp4":
            raise ValueError(f"{path}: only 2 of 5 frames can be decoded")
        return read(path, *rest)

    monkeypatch.setattr(clips, "read_clip", breaking)
    data = cached(config, family)
    assert [item.source.name for item in data.tuples] == ["short.mp4", "still.png"]
    assert len(cache.read_lost(config.dataset)) == 1
    monkeypatch.setattr(clips, "read_clip", read)
    assert len(cached(config, family).tuples) == 3 and cache.read_lost(config.dataset) == {}


def test_shorter_clips_are_taken_where_min_frames_allows_it(tmp_path: Path):
    data = cached(video_set(tmp_path, frames=17, min_frames=8), ClipFamily())
    assert [data.bucket(index)[2:] for index in range(3)] == [(17,), (9,), ()]


def test_a_family_of_images_refuses_clips(tmp_path: Path):
    config = video_set(tmp_path)
    with pytest.raises(cache.UnusableImages, match="long.mp4: a clip, and fake takes images"):
        cache.cache_latents(config, FakeFamily(), read_tuples(config.dataset), CPU)


def test_missing_clip_is_named_before_anything_is_loaded(tmp_path: Path):
    write_tuples(tmp_path / "tuples.jsonl", [record("nowhere.mp4")])
    with pytest.raises(ValueError, match=r"line 1: source: no such file .*nowhere.mp4"):
        read_tuples(wan_config(tmp_path).dataset)
