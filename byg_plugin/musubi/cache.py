"""The four text roles of tuples in musubi-tuner's text cache files, beside what the host keeps there.

The host merges every tensor of an item's two cache files into its batches; a key that starts with `varlen_` comes as a list,
one entry an item. An item of the host is one source; it may have several tuples, whose texts lie one after another:

    varlen_byg_<role>_<part>_<dtype>     (sum of lengths, width), part = umt5 (Wan), t5 and pooled (FLUX), qwen; of Krea 2 with 12 layers
    varlen_byg_<role>_lengths_int64      (tuples,) rows of each tuple's text (of the first part)
    metadata byg.texts                   digest of the texts; a changed one is noticed before training

Imports nothing of the host.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from byg_plugin.config.fields import why_no_path
from byg_plugin.config.loading import shown
from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import EditTuple
from byg_plugin.documents import json_value, toml_table
from byg_plugin.finite import is_finite
from byg_plugin.lora.files import write_lora
from byg_plugin.musubi.family import Encoded, MusubiFamily
from byg_plugin.objectives.base import Text
from byg_plugin.texts import MASK, stack_texts
from byg_plugin.user_files import is_hidden

_PREFIX = "varlen_byg_"
TEXTS_KEY, ENCODER_KEY = "byg.texts", "byg.encoder"  # of the file's metadata
ENCODER_PARTS = "|"
_REMEDY = "run byg_plugin/cache_text_encoder_outputs.py with this configuration"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Item:
    """One item of the host's dataset: what it calls it, and its text cache file."""

    stem: str
    path: Path


def tuples_by_stem(tuples: Sequence[EditTuple]) -> dict[str, list[EditTuple]]:
    """Tuples by the name that the host knows their source by.

    Raises:
        ValueError: two sources have one name; the host's cache would mix them up.
    """
    found: dict[str, list[EditTuple]] = defaultdict(list)
    for item in tuples:
        others = found[item.source.stem]
        if others and others[0].source != item.source:
            raise ValueError(
                f"{others[0].source} and {item.source} have one name, by which musubi-tuner's cache tells its items apart: rename one"
            )
        others.append(item)
    return dict(found)


def matched(items: Sequence[Item], tuples: Sequence[EditTuple]) -> list[tuple[Item, list[EditTuple]]]:
    """Items with their tuples.

    Raises:
        ValueError: an item without a tuple, or a tuple without an item.
    """
    by_stem = tuples_by_stem(tuples)
    without = [item.stem for item in items if item.stem not in by_stem]
    if without:
        raise ValueError(
            f"{len(without)} of {len(items)} items of musubi.dataset_config have no tuple in dataset.tuples with a source of their name "
            f"({', '.join(without[:_SHOWN])}): add tuples (held-out ones do not count), or take them out of the host's dataset"
        )
    stems = {item.stem for item in items}
    lost = [stem for stem in by_stem if stem not in stems]
    if lost:
        raise ValueError(
            f"{len(lost)} of {len(by_stem)} sources of dataset.tuples are no items of musubi.dataset_config ({', '.join(lost[:_SHOWN])}): "
            "add them to the host's dataset, or take their tuples out"
        )
    return [(item, by_stem[item.stem]) for item in items]


