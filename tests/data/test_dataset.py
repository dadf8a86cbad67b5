"""What training reads of a cache, what it refuses, and the order of batches."""

from __future__ import annotations

import os
import pickle
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from byg_plugin.config.sections import Config
from byg_plugin.data.cache import Keys, cache_latents, cache_texts, texts_of, too_many_lost
from byg_plugin.data.dataset import BucketBatches, CachedTuples, collate, split_tuples
from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import EditTuple, read_tuples
from byg_plugin.families import SPECS
from tests.support.data_fakes import CPU, FakeFamily, data_set, hashed, picture, record, write_tuples
from tests.support.tiny import tiny_config


def cached(config: Config, family: FakeFamily | None = None) -> Config:
    family = family or FakeFamily()
    cache_latents(config, family, read_tuples(config.dataset), CPU)
    cache_texts(config, family, read_tuples(config.dataset), CPU)
    return config


def mixed(folder: Path, **sections: dict[str, Any]) -> Config:
    """Six wide, five high and three square pictures; each with its own target."""
    sizes = [(128, 64)] * 6 + [(64, 128)] * 5 + [(64, 64)] * 3
    for index, size in enumerate(sizes):
        picture(folder / f"{index}.png", size, seed=index)
        picture(folder / f"t{index}.png", size, seed=100 + index)
    write_tuples(folder / "tuples.jsonl", [record(f"{k}.png", target=f"t{k}.png") for k in range(len(sizes))])
    return cached(tiny_config(folder, **sections))


