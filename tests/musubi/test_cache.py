"""The text roles in the host's cache files, and what is refused before and while training: without the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import EditTuple
from byg_plugin.musubi import cache as musubi_cache
from byg_plugin.musubi.cache import Item
from byg_plugin.musubi.family import MusubiFamily
from byg_plugin.musubi.flux import FluxOnMusubi
from byg_plugin.musubi.krea2 import Krea2OnMusubi
from byg_plugin.musubi.qwen_image import QwenImageOnMusubi
from byg_plugin.musubi.wan import WanOnMusubi

WIDTH = 6
WAN, FLUX = WanOnMusubi(), FluxOnMusubi()
ENCODER = "t5.safetensors:1|bf16|8"


def edit_tuple(source: str, number: int = 0) -> EditTuple:
    texts = {role: f"{role} of {source} {number}" for role in ROLES}
    return EditTuple(id=f"{source}{number}", source=Path(source), **texts)


def encoding(text: str) -> dict[str, Tensor]:
    """Rows of a number that says which text it is; texts differ in length."""
    return {"umt5": torch.full((1 + len(text) % 4, WIDTH), float(sum(map(ord, text)) % 251), dtype=torch.bfloat16)}


def write_dataset(folder: Path, stems: list[str], *, video: bool = False) -> Path:
    """Latents of the host, and its dataset TOML."""
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    position = "_00000-005" if video else ""
    for stem in stems:
        save_file({"latents_2x4x6_bfloat16": torch.randn(16, 2, 4, 6).bfloat16()}, cache / f"{stem}{position}_0048x0032_wan.safetensors")
    kind = "video" if video else "image"
    extra = "target_frames = [5]\n" if video else ""
    text = f'[general]\nresolution = [48, 32]\n[[datasets]]\n{kind}_directory = "media"\ncache_directory = "{cache.as_posix()}"\n{extra}'
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    return folder / "dataset.toml"


def write_all(dataset: Path, tuples: list[EditTuple], encoder: str = ENCODER) -> None:
    for item, some in musubi_cache.matched(musubi_cache.cached_items(dataset, WAN), tuples):
        musubi_cache.write_roles(item, some, encoding, WAN, encoder)


def test_the_hosts_own_tensors_stay(tmp_path: Path):
    path = tmp_path / "a_wan_te.safetensors"
    own = {"varlen_t5_bfloat16": torch.randn(3, WIDTH).bfloat16()}
    save_file(own, path, metadata={"architecture": "wan", "caption1": "theirs", "format_version": "1.0.1"})
    for dtype in (torch.float16, torch.bfloat16):  # again: ours are replaced, not doubled
        encode = lambda text, dtype=dtype: {name: value.to(dtype) for name, value in encoding(text).items()}  # noqa: E731
        musubi_cache.write_roles(Item(stem="a", path=path), [edit_tuple("a.png")], encode, WAN, ENCODER)
    written = load_file(path)
    assert torch.equal(written["varlen_t5_bfloat16"], own["varlen_t5_bfloat16"])
    assert {name for name in written if "byg" in name} == {f"varlen_byg_{r}_{p}" for r in ROLES for p in ("umt5_bfloat16", "lengths_int64")}
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["caption1"] == "theirs"
    assert musubi_cache.is_current(path, [edit_tuple("a.png")], ENCODER)
    assert not musubi_cache.is_current(path, [edit_tuple("a.png", 1)], ENCODER)
    assert not musubi_cache.is_current(path, [edit_tuple("a.png")], "another encoder")


def test_a_file_of_another_architecture_is_refused(tmp_path: Path):
    path = tmp_path / "a_wan_te.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"architecture": "qwen_image"})
    with pytest.raises(ValueError, match="caches texts of qwen_image, model.family needs wan"):
        musubi_cache.write_roles(Item(stem="a", path=path), [edit_tuple("a.png")], encoding, WAN, ENCODER)


@pytest.mark.parametrize("video", [False, True])
def test_what_is_cached_is_checked_before_training(tmp_path: Path, video: bool):
    tuples = [edit_tuple("my_clip.mp4"), edit_tuple("other.mp4")]
    dataset = write_dataset(tmp_path, ["my_clip", "other"], video=video)
    with pytest.raises(ValueError, match=r"2 of 2 items have no cached texts .*cache_text_encoder_outputs"):
        musubi_cache.check(dataset, WAN, tuples)
    write_all(dataset, tuples)
    assert musubi_cache.check(dataset, WAN, tuples) == 2
    changed = [tuples[0], replace(tuples[1], instruction="something else")]
    with pytest.raises(ValueError, match=r"1 of 2 items have texts that have changed since they were cached \(other\)"):
        musubi_cache.check(dataset, WAN, changed)


def test_texts_by_another_encoder_are_told_before_training(tmp_path: Path):
    dataset, tuples = write_dataset(tmp_path, ["a", "b"]), [edit_tuple("a.png"), edit_tuple("b.png")]
    write_all(dataset, tuples, encoder="t5.safetensors:100|bf16|512")
    assert musubi_cache.check(dataset, WAN, tuples, ["t5.safetensors:100", "bf16", "512"]) == 2
    assert musubi_cache.check(dataset, WAN, tuples, [None, "bf16", "512"]) == 2, "training alone needs no encoder"
    for other in (["t5.safetensors:100", "bf16", "256"], [None, "fp8", "512"], ["u", "bf16", "512"], ["t", "u", "bf16", "512"]):
        with pytest.raises(ValueError, match=r"2 of 2 items have texts by another text encoder.*\(a, b\).*cache_text_encoder_outputs"):
            musubi_cache.check(dataset, WAN, tuples, other)


def test_items_and_tuples_must_match(tmp_path: Path):
    dataset = write_dataset(tmp_path, ["a", "b"])
    with pytest.raises(ValueError, match=r"1 of 2 items of musubi.dataset_config have no tuple .*\(b\)"):
        musubi_cache.check(dataset, WAN, [edit_tuple("a.png")])
    with pytest.raises(ValueError, match=r"1 of 3 sources of dataset.tuples are no items .*\(c\)"):
        musubi_cache.check(dataset, WAN, [edit_tuple(f"{name}.png") for name in "abc"])
    with pytest.raises(ValueError, match="have one name"):
        musubi_cache.check(dataset, WAN, [edit_tuple("x/a.png"), edit_tuple("y/a.png"), edit_tuple("b.png")])
    with pytest.raises(ValueError, match="no cached latents"):
        musubi_cache.check(dataset, FLUX, [edit_tuple("a.png")])


def two_datasets(folder: Path, first: str, second: str, caches: tuple[str, str] = ("cache", "cache2")) -> Path:
    """An item `a` in each of two caches, of media that a dataset names so."""
    for cache, side in zip(caches, (48, 96), strict=True):
        (folder / cache).mkdir(exist_ok=True)
        latents = {"latents_2x4x6_bfloat16": torch.randn(16, 2, 4, 6).bfloat16()}
        save_file(latents, folder / cache / f"a_{side:04d}x0032_wan.safetensors")
    text = "".join(
        f"[[datasets]]\n{media}\ncache_directory = '{(folder / cache).as_posix()}'\n"
        for media, cache in zip((first, second), caches, strict=True)
    )
    (folder / "dataset.toml").write_text(text, encoding="utf-8")
    return folder / "dataset.toml"


def media_folders(folder: Path) -> tuple[str, str]:
    """Two with a picture of one name."""
    for name in ("one", "two"):
        (folder / name).mkdir()
        (folder / name / "a.png").touch()
    return tuple(f"image_directory = '{(folder / name).as_posix()}'" for name in ("one", "two"))  # type: ignore[return-value]


@pytest.mark.parametrize("caches", [("cache", "cache2"), ("cache", "cache")], ids=["two caches", "one cache"])
def test_two_items_of_one_name_are_refused(tmp_path: Path, caches: tuple[str, str]):
    dataset = two_datasets(tmp_path, *media_folders(tmp_path), caches=caches)
    with pytest.raises(ValueError, match=r"one and \S*two both have an item called a, .*: rename one"):
        musubi_cache.latents_of(dataset, WAN)
    with pytest.raises(ValueError, match="both have an item called a"):
        musubi_cache.check(dataset, WAN, [edit_tuple("a.png")])


def test_what_is_listed_in_a_jsonl_is_looked_at_too(tmp_path: Path):
    one, _ = media_folders(tmp_path)
    for path, says in ((tmp_path / "two" / "a.png", 2), (tmp_path / "one" / "a.png", 1)):
        (tmp_path / "list.jsonl").write_text(f'{{"image_path": "{path.as_posix()}"}}\n', encoding="utf-8")
        dataset = two_datasets(tmp_path, one, f"image_jsonl_file = '{(tmp_path / 'list.jsonl').as_posix()}'")
        if says == 1:
            assert len(musubi_cache.latents_of(dataset, WAN)) == 2
            continue
        with pytest.raises(ValueError, match="both have an item called a"):
            musubi_cache.latents_of(dataset, WAN)


def test_one_folder_at_two_resolutions_is_allowed(tmp_path: Path):
    one, two = media_folders(tmp_path)
    tuples = [edit_tuple("a.png")]
    for caches in (("cache", "cache2"), ("cache", "cache")):
        dataset = two_datasets(tmp_path, one, one, caches=caches)
        write_all(dataset, tuples)
        assert musubi_cache.check(dataset, WAN, tuples) == len(set(caches))
    # One cache of two folders, of which one has the picture; and folders that are not there any more.
    (tmp_path / "two" / "a.png").rename(tmp_path / "two" / "b.png")
    (tmp_path / "two" / "a.txt").touch()
    assert musubi_cache.latents_of(two_datasets(tmp_path, one, two, caches=("cache", "cache")), WAN)
    gone = two_datasets(tmp_path, "image_directory = 'gone1'", "image_directory = 'gone2'", caches=("cache", "cache"))
    assert musubi_cache.latents_of(gone, WAN)


def collated(paths: list[Path]) -> dict[str, list[Tensor]]:
    """As the host collates text caches: a list a key, one entry for each item that has it."""
    batch: dict[str, list[Tensor]] = {}
    for path in paths:
        for key, value in load_file(path).items():
            batch.setdefault(key.replace("varlen_", "").rpartition("_")[0], []).append(value)
    return batch


def test_a_batch_gives_each_item_its_own_texts(tmp_path: Path):
    tuples = [edit_tuple("a.png", 0), edit_tuple("a.png", 1), edit_tuple("b.png")]
    dataset = write_dataset(tmp_path, ["a", "b"])
    write_all(dataset, tuples)
    batch = collated([tmp_path / "cache" / f"{name}_wan_te.safetensors" for name in "ab"])
    for number, expected in ((0.1, tuples[0]), (0.9, tuples[1])):
        texts = musubi_cache.texts_of_batch(batch, 2, WAN, [number, 0.99], 8)
        for role in ROLES:
            for row, item in enumerate((expected, tuples[2])):
                own = encoding(getattr(item, role))["umt5"]
                assert texts[role]["umt5"].shape == (2, 8, WIDTH)
                assert torch.equal(texts[role]["umt5"][row, : len(own)], own) and not texts[role]["umt5"][row, len(own) :].any()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("part", ["umt5_bfloat16", "lengths_int64"])
def test_a_role_missing_on_one_item_is_refused(tmp_path: Path, role: str, part: str):
    tuples = [edit_tuple("a.png"), edit_tuple("b.png")]
    write_all(write_dataset(tmp_path, ["a", "b"]), tuples)
    paths = [tmp_path / "cache" / f"{name}_wan_te.safetensors" for name in "ab"]
    left = {name: value for name, value in load_file(paths[0]).items() if name != f"varlen_byg_{role}_{part}"}
    save_file(left, paths[0])
    with pytest.raises(ValueError, match=f"^{role} is not cached for 1 of 2 items of a batch: run .*cache_text_encoder_outputs"):
        musubi_cache.texts_of_batch(collated(paths), 2, WAN, [0.0, 0.0], 8)


def test_a_text_longer_than_the_model_takes_is_refused(tmp_path: Path):
    write_all(write_dataset(tmp_path, ["a"]), [edit_tuple("a.png")])
    with pytest.raises(ValueError, match="conditioning.max_text_tokens = 1,"):
        musubi_cache.texts_of_batch(collated([tmp_path / "cache" / "a_wan_te.safetensors"]), 1, WAN, [0.0], 1)


def test_sizes_for_the_metadata(tmp_path: Path):
    assert musubi_cache.sizes(write_dataset(tmp_path, [], video=True)) == (39, 5)
    (tmp_path / "dataset.toml").write_text("[general\n", encoding="utf-8")
    with pytest.raises(ValueError, match="not a dataset TOML"):
        musubi_cache.sizes(tmp_path / "dataset.toml")


# --- what others have written ---

DATASETS = {
    "not TOML": ("[general\n", "not a dataset TOML"),
    "nested": ("a = " + "[" * 50_000, "nested too deeply"),
    "dotted": ("a." * 200_000 + "b = 1", "nested too deeply"),
    "backslash": ('[[datasets]]\ncache_directory = "C:\\models\\x"', "single quotes"),
    "no datasets": ("[general]\n", r"no tables \[\[datasets\]\]"),
    "datasets a table": ("[datasets]\na = 1", r"no tables \[\[datasets\]\]"),
    "datasets of numbers": ("datasets = [1, 2]", r"no tables \[\[datasets\]\]"),
    "general a number": ("general = 1\ndatasets = []", r"no tables \[\[datasets\]\]"),
    "folder a number": ("[[datasets]]\ncache_directory = 5", "cache_directory = 5 is not a text"),
    "folder with a tab": ('[[datasets]]\ncache_directory = "C:\\temp"', r"cache_directory = .* holds the control character"),
    "folder empty": ('[[datasets]]\nimage_directory = ""', "image_directory = '' is empty"),
    "three sides": ("[[datasets]]\nresolution = [1, 2, 3]", r"resolution = \[1, 2, 3\] is not what musubi-tuner takes"),
    "a text": ('[[datasets]]\nresolution = "512"', "resolution = '512' is not what"),
    "beyond reason": (f"[[datasets]]\nresolution = {'9' * 4000}", "resolution = 999.*characters"),
    "negative": ("[[datasets]]\nresolution = [-1, 2]", "resolution = "),
    "frames a number": ("[[datasets]]\ntarget_frames = 5", "target_frames = 5 is not what .* a list"),
    "frames of texts": ('[[datasets]]\ntarget_frames = ["5"]', "target_frames = "),
}


@pytest.mark.parametrize(("text", "says"), DATASETS.values(), ids=DATASETS)
def test_a_dataset_toml_of_another_shape_is_named(tmp_path: Path, text: str, says: str):
    path = tmp_path / "dataset.toml"
    path.write_text(text, encoding="utf-8")
    for read in (musubi_cache.sizes, lambda path: musubi_cache.cached_items(path, WAN)):
        with pytest.raises(ValueError, match=f"musubi.dataset_config = .*dataset.toml: .*{says}") as caught:
            read(path)
        assert len(str(caught.value)) < 1000


def test_a_dataset_toml_as_it_should_be(tmp_path: Path):
    path = tmp_path / "dataset.toml"
    path.write_text("[[datasets]]\ncache_directory = 'C:\\temp'\nresolution = 512\ntarget_frames = [1, 25]", encoding="utf-8")
    assert musubi_cache.sizes(path) == (512, 25)
    assert musubi_cache.cache_folders(path) == [(Path("C:\\temp"), False)]


INSTRUCTION = "varlen_byg_instruction"
ENTRIES = {
    "no lengths": {f"{INSTRUCTION}_lengths_int64": None},
    "lengths of another count": {f"{INSTRUCTION}_lengths_int64": torch.tensor([1, 1])},
    "lengths of two dimensions": {f"{INSTRUCTION}_lengths_int64": torch.tensor([[1]])},
    "lengths as floats": {f"{INSTRUCTION}_lengths_int64": torch.tensor([2.0])},
    "lengths below 0": {f"{INSTRUCTION}_lengths_int64": torch.tensor([-1])},
    "lengths beyond the rows": {f"{INSTRUCTION}_lengths_int64": torch.tensor([10**12])},
    "three dimensions": {f"{INSTRUCTION}_umt5_bfloat16": torch.zeros(1, 2, WIDTH, dtype=torch.bfloat16)},
    "no width": {f"{INSTRUCTION}_umt5_bfloat16": torch.zeros(2, 0, dtype=torch.bfloat16)},
    "integers": {f"{INSTRUCTION}_umt5_bfloat16": torch.zeros(2, WIDTH, dtype=torch.int32)},
    "booleans": {f"{INSTRUCTION}_umt5_bfloat16": torch.zeros(2, WIDTH, dtype=torch.bool)},
    "no text": {f"{INSTRUCTION}_umt5_bfloat16": None},
    "two texts": {f"{INSTRUCTION}_umt5_float32": torch.zeros(2, WIDTH)},
}


@pytest.mark.parametrize("changes", ENTRIES.values(), ids=ENTRIES)
def test_cached_texts_of_another_shape_are_named_before_training(tmp_path: Path, changes: dict[str, Tensor | None]):
    dataset, tuples = write_dataset(tmp_path, ["a"]), [edit_tuple("a.png")]
    write_all(dataset, tuples)
    assert musubi_cache.check(dataset, WAN, tuples) == 1
    path = tmp_path / "cache" / "a_wan_te.safetensors"
    metadata = musubi_cache.header(path)
    save_file({name: value for name, value in (load_file(path) | changes).items() if value is not None}, path, metadata)
    with pytest.raises(ValueError, match=r"a_wan_te\.safetensors: .*instruction.*; remove it and run .*cache_text_encoder_outputs"):
        musubi_cache.check(dataset, WAN, tuples)


@pytest.mark.parametrize(
    "tensors",
    [
        {"latents_2x4x6_int32": torch.zeros(16, 2, 4, 6, dtype=torch.int32)},
        {"latents_2x4x6_bool": torch.zeros(16, 2, 4, 6, dtype=torch.bool)},
        {"latents_2x0x6_bfloat16": torch.zeros(16, 2, 0, 6).bfloat16()},
        {"latents_6_bfloat16": torch.zeros(4, 6).bfloat16()},
        {"other": torch.zeros(16, 2, 4, 6)},
        {},
    ],
    ids=["integers", "booleans", "empty", "flat", "other names", "nothing"],
)
def test_cached_latents_of_another_shape_are_named_before_training(tmp_path: Path, tensors: dict[str, Tensor]):
    dataset, tuples = write_dataset(tmp_path, ["a"]), [edit_tuple("a.png")]
    write_all(dataset, tuples)
    (path,) = (tmp_path / "cache").glob("*_0048x0032_wan.safetensors")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"a_0048x0032_wan\.safetensors: latents of .*cache the latents again"):
        musubi_cache.check(dataset, WAN, tuples)
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"a_0048x0032_wan\.safetensors: not a readable cache file"):
        musubi_cache.check(dataset, WAN, tuples)


def test_a_text_that_is_not_finite_is_named(tmp_path: Path):
    write_all(write_dataset(tmp_path, ["a"]), [edit_tuple("a.png")])
    path = tmp_path / "cache" / "a_wan_te.safetensors"
    tensors = load_file(path)
    tensors[f"{INSTRUCTION}_umt5_bfloat16"][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ValueError, match="a cached instruction holds NaN or infinite values: remove the host's text cache"):
        musubi_cache.texts_of_batch(collated([path]), 1, WAN, [0.0], 8)


# --- texts that keep their own lengths ---


@pytest.mark.parametrize(("family", "row"), [(QwenImageOnMusubi(), (WIDTH,)), (Krea2OnMusubi(), (2, WIDTH))], ids=["qwen", "krea2"])
def test_texts_of_their_own_lengths_have_a_mask(tmp_path: Path, family: MusubiFamily, row: tuple[int, ...]):
    paths = []
    for stem, length in (("a", 3), ("b", 5)):
        paths.append(tmp_path / f"{stem}_te.safetensors")
        encode = lambda text, length=length: {"qwen": torch.full((length, *row), float(length)).bfloat16()}  # noqa: E731
        musubi_cache.write_roles(Item(stem=stem, path=paths[-1]), [edit_tuple(f"{stem}.png")], encode, family, ENCODER)
        assert musubi_cache._wrong_entries(paths[-1], family, 1) is None
    found = musubi_cache.texts_of_batch(collated(paths), 2, family, [0.0, 0.0], 8)["instruction"]
    assert found["qwen"].shape == (2, 5, *row) and found["mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert (found["qwen"][0, 3:] == 0).all() and (found["qwen"][0, :3] == 3).all() and (found["qwen"][1] == 5).all()
    with pytest.raises(ValueError, match="max_text_tokens = 4, and a cached text has 5 tokens"):
        musubi_cache.texts_of_batch(collated(paths), 2, family, [0.0, 0.0], 4)
    other = Krea2OnMusubi() if len(row) == 1 else QwenImageOnMusubi()
    assert "is needed" in str(musubi_cache._wrong_entries(paths[0], other, 1)), "layers where there are none, or none where there are"
