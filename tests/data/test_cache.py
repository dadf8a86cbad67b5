"""Caches: what is encoded again and what is not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from byg_plugin.config.loading import parse_config
from byg_plugin.config.sections import Config
from byg_plugin.data import cache
from byg_plugin.data.buckets import crop_to_bucket, to_tensor
from byg_plugin.data.cache import Keys, Processes, cache_latents, cache_texts, latent_store, text_store
from byg_plugin.data.media import load_image
from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import read_tuples
from tests.support.cache_runs import edit_tuples, run, with_dataset
from tests.support.data_fakes import CPU, FakeFamily, data_set, entries, hashed, picture, record
from tests.support.icc import P3, rgb


def test_entries_are_the_family_s_encodings_of_the_cropped_pictures(tmp_path: Path) -> None:
    config = data_set(tmp_path, images=3, size=(150, 90))
    run(with_dataset(config, cache_batch_size=2))
    for item in read_tuples(config.dataset):
        wanted = Keys(config, FakeFamily()).source(item)
        pixels = to_tensor(crop_to_bucket(load_image(item.source), wanted.bucket))
        latents = latent_store(config.dataset).read(wanted.key)["latents"]
        assert latents.dtype == torch.float32 and latents.shape == (3, 1, wanted.bucket[1] // 8, wanted.bucket[0] // 8)
        assert torch.equal(latents, FakeFamily().encode_pixels(torch.nn.Identity(), pixels[None, :, None])[0])
        for role in ROLES:
            text = getattr(item, role)
            encoding = text_store(config.dataset).read(Keys(config, FakeFamily()).text(text))["t5"]
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
    monkeypatch.setattr(cache, "file_digest", lambda path: pytest.fail("read"))
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


def test_nobody_writes_before_everybody_has_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_set(tmp_path)
    events: list[str] = []

    def gather(values: list[Any]) -> list[Any]:
        events.append("a barrier" if values == [] else "gathers")
        return values

    def write(store: cache.Store, *arguments: Any) -> None:
        events.append("writes")

    monkeypatch.setattr(cache.Store, "write", write)
    for work, before in ((cache_latents, ["gathers", "a barrier"]), (cache_texts, ["a barrier"])):
        events.clear()
        work(config, FakeFamily(), read_tuples(config.dataset), CPU, Processes(gather=gather))
        assert events[: len(before) + 1] == [*before, "writes"]


def test_what_one_process_has_hashed_is_not_replaced_by_what_another_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = data_set(tmp_path, images=2)
    tuples = read_tuples(config.dataset)
    monkeypatch.setattr(cache, "_SETTLED_NS", 0)
    cache_latents(config, FakeFamily(), tuples, CPU)
    picture(tmp_path / "0.png", (70, 90), seed=77)
    os.utime(tmp_path / "0.png", (5, 5))
    told: list[Any] = []
    one, other = (Keys(config, FakeFamily()).files for _ in range(2))
    # Each looks at its own share and hears of the other's; here the second one, which remembers the old picture, is heard last.
    cache._look_at_all(other, tuples, Processes(rank=1, world=2, gather=lambda values: told.extend(values) or values))
    cache._look_at_all(one, tuples, Processes(rank=0, world=2, gather=lambda values: [*values, *told]))
    name = str((tmp_path / "0.png").absolute())
    assert one.known[name].changed == 5 * 10**9 and one.known[name].digest == cache.file_digest(tmp_path / "0.png")
    assert one.seen.keys() == {name, str((tmp_path / "1.png").absolute())}


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
    path = tmp_path / "cache" / "files.json"
    old = {name: known[:5] for name, known in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(old))
    monkeypatch.setattr(cache, "file_digest", lambda path: pytest.fail("read"))
    assert run(config)[0].images == 0
    assert all(len(known) == 8 for known in json.loads(path.read_text()).values())


SCORED = {"every": 500, "metrics": ["error"], "select": ["error_source"]}


@pytest.mark.parametrize("section", [{"sample": {"every": 2}}, {"evaluate": SCORED}, {}])
def test_the_text_that_guidance_leads_away_from_is_cached_where_edits_are_made(section: dict[str, Any]):
    """Of previews, and of edits that are scored without any."""
    raw = {
        "model": {"family": "z-image", "path": "x"},
        "dataset": {"tuples": "t.jsonl", "cache_dir": "c", "validation_items": 2},
        "train": {"steps": 1000},
        "output": {"dir": "out"},
    }
    assert len(cache.texts_beside(parse_config(raw | section))) == len(section)