def refused(config: Config, family: FakeFamily | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        CachedTuples(config, family or FakeFamily())  # type: ignore[arg-type]
    return str(caught.value)


def test_items_are_the_cached_encodings_and_no_encoder_is_loaded(tmp_path: Path) -> None:
    config = mixed(tmp_path)
    family = FakeFamily()
    data = CachedTuples(config, family)  # type: ignore[arg-type]
    assert len(data) == 14 and family.loaded == []
    item = data[7]
    assert item["index"] == 7 and "target" not in item and data.bucket(7) == (48, 80)
    assert item["source"].shape == (3, 1, 10, 6)
    for role in ROLES:
        assert torch.equal(item[role]["t5"][0].float(), hashed(getattr(data.tuples[7], role)))
    assert len({hashed(getattr(data.tuples[7], role)).sum().item() for role in ROLES}) == 4
    batch = collate([data[7], data[8]])
    assert batch["index"] == [7, 8] and batch["source"].shape == (2, 3, 1, 10, 6)
    assert torch.equal(batch["source"][1], data[8]["source"]) and batch["instruction"]["t5"].shape == (2, 1, 8)


def test_paired_items_have_their_own_target(tmp_path: Path) -> None:
    config = mixed(tmp_path, objective={"name": "paired"})
    data = CachedTuples(config, FakeFamily())  # type: ignore[arg-type]
    plain = data_set(tmp_path / "targets", images=0)
    write_tuples(Path(plain.dataset.tuples), [record(str(tmp_path / f"t{k}.png")) for k in range(14)])
    targets = CachedTuples(cached(plain), FakeFamily())  # type: ignore[arg-type]
    batch = collate([data[0], data[5]])
    assert batch["target"].shape == batch["source"].shape
    assert torch.equal(batch["target"][0], targets[0]["source"]) and torch.equal(batch["target"][1], targets[5]["source"])
    assert not torch.equal(batch["target"], batch["source"])


def test_paired_without_a_target(tmp_path: Path) -> None:
    config = data_set(tmp_path)
    write_tuples(tmp_path / "tuples.jsonl", [record("0.png", target="1.png"), record("1.png", id="bare")])
    cached(config)
    paired = tiny_config(tmp_path, objective={"name": "paired"})
    assert 'objective.name = "paired" needs a `target` in every tuple; 1 of 2 have none, e.g. bare' in refused(paired)


# --- caches that do not match ---


def test_nothing_cached_names_both_commands(tmp_path: Path) -> None:
    said = refused(data_set(tmp_path, images=2))
    for part in (
        f"dataset.cache_dir = {tmp_path / 'cache'} does not match",
        "2 of 2 images are not cached as they are now, nothing is cached yet",
        "run python -m byg_plugin.cache_latents",
        "8 of 8 texts are not cached as they are now, nothing is cached yet",
        "run python -m byg_plugin.cache_text_encoder_outputs",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("part", "command", "other"), [("vae", "cache_latents", "text_enc"), ("text", "cache_text_encoder_outputs", "latents")]
)
def test_cache_of_another_model(tmp_path: Path, part: str, command: str, other: str) -> None:
    config = cached(data_set(tmp_path))
    said = refused(config, FakeFamily(**{part: "another"}))
    assert "has their content, this model and this size" in said and f"run python -m byg_plugin.{command}" in said and other not in said


def test_changed_image_changed_text_other_resolution(tmp_path: Path) -> None:
    config = cached(data_set(tmp_path))
    assert "3 of 3 images" in refused(config.model_copy(update={"dataset": config.dataset.model_copy(update={"resolution": 48})}))
    picture(tmp_path / "1.png", seed=99)
    said = refused(config)
    assert "1 of 3 images" in said and "1.png" in said and "0.png" not in said and "texts" not in said
    cached(config)
    write_tuples(tmp_path / "tuples.jsonl", [record("0.png", instruction="something new")])
    said = refused(config)
    assert "1 of 4 texts" in said and "'something new'" in said and "images" not in said


def test_a_cut_off_entry_is_refused(tmp_path: Path) -> None:
    config = cached(data_set(tmp_path))
    path = min((tmp_path / "cache" / "latents").iterdir())
    path.write_bytes(path.read_bytes()[:-4])
    assert "1 of 3 images" in refused(config)


def test_a_cache_that_may_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = cached(data_set(tmp_path))
    (tmp_path / "cache" / "files.json").unlink()
    (tmp_path / "cache" / "files.json").mkdir()  # nobody can replace it, root neither
    assert len(CachedTuples(config, FakeFamily())) == 3  # type: ignore[arg-type]


def test_10000_tuples_are_checked_in_seconds(tmp_path: Path) -> None:
    config = data_set(tmp_path, images=50, tuples_each=200)
    for path in tmp_path.glob("*.png"):
        os.utime(path, (1000, 1000))
    # 30,050 entries without 30,050 synced writes.
    family = FakeFamily()
    cache_latents(config, family, read_tuples(config.dataset), CPU)
    keys, folder = Keys(config, family), tmp_path / "cache" / "texts"
    one = data_set(tmp_path / "one", images=1)
    cache_texts(one, family, read_tuples(one.dataset), CPU)
    whole = min((tmp_path / "one" / "cache" / "texts").iterdir())
    folder.mkdir()
    for text in texts_of(read_tuples(config.dataset)):
        os.link(whole, folder / f"{keys.text(text)}.safetensors")
    started = time.perf_counter()
    assert len(CachedTuples(config, FakeFamily())) == 10000  # type: ignore[arg-type]
    assert time.perf_counter() - started < 30  # 5 s on an idle core


# --- split ---


def items(sources: dict[str, int]) -> list[EditTuple]:
    return [
        EditTuple(id=f"{source}-{k}", source=Path(source), **dict.fromkeys(ROLES, "x"))
        for source, count in sources.items()
        for k in range(count)
    ]


def test_split_keeps_sources_whole_and_takes_enough(tmp_path: Path) -> None:
    tuples = items({f"/d/{k}.png": 3 for k in range(20)})
    train, held = split_tuples(tuples, 7)
    assert len(held) == 9 and len(train) == 51 and not {item.source for item in train} & {item.source for item in held}
    assert [item for item in tuples if item in train] == train
    assert split_tuples(tuples, 0) == (tuples, [])


def test_split_is_stable_when_tuples_come_move_or_change_order() -> None:
    tuples = items({f"/d/{k}.png": 1 for k in range(100)})
    _, held = split_tuples(tuples, 10)
    names = {item.source.name for item in held}
    _, again = split_tuples(tuples[::-1], 10)
    _, moved = split_tuples(items({f"/elsewhere/{k}.png": 1 for k in range(100)}), 10)
    assert names == {item.source.name for item in again} == {item.source.name for item in moved}
    assert names != {f"{k}.png" for k in range(10)}
    # 5 more of 100: a new source can push out at most one held one each.
    _, more = split_tuples(tuples + items({f"/d/new{k}.png": 1 for k in range(5)}), 10)
    assert len(names & {item.source.name for item in more}) >= 5 and len(more) == 10
    # More tuples of training sources move nothing.
    train, _ = split_tuples(tuples, 10)
    _, same = split_tuples(tuples + items({str(train[0].source): 4}), 10)
    assert {item.source.name for item in same} == names


def test_split_of_sources_with_one_file_name_is_random_too() -> None:
    names = [f"/d/{k:03d}/source.png" for k in range(100)]
    _, held = split_tuples(items(dict.fromkeys(names, 1)), 10)
    _, again = split_tuples(items(dict.fromkeys(names[::-1], 1)), 10)
    assert {item.source for item in held} == {item.source for item in again} != {Path(name) for name in names[:10]}


def test_sources_that_are_to_be_trained_on_are_not_held_out() -> None:
    tuples = items({f"/d/{k}.png": 2 for k in range(20)})
    _, held = split_tuples(tuples, 6)
    wanted = {item.source for item in held}
    # One tuple of a source says it for all of them.
    marked = [replace(item, split="train") if item.source in wanted and item.id.endswith("-1") else item for item in tuples]
    train, held = split_tuples(marked, 6)
    assert len(held) == 6 and len(train) == 34 and not {item.source for item in held} & wanted
    with pytest.raises(ValueError, match=r"validation_items = 40: 34 of 40 tuples can be held out, .*; set at most 34"):
        split_tuples(marked, 40)
    of_training = [replace(item, split="train") for item in tuples]
    assert not split_tuples(of_training, 0)[1]
    with pytest.raises(ValueError, match="every source has split = 'train', .*; mark some with split = 'validation', or leave"):
        split_tuples(of_training, 6)


def test_split_with_nothing_left_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset\.validation_items = 8 leaves nothing to train on: 6 tuples of 2 sources"):
        split_tuples(items({"/a.png": 3, "/b.png": 3}), 8)


def test_training_and_validation_are_disjoint(tmp_path: Path) -> None:
    config = mixed(tmp_path, dataset={"validation_items": 4})
    both = [{item.id for item in CachedTuples(config, FakeFamily(), split).tuples} for split in ("train", "validation")]  # type: ignore
    assert len(both[0]) == 10 and len(both[1]) == 4 and not both[0] & both[1]


# --- batches ---


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CachedTuples:
    return CachedTuples(mixed(tmp_path_factory.mktemp("mixed")), FakeFamily())  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_tuple_at_least_once_an_epoch_in_batches_of_one_bucket(data: CachedTuples, size: int) -> None:
    batches = BucketBatches(data, size, seed=3)
    for epoch in (0, 1, 5):
        made = batches.batches(epoch)
        assert len(made) == batches.per_epoch and {len(batch) for batch in made} == {size}
        assert all(len({data.bucket(index) for index in batch}) == 1 for batch in made)
        counts = Counter(index for batch in made for index in batch)
        assert set(counts) == set(range(14))
        if size == 1:
            assert set(counts.values()) == {1}
        for members in ([0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11, 12, 13]):  # filling up favours nobody
            assert max(counts[k] for k in members) - min(counts[k] for k in members) <= 1
        collate([data[index] for index in made[0]])


def test_order_hangs_on_seed_and_epoch_alone(data: CachedTuples) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return BucketBatches(data, 2, seed).batches(epoch)

    assert order(3, 1) == order(3, 1) and order(3, 1) != order(3, 2) and order(3, 1) != order(4, 1)
    # An earlier epoch after a later one: no state.
    batches = BucketBatches(data, 2, 3)
    first = list(batches.batches(0))
    batches.batches(4)
    assert batches.batches(0) == first
    buckets = [data.bucket(batch[0]) for batch in first]
    assert sum(a != b for a, b in zip(buckets, buckets[1:], strict=False)) > 2  # not one bucket after the other


@pytest.mark.parametrize("world", [2, 3, 4])
def test_n_processes_take_what_one_takes_with_n_times_the_accumulation(data: CachedTuples, world: int) -> None:
    alone = BucketBatches(data, 2, seed=1)
    ranks = [BucketBatches(data, 2, seed=1) for _ in range(world)]
    seen = []
    for step in range(12):  # several epochs; their borders fall inside steps
        one = [alone.micro_batch(step, micro, 0, 1, 2 * world) for micro in range(2 * world)]
        many = [ranks[rank].micro_batch(step, micro, rank, world, 2) for micro in range(2) for rank in range(world)]
        assert one == many
        seen += one
    epochs = len(seen) // alone.per_epoch
    assert epochs >= 5
    assert seen[: epochs * alone.per_epoch] == [batch for epoch in range(epochs) for batch in alone.batches(epoch)]


def test_resuming_needs_no_state(data: CachedTuples) -> None:
    whole = BucketBatches(data, 2, seed=1)
    steps = [whole.micro_batch(step, 0, 0, 1, 1) for step in range(30)]
    resumed = BucketBatches(data, 2, seed=1)
    assert [resumed.micro_batch(step, 0, 0, 1, 1) for step in range(17, 30)] == steps[17:]


def test_tuples_that_name_their_split_decide(tmp_path: Path) -> None:
    items = [
        EditTuple(
            id=str(k),
            source=tmp_path / f"{k // 2}.png",
            src_caption="a",
            tgt_caption="b",
            instruction="c",
            reverse_instruction="d",
            split="validation" if k in (2, 3) else None,
        )
        for k in range(6)
    ]
    train, validation = split_tuples(items, 0)
    assert [item.id for item in validation] == ["2", "3"] and len(train) == 4
    with pytest.raises(ValueError, match="a source is held out whole"):
        split_tuples(items[:3] + items[4:] + [replace(items[3], split=None)], 0)
    with pytest.raises(ValueError, match="nothing is left to train on"):
        split_tuples(items[2:4], 0)


def test_either_side_knows_how_many_are_held_out(tmp_path: Path) -> None:
    """A source is held out whole: 2 tuples where 1 is asked for."""
    config = cached(data_set(tmp_path, images=3, tuples_each=2))
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"validation_items": 1})})
    train, validation = (CachedTuples(config, FakeFamily(), split) for split in ("train", "validation"))  # type: ignore[arg-type]
    assert (len(train), len(validation), train.held_out, validation.held_out) == (4, 2, 2, 2)


