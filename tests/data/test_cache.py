"""Caches: what is encoded again and what is not, and that nothing ever destroys or falsifies an entry."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save

from byg_plugin.config.sections import Config
from byg_plugin.data import cache
from byg_plugin.data.buckets import crop_to_bucket, to_tensor
from byg_plugin.data.cache import Keys, Processes, Summary, cache_latents, cache_texts, latent_store, text_store
from byg_plugin.data.media import load_image
from byg_plugin.data.tuples import read_tuples
from tests.support.data_fakes import CPU, ROLES, FakeFamily, data_set, entries, hashed, picture, record, write_tuples
from tests.support.icc import P3, rgb


def run(config: Config, family: FakeFamily | None = None, **options: Any) -> tuple[FakeFamily, Summary, Summary]:
    """Both commands on a fresh reading of the tuples; the family counts what was encoded."""
    family = family or FakeFamily()
    family.images, family.texts = 0, []
    tuples = read_tuples(config.dataset)
    latents = cache_latents(config, family, tuples, CPU, **options)
    texts = cache_texts(config, family, tuples, CPU, **options)
    assert (latents.encoded, texts.encoded) == (family.images, len(family.texts))
    return family, latents, texts


def with_dataset(config: Config, **keys: Any) -> Config:
    return config.model_copy(update={"dataset": config.dataset.model_copy(update=keys)})


def edit_tuples(config: Config, change: Callable[[list[dict[str, Any]]], None]) -> None:
    path = Path(config.dataset.tuples)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    change(records)
    write_tuples(path, records)


def test_entries_are_the_family_s_encodings_of_the_cropped_pictures(tmp_path: Path) -> None:
    config = data_set(tmp_path, images=3, size=(150, 90))
    run(with_dataset(config, cache_batch_size=2))
    for item in read_tuples(config.dataset):
        wanted = Keys(config, FakeFamily()).source(item)
        pixels = to_tensor(crop_to_bucket(load_image(item.source), wanted.bucket))
        latents = latent_store(config).read(wanted.key)["latents"]
        assert latents.dtype == torch.float32 and latents.shape == (3, 1, wanted.bucket[1] // 8, wanted.bucket[0] // 8)
        assert torch.equal(latents, FakeFamily().encode_pixels(torch.nn.Identity(), pixels[None, :, None])[0])
        for role in ROLES:
            text = getattr(item, role)
            encoding = text_store(config).read(Keys(config, FakeFamily()).text(text))["t5"]
            assert encoding.dtype == torch.bfloat16 and torch.equal(encoding[0].float(), hashed(text))


def test_nothing_is_encoded_twice(tmp_path: Path) -> None:
    config = data_set(tmp_path, images=3, tuples_each=4, src_caption="the same caption")
    family, latents, texts = run(config)
    assert (family.images, len(family.texts)) == (3, 1 + 3 * 3 * 4)  # one caption; three other texts a tuple
    assert family.loaded == ["vae", "text"]
    before = entries(config)
    again, latents, texts = run(config)
    assert (again.images, again.texts, again.loaded) == (0, [], [])
    assert (latents.kept, texts.kept) == (3, 37) and entries(config) == before


# --- what a change costs: exactly (images, texts) ---


def changed_image(config: Config, folder: Path) -> None:
    picture(folder / "1.png", seed=99)


def touched_image(config: Config, folder: Path) -> None:
    os.utime(folder / "1.png", (1, 1))


def moved_image(config: Config, folder: Path) -> None:
    (folder / "1.png").rename(folder / "moved.png")
    edit_tuples(config, lambda records: records[1].update(source="moved.png"))


def changed_instruction(config: Config, folder: Path) -> None:
    edit_tuples(config, lambda records: records[1].update(instruction="another"))


def caption_of_another_tuple(config: Config, folder: Path) -> None:
    edit_tuples(config, lambda records: records[1].update(src_caption=records[0]["src_caption"]))


def blanks_round_a_text(config: Config, folder: Path) -> None:
    edit_tuples(config, lambda records: records[1].update(instruction=f" {records[1]['instruction']}\n"))


def new_tuple_of_an_image(config: Config, folder: Path) -> None:
    edit_tuples(config, lambda records: records.append(record("1.png", 7)))


def new_image(config: Config, folder: Path) -> None:
    picture(folder / "new.png", seed=50)
    edit_tuples(config, lambda records: records.append(record("new.png")))


def copied_image(config: Config, folder: Path) -> None:
    shutil.copy(folder / "1.png", folder / "copy.png")
    edit_tuples(config, lambda records: records.append({**records[1], "source": "copy.png"}))


def reordered(config: Config, folder: Path) -> None:
    edit_tuples(config, lambda records: records.reverse())


@pytest.mark.parametrize(
    ("change", "images", "texts"),
    [
        (changed_image, 1, 0),
        (touched_image, 0, 0),
        (moved_image, 0, 0),
        (changed_instruction, 0, 1),
        (caption_of_another_tuple, 0, 0),
        (blanks_round_a_text, 0, 0),
        (new_tuple_of_an_image, 0, 4),
        (new_image, 1, 4),
        (copied_image, 0, 0),
        (reordered, 0, 0),
    ],
)
def test_a_change_of_data_costs_what_changed(tmp_path: Path, change: Callable[[Config, Path], None], images: int, texts: int) -> None:
    config = data_set(tmp_path)
    run(config)
    before = entries(config)
    change(config, tmp_path)
    family, *_ = run(config)
    assert (family.images, len(family.texts)) == (images, texts)
    after = entries(config)
    assert len(after) == len(before) + images + texts and before.items() <= after.items()  # earlier entries stay as they were


@pytest.mark.parametrize(
    ("keys", "family", "images", "texts"),
    [
        ({"resolution": 48}, {}, 3, 0),
        ({"buckets": False}, {}, 0, 0),  # these are square already
        ({"cache_batch_size": 3}, {}, 0, 0),
        ({}, {"vae": "vae-2"}, 3, 0),
        ({}, {"text": "text-2"}, 0, 12),
        ({}, {"vae": "text-1", "text": "vae-1"}, 3, 12),
    ],
)
def test_a_change_of_size_or_model_costs_its_part(
    tmp_path: Path, keys: dict[str, Any], family: dict[str, str], images: int, texts: int
) -> None:
    config = data_set(tmp_path)
    run(config)
    before = entries(config)
    made, *_ = run(with_dataset(config, **keys), FakeFamily(**family))
    assert (made.images, len(made.texts)) == (images, texts) and before.items() <= entries(config).items()
    back, *_ = run(config)
    assert (back.images, back.texts) == (0, [])


def test_an_image_changed_without_its_size_or_within_a_clock_tick_is_seen(tmp_path: Path) -> None:
    config = data_set(tmp_path)
    path = tmp_path / "1.bmp"
    Image.new("RGB", (64, 64), "red").save(path)
    edit_tuples(config, lambda records: records[1].update(source="1.bmp"))
    run(config)
    stat = path.stat()
    Image.new("RGB", (64, 64), "blue").save(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert run(config)[0].images == 1


def test_a_known_image_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_set(tmp_path)
    for path in tmp_path.glob("*.png"):
        os.utime(path, (1000, 1000))
    run(config)
    monkeypatch.setattr(cache, "_file_digest", lambda file: pytest.fail("read"))
    monkeypatch.setattr(cache.media, "look", lambda path: pytest.fail("opened"))
    run(config)


@pytest.mark.parametrize("memory", ["", "[]", "{", '{"x": 5}', '{"x": [1, 2]}', "\xff"])
def test_a_damaged_memory_of_hashes_is_forgotten(tmp_path: Path, memory: str) -> None:
    config = data_set(tmp_path)
    run(config)
    text = memory.replace('"x"', json.dumps(str(tmp_path / "1.png")))
    (tmp_path / "cache" / "files.json").write_bytes(text.encode("latin-1"))
    assert run(config)[0].images == 0


# --- targets ---


def paired(tmp_path: Path, size: tuple[int, int], source_size: tuple[int, int] = (160, 96)) -> Config:
    config = data_set(tmp_path, images=1, size=source_size)
    picture(tmp_path / "target.png", size, seed=9)
    edit_tuples(config, lambda records: records[0].update(target="target.png"))
    return config


@pytest.mark.parametrize("size", [(160, 96), (320, 192), (161, 96), (80, 48)])
def test_a_target_has_its_source_s_bucket(tmp_path: Path, size: tuple[int, int]) -> None:
    config = paired(tmp_path, size)
    family, *_ = run(config)
    keys = Keys(config, family)
    (item,) = read_tuples(config.dataset)
    assert keys.source(item).bucket == keys.target(item).bucket and keys.source(item).key != keys.target(item).key
    assert family.images == 2


@pytest.mark.parametrize(
    ("size", "said"),
    [((96, 160), "96 x 160 has another shape than its source 0.png"), ((40, 24), "40 x 24 pixels would be scaled up")],
)
def test_a_target_of_another_frame_is_refused(tmp_path: Path, size: tuple[int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(paired(tmp_path, size))


def test_a_target_that_is_another_tuple_s_source_is_encoded_once(tmp_path: Path) -> None:
    config = data_set(tmp_path, images=2)
    edit_tuples(config, lambda records: [r.update(target=t) for r, t in zip(records, ("1.png", "0.png"), strict=True)])
    assert run(config)[0].images == 2


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


# --- prune ---


def test_prune_removes_unused_entries_of_ours_only(tmp_path: Path) -> None:
    config = data_set(tmp_path)
    run(config)
    before = entries(config)
    for folder in ("latents", "texts"):
        (tmp_path / "cache" / folder / "mine.safetensors").write_bytes(b"kept")
        (tmp_path / "cache" / folder / f"{'g' * 64}.safetensors").write_bytes(b"kept")
        (tmp_path / "cache" / folder / f"{'a' * 64}.txt").write_bytes(b"kept")
        (tmp_path / "cache" / folder / f".partial-{'a' * 64}.safetensors-123").write_bytes(b"left by a kill")
    (tmp_path / "cache" / f"{'a' * 64}.safetensors").write_bytes(b"kept")
    changed_image(config, tmp_path)
    changed_instruction(config, tmp_path)
    _, latents, texts = run(config, prune=True)
    after = entries(config)
    assert (latents.pruned, texts.pruned) == (2, 2)  # the old entry and what the kill left
    kept = [name for name, data in after.items() if data == b"kept"]
    assert len(kept) == 7 and len(after) == len(before) + 7
    assert run(config)[0].images == 0


# --- several processes, here one after the other; really several in test_data_commands.py ---


def test_shares_cover_everything_once(tmp_path: Path) -> None:
    config = data_set(tmp_path, images=7)
    tuples = read_tuples(config.dataset)
    families = [FakeFamily() for _ in range(3)]
    # Nobody writes before all have looked: the shares must be taken of one list.
    shares = [
        cache_latents(
            with_dataset(config, cache_dir=str(tmp_path / f"c{rank}")), families[rank], tuples, CPU, Processes(rank=rank, world=3)
        )
        for rank in range(3)
    ]
    assert [family.images for family in families] == [3, 2, 2] and {share.encoded for share in shares} == {7}
    names = [sorted(p.name for p in (tmp_path / f"c{rank}" / "latents").iterdir()) for rank in range(3)]
    assert len(set(sum(names, []))) == 7


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
    store = {"latents": latent_store, "texts": text_store}[what](config)
    path = min((tmp_path / "cache" / what).iterdir())
    (name, tensor), *_ = store.read(path.stem).items()
    tensor.view(-1)[-1] = value
    path.write_bytes(save({name: tensor}))
    remedy = rf"{path.name} \(a car\): tensor {name} holds NaN or infinite values; remove this file and run {store.command} again"
    with pytest.raises(ValueError, match=remedy):
        {"latents": latent_store, "texts": text_store}[what](config).read(path.stem, "a car")


def test_an_entry_s_numbers_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_set(tmp_path, images=1)
    run(config)
    looked: list[Any] = []
    monkeypatch.setattr(cache, "refuse_not_finite", lambda tensors, where, remedy: looked.append(where))
    store, key = latent_store(config), min((tmp_path / "cache" / "latents").iterdir()).stem
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
    assert cache.read_lost(config) == {}
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


# --- how a picture is read is part of its key, where it matters ---


def test_entries_of_pictures_without_a_profile_stay_and_others_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_set(tmp_path)
    keys = {index: Keys(config, FakeFamily()).source(item).key for index, item in enumerate(read_tuples(config.dataset))}
    digest = Keys(config, FakeFamily()).files.look(tmp_path / "0.png").digest
    assert keys[0] == cache._sha("latent", digest, "vae-1", "64x64", "1")  # as it has always been
    with Image.open(tmp_path / "1.png") as image:
        image.save(tmp_path / "1.png", icc_profile=rgb(P3))
    item = read_tuples(config.dataset)[1]
    files = Keys(config, FakeFamily()).files
    (digest, reader) = (files.look(item.source).digest, files.look(item.source).reader)
    plain = cache._sha("latent", digest, "vae-1", "64x64", "1")
    assert reader == cache.media.READER and Keys(config, FakeFamily()).source(item).key != plain
    monkeypatch.setattr(cache.media, "READER", "next")
    assert Keys(config, FakeFamily()).source(item).key not in (plain, keys[1])


def test_a_memory_without_readers_is_asked_for_them_and_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_set(tmp_path)
    for path in tmp_path.glob("*.png"):
        os.utime(path, (1000, 1000))
    run(config)
    place = tmp_path / "cache" / "files.json"
    old = {name: known[:5] for name, known in json.loads(place.read_text()).items()}
    place.write_text(json.dumps(old))
    monkeypatch.setattr(cache, "_file_digest", lambda file: pytest.fail("read"))
    assert run(config)[0].images == 0
    assert all(len(known) == 8 for known in json.loads(place.read_text()).values())
