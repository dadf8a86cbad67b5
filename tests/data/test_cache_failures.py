"""Caches: nothing ever destroys or falsifies an entry, and a damaged one is made again or named."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from byg_plugin.config.sections import Config
from byg_plugin.data import cache
from byg_plugin.data.cache import Keys, cache_latents, cache_texts, latent_store, text_store
from byg_plugin.data.dataset import CachedTuples
from byg_plugin.data.tuples import read_tuples
from tests.support.cache_runs import edit_tuples, run, with_dataset
from tests.support.data_fakes import CPU, FakeFamily, data_set, entries, picture

# --- damage, interruptions, bad images ---


def test_a_cut_off_or_emptied_entry_is_written_again_and_no_other(tmp_path: Path) -> None:
    config = data_set(tmp_path)
    run(config)
    before = entries(config)
    latents, texts = sorted((tmp_path / "cache" / "latents").iterdir()), sorted((tmp_path / "cache" / "texts").iterdir())
    latents[0].write_bytes(latents[0].read_bytes()[:-1])
    latents[1].write_bytes(b"")
    latents[2].write_bytes(save({}))  # whole, and nothing in it
    texts[0].write_bytes(texts[0].read_bytes()[:40])
    family, *_ = run(config)
    assert (family.images, len(family.texts)) == (3, 1) and entries(config) == before


def failing(tmp_path: Path, images: int = 4) -> tuple[Config, dict[str, bytes]]:
    """A set whose first half is cached, and its entries."""
    config = data_set(tmp_path, images=images // 2)
    run(config)
    return data_set(tmp_path, images=images), entries(config)


def test_bad_images_are_listed_after_all_others_are_cached(tmp_path: Path) -> None:
    config, before = failing(tmp_path, images=10)
    config = with_dataset(config, cache_batch_size=4)
    picture(tmp_path / "6.png", (1, 1))
    (tmp_path / "7.png").write_bytes(b"no image")
    # A whole header over damaged pixels: found only when its batch is encoded.
    path = tmp_path / "8.jpg"
    picture(path, (200, 200))
    path.write_bytes(path.read_bytes()[:2000])
    edit_tuples(config, lambda records: records[8].update(source="8.jpg"))
    family = FakeFamily()
    with pytest.raises(cache.UnusableImages) as caught:
        cache_latents(config, family, read_tuples(config.dataset), CPU, prune=True)
    said = str(caught.value)
    assert "3 image(s) of dataset.tuples cannot be used (the others are cached, 2 new)" in said
    for part in ("6.png: 1 x 1 pixels are too few", "7.png: not an image that can be read", "8.jpg: cannot be read, it is damaged"):
        assert part in said
    assert family.images == 2 and before.items() <= entries(config).items() and len(entries(config)) == len(before) + 2
    for seed, name in ((60, "6.png"), (70, "7.png"), (80, "8.jpg")):
        picture(tmp_path / name, seed=seed)
    assert run(config)[1].encoded == 3


def test_an_image_that_changes_while_it_is_cached_gets_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, before = failing(tmp_path)
    look = cache.media.load_image

    def meddle(path: Path) -> Image.Image:
        if path.name == "3.png":
            picture(path, seed=77)
        return look(path)

    with monkeypatch.context() as patch:
        patch.setattr(cache.media, "load_image", meddle)
        with pytest.raises(cache.UnusableImages, match=r"3\.png: was changed while it was being cached; run the same command again"):
            cache_latents(config, FakeFamily(), read_tuples(config.dataset), CPU)
    assert len(entries(config)) == len(before) + 1
    assert run(config)[1].encoded == 1


@pytest.mark.parametrize("what", ["latents", "texts"])
def test_a_full_disk_names_the_folder_and_leaves_whole_entries_only(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, before = failing(tmp_path)
    real, written = os.fsync, []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    work = cache_latents if what == "latents" else cache_texts
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match=r"dataset\.cache_dir: .* cannot be written: No space left on device.*make room"):
            work(config, FakeFamily(), read_tuples(config.dataset), CPU)
    after = entries(config)
    new = set(after) - set(before)
    assert before.items() <= after.items() and new and not [name for name in after if "partial" in name]
    family, *_ = run(config)
    expected = {"latents": (2 - len(new), 8), "texts": (2, 8 - len(new))}[what]
    assert (family.images, len(family.texts)) == expected


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path) -> None:
    config = data_set(tmp_path)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"dataset\.cache_dir: .*cache.* cannot be written"):
        cache_latents(config, FakeFamily(), read_tuples(config.dataset), CPU)


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    config, before = failing(tmp_path)

    class Interrupted(FakeFamily):
        def encode_pixels(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
            if self.images == 1:
                raise KeyboardInterrupt
            return super().encode_pixels(vae, pixels)

    with pytest.raises(KeyboardInterrupt):
        cache_latents(config, Interrupted(), read_tuples(config.dataset), CPU)
    after = entries(config)
    assert before.items() <= after.items() and len(after) == len(before) + 1
    assert run(config)[0].images == 1


def test_out_of_gpu_memory_names_the_key(tmp_path: Path) -> None:
    class Large(FakeFamily):
        def encode_pixels(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    config = data_set(tmp_path)
    for batch, said in ((2, r"lower dataset\.cache_batch_size"), (1, r"lower dataset\.resolution")):
        with pytest.raises(ValueError, match=said):
            run(with_dataset(config, cache_batch_size=batch), Large())


def test_encodings_that_are_not_finite_are_not_cached(tmp_path: Path) -> None:
    class Overflowing(FakeFamily):
        def encode_pixels(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
            return super().encode_pixels(vae, pixels) / 0

        def encode_texts(self, encoders: Any, texts: Any) -> dict[str, torch.Tensor]:
            return {"t5": super().encode_texts(encoders, texts)["t5"] / 0}

    config = data_set(tmp_path)
    with pytest.raises(ValueError, match=r"0\.png: its latents are not finite"):
        cache_latents(config, Overflowing(), read_tuples(config.dataset), CPU)
    with pytest.raises(ValueError, match=r"model\.dtype .* is not finite"):
        cache_texts(config, Overflowing(), read_tuples(config.dataset), CPU)
    assert entries(config) == {}

    class OnceOverflowing(FakeFamily):
        def encode_texts(self, encoders: Any, texts: Any) -> dict[str, torch.Tensor]:
            encoded = super().encode_texts(encoders, texts)["t5"]
            bad = torch.tensor([text == "instruction 0 of 1.png" for text in texts])
            return {"pooled": torch.where(bad[:, None, None], torch.nan, encoded)}

    with pytest.raises(ValueError, match=r"model\.clip gives an encoding \(pooled\) that is not finite, of 'instruction 0 of 1\.png'"):
        cache_texts(with_dataset(config, cache_batch_size=50), OnceOverflowing(), read_tuples(config.dataset), CPU)


def test_cut_texts_are_named_by_the_run_that_encodes_them(tmp_path: Path) -> None:
    config = data_set(tmp_path)
    edit_tuples(config, lambda records: [item.update(instruction=f"long {index}") for index, item in enumerate(records)])
    _, latents, texts = run(with_dataset(config, cache_batch_size=2))
    assert latents.cut == () and sorted(texts.cut) == ["long 0", "long 1", "long 2"]
    assert run(config)[2].cut == ()


def test_small_images_are_counted_and_not_scaled_up(tmp_path: Path) -> None:
    config = data_set(tmp_path)
    picture(tmp_path / "0.png", (40, 40))
    _, latents, _ = run(config)
    assert latents.small == 1
    keys = Keys(config, FakeFamily())
    assert keys.source(read_tuples(config.dataset)[0]).bucket == (32, 32)


# --- what is in an entry, and in the files beside them ---


def entry(shape: tuple[int, ...] = (3, 1, 8, 8), dtype: torch.dtype = torch.float32, name: str = "latents") -> bytes:
    return save({name: torch.ones(shape, dtype=dtype)})


@pytest.mark.parametrize(
    "contents",
    [
        entry((3, 8, 8)),
        entry((3, 0, 8, 8)),
        entry(()),
        entry(dtype=torch.int64),
        entry(dtype=torch.bool),
        entry(dtype=torch.bfloat16),
        entry(name="latent"),
        save({"latents": torch.ones(3, 1, 8, 8), "more": torch.ones(1)}),
        b"\xff" * 64,
        (2**20).to_bytes(8, "little") + b"[" * 2**20,
    ],
    ids=range(10),
)
def test_a_latent_that_is_none_is_made_again(tmp_path: Path, contents: bytes) -> None:
    config = data_set(tmp_path)
    run(config)
    before = entries(config)
    min((tmp_path / "cache" / "latents").iterdir()).write_bytes(contents)
    family, *_ = run(config)
    assert (family.images, family.texts) == (1, []) and entries(config) == before


@pytest.mark.parametrize("contents", [entry((0, 8)), entry(()), entry(dtype=torch.int64), entry(dtype=torch.bool), save({})])
def test_an_encoding_that_is_none_is_made_again(tmp_path: Path, contents: bytes) -> None:
    config = data_set(tmp_path)
    run(config)
    before = entries(config)
    min((tmp_path / "cache" / "texts").iterdir()).write_bytes(contents)
    family, *_ = run(config)
    assert (family.images, len(family.texts)) == (0, 1) and entries(config) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("what", ["latents", "texts"])
def test_an_entry_that_is_not_finite_is_named_when_it_is_read(tmp_path: Path, what: str, value: float) -> None:
    config = data_set(tmp_path)
    run(config)
    store = {"latents": latent_store, "texts": text_store}[what](config.dataset)
    path = min((tmp_path / "cache" / what).iterdir())
    (name, tensor), *_ = store.read(path.stem).items()
    tensor.view(-1)[-1] = value
    path.write_bytes(save({name: tensor}))
    remedy = rf"{path.name} \(a car\): tensor {name} holds NaN or infinite values; remove this file and run {store.command} again"
    with pytest.raises(ValueError, match=remedy):
        {"latents": latent_store, "texts": text_store}[what](config.dataset).read(path.stem, "a car")


def test_an_entry_s_numbers_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_set(tmp_path, images=1)
    run(config)
    looked: list[Any] = []
    monkeypatch.setattr(cache, "refuse_not_finite", lambda tensors, where, remedy: looked.append(where))
    store, key = latent_store(config.dataset), min((tmp_path / "cache" / "latents").iterdir()).stem
    for _ in range(3):
        store.read(key)
    assert len(looked) == 1
    store.write(key, store.read(key))
    store.read(key)
    assert len(looked) == 2


def deep(depth: int = 100_000) -> str:
    return "[" * depth + "]" * depth


WRONG = [
    deep(),
    '{"x": ' + deep() + "}",
    '{"x": [1, 2, "%s", "64", 64, "", 1, 0.0]}' % ("a" * 64),
    '{"x": [1, 2, 3, 64, 64, "", 1, 0.0]}',
    '{"x": [true, 2, "%s", 64, 64, "", 1, 0.0]}' % ("a" * 64),
    '{"x": [1, 2, "%s", 64, -64, "", 1, 0.0]}' % ("a" * 64),
    '{"x": [1, 2, "%s", 64, 64, "", null, NaN]}' % ("a" * 64),
    '{"x": [1, 2, "short", 64, 64, "", 1, 0.0]}',
    '{"x": [1, 2, [], {}, null]}',
    '{"x": {"0": 1}}',
    '{"x": [%s, 2, "a", 64, 64]}' % ("9" * 5000),
]


@pytest.mark.parametrize("memory", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("matching", [False, True])
def test_a_memory_of_other_types_is_forgotten(tmp_path: Path, memory: str, matching: bool) -> None:
    config = data_set(tmp_path)
    run(config)
    path = tmp_path / "1.png"
    stat = path.stat()
    text = memory.replace('"x"', json.dumps(str(path)))
    if matching:  # as if it were of this very file
        text = text.replace("[1, 2,", f"[{stat.st_size}, {stat.st_mtime_ns},").replace("[true, 2,", f"[true, {stat.st_mtime_ns},")
    (tmp_path / "cache" / "files.json").write_text(text)
    assert run(config)[0].images == 0


@pytest.mark.parametrize("text", [deep(), "[1]", '{"a": 5, "b": [], "c": null}', "\xff", ""], ids=range(5))
def test_lost_files_of_other_types_are_forgotten(tmp_path: Path, text: str) -> None:
    config = with_dataset(data_set(tmp_path), max_lost=0.5)
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "lost.json").write_bytes(text.encode("latin-1"))
    assert cache.read_lost(config.dataset) == {}
    assert len(cache_latents(config, FakeFamily(), read_tuples(config.dataset), CPU).lost) == 1


def test_one_damaged_picture_is_lost_as_far_as_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = cache.media.load_image

    def decode(path: Path) -> Image.Image:
        with cache.media._decoding(path):
            if path.name == "1.png":
                raise RuntimeError("in the decoder")
        return load(path)

    monkeypatch.setattr(cache.media, "load_image", decode)
    config = with_dataset(data_set(tmp_path), max_lost=0.5)
    (said,) = cache_latents(config, FakeFamily(), read_tuples(config.dataset), CPU).lost
    assert said.startswith(f"{tmp_path / '1.png'}: cannot be read, it is damaged") and len(entries(config)) == 2 + 1
    with pytest.raises(cache.UnusableImages, match="in the decoder"):
        cache_latents(with_dataset(config, max_lost=0), FakeFamily(), read_tuples(config.dataset), CPU)
    cache_texts(config, FakeFamily(), read_tuples(config.dataset), CPU)
    assert len(CachedTuples(config, FakeFamily())) == 2  # type: ignore[arg-type]
    monkeypatch.setattr(cache.media, "load_image", load)
    assert cache_latents(with_dataset(config, max_lost=0), FakeFamily(), read_tuples(config.dataset), CPU).encoded == 1
    assert cache.read_lost(config.dataset), "a run that allows none does not look at what was lost"
    assert len(CachedTuples(config, FakeFamily())) == 3  # type: ignore[arg-type]