# --- entries that are whole and yet no good ---


def store_of(data: CachedTuples, what: str) -> Any:
    return {"latents": data._latents, "texts": data._texts}[what]


@pytest.mark.parametrize("what", ["latents", "texts"])
def test_a_number_that_is_none_names_entry_and_tuple(tmp_path: Path, what: str) -> None:
    config = cached(data_set(tmp_path))
    data = CachedTuples(config, FakeFamily())  # type: ignore[arg-type]
    item, keys = data.tuples[1], Keys(config, FakeFamily())  # type: ignore[arg-type]
    key = keys.source(item).key if what == "latents" else keys.text(item.instruction)
    store = store_of(data, what)
    tensors = store.read(key)
    for tensor in tensors.values():
        tensor.view(-1)[0] = torch.nan
    store.path(key).write_bytes(save(tensors))
    with pytest.raises(ValueError) as caught:
        CachedTuples(config, FakeFamily())[1]  # type: ignore[arg-type]
    said = str(caught.value)
    named = f"{item.source}, source of tuple {item.id}" if what == "latents" else f"{item.instruction!r}, instruction of tuple {item.id}"
    for part in (str(store.path(key)), named, "holds NaN or infinite values; remove this file and run", store.command):
        assert part in said
    CachedTuples(config, FakeFamily())[0]  # type: ignore[arg-type]  # the others serve