def digest(tuples: Sequence[EditTuple]) -> str:
    """Identity of all texts of one item."""
    texts = [[getattr(item, role) for role in ROLES] for item in tuples]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def header(path: Path) -> dict[str, str]:
    """Metadata of a cache file; empty where there is none or it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return {}


def is_current(path: Path, tuples: Sequence[EditTuple], encoder: str) -> bool:
    """Whether a cache file has these texts by this encoder."""
    found = header(path)
    return found.get(TEXTS_KEY) == digest(tuples) and found.get(ENCODER_KEY) == encoder


def write_roles(item: Item, tuples: Sequence[EditTuple], encoding: Callable[[str], Encoded], family: MusubiFamily, encoder: str) -> None:
    """Add the roles to an item's file; the host's own tensors and metadata stay.

    Raises:
        ValueError: the file is of another architecture, or cannot be read or written.
    """
    tensors: dict[str, Tensor] = {}
    architecture = family.architecture[1]
    metadata = {"architecture": architecture, "caption1": "", "format_version": "1.0.1"}
    if item.path.is_file():
        try:
            with safe_open(item.path, framework="pt") as file:
                metadata |= file.metadata() or {}
                tensors = {key: file.get_tensor(key).clone() for key in file.keys() if not key.startswith(_PREFIX)}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{item.path}: not a readable cache file ({error}); remove it and cache the texts again") from error
        if metadata["architecture"] != architecture:
            raise ValueError(f"{item.path}: caches texts of {metadata['architecture']}, model.family needs {architecture}")
    for role in ROLES:
        encoded = [encoding(getattr(one, role)) for one in tuples]
        first = family.text_parts[0]
        tensors[f"{_PREFIX}{role}_lengths_int64"] = torch.tensor([len(one[first]) for one in encoded])
        for part in family.text_parts:
            value = torch.cat([one[part] for one in encoded]).cpu()
            tensors[f"{_PREFIX}{role}_{part}_{str(value.dtype).removeprefix('torch.')}"] = value
    item.path.parent.mkdir(parents=True, exist_ok=True)
    write_lora(item.path, tensors, {**metadata, TEXTS_KEY: digest(tuples), ENCODER_KEY: encoder})


def texts_of_batch(batch: Mapping[str, Any], size: int, family: MusubiFamily, choice: Sequence[float], tokens: int) -> dict[str, Text]:
    """The four roles of a batch of the host.

    Args:
        batch: as the host collates it.
        size: its items.
        family: whose texts.
        choice: a number in [0, 1) for each item: which of its tuples is taken.
        tokens: a text is filled up to so many, must have as many, or at most as many (`family.padding`).

    Raises:
        ValueError: a role is missing on an item, or encoded otherwise than `tokens` says.
    """
    found: dict[str, Text] = {}
    for role in ROLES:
        lengths = _list(batch, role, "lengths", size)
        named: dict[str, Tensor] = {}
        for part in family.text_parts:
            rows = _list(batch, role, part, size)
            chosen = [
                _one(row, length.tolist(), number, part == "pooled") for row, length, number in zip(rows, lengths, choice, strict=True)
            ]
            named |= {part: torch.cat(chosen)} if part == "pooled" else _batch(chosen, part, tokens, family)
            if not is_finite(named[part]):
                raise ValueError(f"a cached {role} holds NaN or infinite values: remove the host's text cache and {_REMEDY}")
        found[role] = named
    return found


def _list(batch: Mapping[str, Any], role: str, part: str, size: int) -> list[Tensor]:
    """One entry an item. The host leaves out what an item lacks: a shorter list would give items each other's texts."""
    values = batch.get(f"byg_{role}_{part}", [])
    if len(values) != size:
        raise ValueError(f"{role} is not cached for {size - len(values)} of {size} items of a batch: {_REMEDY}")
    return list(values)


def _one(rows: Tensor, lengths: Sequence[int], number: float, pooled: bool) -> Tensor:
    index = min(int(number * len(lengths)), len(lengths) - 1)
    if pooled:
        return rows[index : index + 1]
    first = sum(lengths[:index])
    return rows[first : first + lengths[index]]


def _batch(texts: Sequence[Tensor], part: str, tokens: int, family: MusubiFamily) -> dict[str, Tensor]:
    for text in texts:
        if len(text) > tokens or (family.padding == "none" and len(text) != tokens):
            raise ValueError(
                f"conditioning.max_text_tokens = {tokens}, and a cached text has {len(text)} tokens: set it to what was cached"
            )
    if family.padding == "masked":
        return stack_texts([{part: text, MASK: text.new_ones(len(text), dtype=torch.bool)} for text in texts])
    return {part: torch.stack([torch.cat([text, text.new_zeros(tokens - len(text), *text.shape[1:])]) for text in texts])}


# --- before training ---


def check(dataset_config: Path, family: MusubiFamily, tuples: Sequence[EditTuple], encoder: Sequence[str | None] = ()) -> int:
    """Look at the host's cache files; returns how many items will be trained on.

    Args:
        dataset_config: the host's dataset TOML.
        family: of the host's model.
        tuples: to be trained on.
        encoder: the parts of the encoder's identity, None where one is unknown; empty: it is not looked at.

    Raises:
        ValueError: latents or roles are not cached, texts or their encoder have changed, or items and tuples do not match.
    """
    items = latents_of(dataset_config, family)
    for path, _ in _latent_files(dataset_config, family):
        if why := _wrong_latents(path):
            raise ValueError(f"{path}: {why}; remove it and cache the latents again with the host's script")
    stale, missing, otherwise = [], [], []
    for item, texts in matched(items, tuples):
        metadata = header(item.path)
        found = metadata.get(TEXTS_KEY)
        if found is None:
            missing.append(item.stem)
        elif found != digest(texts):
            stale.append(item.stem)
        elif encoder and not _same_encoder(metadata.get(ENCODER_KEY, ""), encoder):
            otherwise.append(item.stem)
        elif why := _wrong_entries(item.path, family, len(texts)):
            raise ValueError(f"{item.path}: {why}; remove it and {_REMEDY}")
    complaints = [
        f"{len(names)} of {len(items)} items {what} ({', '.join(names[:_SHOWN])})"
        for names, what in (
            (missing, "have no cached texts"),
            (stale, "have texts that have changed since they were cached"),
            (otherwise, "have texts by another text encoder, its fp8 option or another conditioning.max_text_tokens"),
        )
        if names
    ]
    if complaints:
        raise ValueError(f"{'; '.join(complaints)}: {_REMEDY}")
    return len(items)