@pytest.mark.parametrize(
    ("what", "tensors"),
    [
        ("latents", {"latents": torch.ones(4, 1, 8, 8)}),
        ("latents", {"latents": torch.ones(3, 1, 8, 9)}),
        ("latents", {"latents": torch.ones(3, 2, 8, 8)}),
        ("texts", {"t6": torch.ones(1, 8, dtype=torch.bfloat16)}),
        ("texts", {"t5": torch.ones(1, 9, dtype=torch.bfloat16)}),
        ("texts", {"t5": torch.ones(1, 8)}),
        ("texts", {"t5": torch.ones(1, 8, dtype=torch.bfloat16), "more": torch.ones(1)}),
    ],
)
def test_an_entry_unlike_the_others_is_named(tmp_path: Path, what: str, tensors: dict[str, torch.Tensor]) -> None:
    config = cached(data_set(tmp_path))
    path = min((tmp_path / "cache" / what).iterdir())
    path.write_bytes(save(tensors))
    said = refused(config)
    assert "1 entries have other tensors or shapes than the rest; remove these files and run python -m byg_plugin.cache_" in said
    assert str(path) in said and "not cached" not in said
    path.unlink()
    assert len(CachedTuples(cached(config), FakeFamily())) == 3  # type: ignore[arg-type]