def _same_encoder(cached: str, encoder: Sequence[str | None]) -> bool:
    parts = cached.split(ENCODER_PARTS)
    return len(parts) == len(encoder) and all(asked in (None, part) for part, asked in zip(parts, encoder, strict=True))


def _wrong_entries(path: Path, family: MusubiFamily, count: int) -> str | None:
    """What is wrong with the roles in a text cache file of `count` tuples, by its header and the lengths; None: nothing."""
    with safe_open(path, framework="pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        for role in ROLES:
            lengths = f"{_PREFIX}{role}_lengths_int64"
            if shapes.get(lengths) != [count]:
                return f"{lengths} has shape {shapes.get(lengths)}, and there are {count} tuples"
            counted = file.get_tensor(lengths)
            if counted.dtype != torch.int64 or not bool((counted > 0).all()):
                return f"{lengths} = {shown(counted.tolist())} are no lengths of texts"
            rows = int(counted.sum())
            for part in family.text_parts:
                names = [key for key in shapes if key.startswith(f"{_PREFIX}{role}_{part}_")]
                wanted, dims = (count, 2) if part == "pooled" else (rows, family.text_dims)
                if not names:
                    return f"{role} is not cached: it has no {part}"
                needed = f"({wanted}, {'layers, ' * (dims - 2)}width)"
                if len(names) != 1 or len(shape := shapes[names[0]]) != dims or shape[0] != wanted or not all(shape):
                    return f"{role} has {part} of shape {[shapes[name] for name in names]}, {needed} is needed"
                if file.get_slice(names[0]).get_dtype() not in _FLOATS:
                    return f"{names[0]} holds no floating-point numbers"
    return None


def latents_of(dataset_config: Path, family: MusubiFamily) -> list[Item]:
    """`cached_items`, of which there must be some, those of one name being one picture or clip.

    Raises:
        ValueError: there are none, or two that lie in different folders have one name.
    """
    items = cached_items(dataset_config, family)
    if not items:
        raise ValueError(
            f"musubi.dataset_config = {dataset_config}: no cached latents for {family.architecture[1]}; run the host's "
            f"{family.latents_script} first"
        )
    _refuse_namesakes(dataset_config, items)
    return items


def _refuse_namesakes(dataset_config: Path, items: Sequence[Item]) -> None:
    """One folder may be in several datasets (resolutions). A file of the same name in another one would get the first one's texts."""
    by_cache: dict[Path, dict[Path, set[str]]] = defaultdict(dict)
    for dataset in datasets(dataset_config):
        by_cache[cache_folder(dataset, dataset_config)[0]] |= _media_of(dataset)
    places: dict[str, set[Path]] = defaultdict(set)
    for item in items:
        media = by_cache[item.path.parent]
        # A cache may be of several folders, and its items' media gone: then it is not known whose they are.
        found = {folder for folder, stems in media.items() if item.stem in stems}
        places[item.stem] |= found or (set(media) if len(media) == 1 else set())
        if len(places[item.stem]) > 1:
            raise ValueError(
                f"musubi.dataset_config = {dataset_config}: {' and '.join(sorted(map(str, places[item.stem])))} both have an item called "
                f"{item.stem}, and a tuple's texts go by that name: rename one, and cache its latents again"
            )


def _media_of(dataset: Mapping[str, Any]) -> dict[Path, set[str]]:
    """Folders of a dataset's images or clips, with the names in them; what cannot be read has none, the host tells."""
    for key in ("video_directory", "image_directory"):
        if key in dataset:
            folder = Path(dataset[key])
            names = folder.iterdir() if folder.is_dir() else ()
            return {folder.resolve(): {path.stem for path in names if path.suffix.lower() not in _NO_MEDIA}}
    found: dict[Path, set[str]] = defaultdict(set)
    for kind in ("video", "image"):
        for path in _listed(dataset.get(f"{kind}_jsonl_file"), f"{kind}_path"):
            found[path.parent.resolve()].add(path.stem)
    return found


_NO_MEDIA = (".txt", ".caption", ".json", ".jsonl", ".safetensors")


def _listed(file: Any, key: str) -> Iterator[Path]:
    """Paths that a JSONL file of the host lists."""
    if not isinstance(file, str):
        return
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        listed = [json_value(line) for line in lines if line.strip()]
    except (OSError, ValueError):
        return
    yield from (Path(one[key]) for one in listed if isinstance(one, dict) and isinstance(one.get(key), str))


def cached_items(dataset_config: Path, family: MusubiFamily) -> list[Item]:
    """The items whose latents are cached, by the host's naming of files; of a clip cut in several places, once."""
    return list({item.path: item for _, item in _latent_files(dataset_config, family)}.values())


def _latent_files(dataset_config: Path, family: MusubiFamily) -> Iterator[tuple[Path, Item]]:
    name = family.architecture[0]
    for folder, is_video in cache_folders(dataset_config):
        window = r"_\d+-\d+(?:-\d+)?" if is_video else ""
        pattern = re.compile(rf"(.+){window}_\d+x\d+_{name}\.safetensors")
        for path in sorted(folder.glob(f"*_{name}.safetensors")):
            if not is_hidden(path.name) and (match := pattern.fullmatch(path.name)):
                text = folder / f"{match[1]}_{name}_te.safetensors"
                yield path, Item(stem=match[1], path=text)


def _wrong_latents(path: Path) -> str | None:
    """What is wrong with a latent cache file, by its header; None: nothing."""
    try:
        with safe_open(path, framework="pt") as file:
            kept = [file.get_slice(key) for key in file.keys() if key.startswith("latents_")]  # noqa: SIM118
            found = [(one.get_dtype(), one.get_shape()) for one in kept]
    except (OSError, SafetensorError) as error:
        return f"not a readable cache file ({error})"
    if not found or any(dtype not in _FLOATS or len(shape) < 3 or not all(shape) for dtype, shape in found):
        return f"latents of {found or 'no name that the host gives them'}, and (channels, frames, height, width) in 16 or 32 bit are needed"
    return None


_FLOATS = ("F32", "F16", "BF16")


def cache_folders(dataset_config: Path) -> list[tuple[Path, bool]]:
    """(folder, whether of clips) of each of the host's datasets."""
    return [cache_folder(dataset, dataset_config) for dataset in datasets(dataset_config)]


def cache_folder(dataset: Mapping[str, Any], dataset_config: Path) -> tuple[Path, bool]:
    """(folder, whether of clips) of one of the host's datasets.

    Raises:
        ValueError: it has none.
    """
    is_video = "video_directory" in dataset or "video_jsonl_file" in dataset
    media = dataset.get("video_directory" if is_video else "image_directory")
    folder = dataset.get("cache_directory", media)
    if folder is None:
        raise ValueError(
            f"musubi.dataset_config = {dataset_config}: a dataset has no cache_directory, which the host needs with a jsonl file"
        )
    return Path(folder), is_video


def datasets(dataset_config: Path) -> list[dict[str, Any]]:
    """The datasets of the host's TOML, each with what [general] says.

    Raises:
        ValueError: not readable as such.
    """
    try:
        raw = toml_table(dataset_config.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"musubi.dataset_config = {dataset_config}: not a dataset TOML of musubi-tuner: {error}") from error
    general, listed = raw.get("general", {}), raw.get("datasets")
    if not isinstance(general, dict) or not isinstance(listed, list) or not all(isinstance(dataset, dict) for dataset in listed):
        raise ValueError(f"musubi.dataset_config = {dataset_config}: not a dataset TOML of musubi-tuner: it has no tables [[datasets]]")
    found = [{**general, **dataset} for dataset in listed]
    for dataset in found:
        if why := _wrong(dataset):
            raise ValueError(f"musubi.dataset_config = {dataset_config}: {why}")
    return found


def _wrong(dataset: Mapping[str, Any]) -> str | None:
    """What is wrong with the keys of a dataset that are read here; the host reads the others."""
    for key in ("cache_directory", "image_directory", "video_directory"):
        if key in dataset and (why := why_no_path(dataset[key]) if isinstance(dataset[key], str) else "is not a text"):
            return f"{key} = {shown(dataset[key])} {why}"
    for key, sizes in (("resolution", (2,)), ("target_frames", range(1, _MOST_LENGTHS))):
        value = dataset.get(key, [1, 1])
        several = [value, value] if key == "resolution" and not isinstance(value, list) else value
        if not isinstance(several, list) or len(several) not in sizes or not all(_is_count(one) for one in several):
            return f"{key} = {shown(value)} is not what musubi-tuner takes there: {_MEANT[key]}"
    return None


_MOST_LENGTHS = 1000
_MEANT = {"resolution": "[width, height] or one number, up to 65,536 pixels", "target_frames": "a list of numbers of frames"}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 65_536


def sizes(dataset_config: Path) -> tuple[int, int]:
    """(side of the square with as many pixels, most frames) of what is trained on: for the LoRA's metadata."""
    side, frames = 0.0, 1
    for dataset in datasets(dataset_config):
        resolution = dataset.get("resolution", [960, 544])
        width, height = resolution if isinstance(resolution, list) else (resolution, resolution)
        side = max(side, (width * height) ** 0.5)
        frames = max([frames, *dataset.get("target_frames", [])])
    return round(side), frames