def test_of_two_unlike_entries_both_are_named_and_shapes_go_with_sizes(tmp_path: Path) -> None:
    config = cached(data_set(tmp_path, images=2))
    first, second = sorted((tmp_path / "cache" / "latents").iterdir())
    first.write_bytes(save({"latents": torch.ones(4, 1, 8, 8)}))
    said = refused(config)
    assert "2 entries have other" in said and str(first) in said and str(second) in said
    mixed(tmp_path / "sizes")
    assert len(CachedTuples(tiny_config(tmp_path / "sizes"), FakeFamily())) == 14  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 1, 0, 8)])
def test_what_is_no_latent_is_not_cached(tmp_path: Path, shape: tuple[int, ...]) -> None:
    config = cached(data_set(tmp_path))
    min((tmp_path / "cache" / "latents").iterdir()).write_bytes(save({"latents": torch.ones(shape)}))
    assert "1 of 3 images are not cached" in refused(config)


def test_an_entry_of_a_size_of_its_own_is_compared_by_its_channels(tmp_path: Path) -> None:
    data_set(tmp_path, images=3)
    picture(tmp_path / "1.png", (128, 64))
    config = cached(tiny_config(tmp_path))
    keys, item = Keys(config, FakeFamily()), read_tuples(config.dataset)[1]  # type: ignore[arg-type]
    path = tmp_path / "cache" / "latents" / f"{keys.source(item).key}.safetensors"
    path.write_bytes(save({"latents": torch.ones(4, 1, 6, 10)}))
    said = refused(config)
    assert "1 entries have other tensors" in said and str(path) in said


def test_a_loader_s_process_that_is_started_anew_reads_the_same(tmp_path: Path):
    """Where processes are not forked (Windows, macOS) the data set goes to them as a pickle, and with it the family."""
    for spec in SPECS.values():
        assert pickle.loads(pickle.dumps(spec)) == spec
    data = CachedTuples(mixed(tmp_path), FakeFamily(), "train")
    there = pickle.loads(pickle.dumps(data))
    assert len(there) == len(data)
    for name, value in data[3].items():
        assert torch.equal(there[3][name], value) if isinstance(value, torch.Tensor) else there[3][name] is not None


@pytest.mark.parametrize(("lost", "share"), [(29, 0.29), (57, 0.57), (58, 0.58)])
def test_the_share_that_may_be_lost_is_reckoned_as_it_is_written(tmp_path: Path, lost: int, share: float):
    """0.29 x 100 is less than 29 in binary."""
    dataset = tiny_config(tmp_path, dataset={"max_lost": share}).dataset
    assert not too_many_lost(lost, 100, dataset) and too_many_lost(lost + 1, 100, dataset)
