"""Content-addressed caches of latents and text encodings.

The name of an entry is a hash of everything it depends on: the picture's (or text's) content, the model's weights, the
preprocessing. So a changed image, caption, model or resolution asks for another entry and nothing else is encoded
again; an entry is never wrong, only absent. Entries are written beside and renamed: a kill leaves whole entries only.

    <cache_dir>/latents/<key>.safetensors   {"latents": (C, F, H, W) float32}
    <cache_dir>/texts/<key>.safetensors     the family's named tensors without batch, in the encoder's dtype
    <cache_dir>/files.json                  content hash and size of each image by path, size and time of change
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from byg_plugin.data import buckets, media
from byg_plugin.data.tuples import TEXTS, EditTuple
from byg_plugin.models.base import Family
from byg_plugin.training.config import Config

PREPROCESSING = "1"  # raise when load_image, crop_to_bucket or to_tensor give other pixels
_SHOWN = 10
T = TypeVar("T")


class Store:
    """A folder of safetensors entries by key."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where an entry lies."""
        return self.folder / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether a whole entry is there; one that was cut off from outside counts as absent."""
        path = self.path(key)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                return len(list(file.keys())) > 0
        except (SafetensorError, OSError):
            return False

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".partial-{key}-{os.getpid()}"
        try:
            save_file({name: value.contiguous().clone() for name, value in tensors.items()}, partial)
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, self.path(key))
        finally:
            partial.unlink(missing_ok=True)

    def read(self, key: str) -> dict[str, Tensor]:
        """An entry's tensors."""
        return load_file(self.path(key))

    def prune(self, keep: Iterable[str]) -> int:
        """Remove entries (files of our naming only) that are not in `keep`; returns how many."""
        wanted, removed = set(keep), 0
        for path in self.folder.glob("*.safetensors"):
            key = path.stem
            if len(key) == 64 and set(key) <= set("0123456789abcdef") and key not in wanted:
                path.unlink()
                removed += 1
        return removed


@dataclass
class ImageFiles:
    """Content hashes and sizes of images, remembered by (path, bytes, time of change)."""

    path: Path
    known: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, cache_dir: Path) -> ImageFiles:
        """Read what is remembered; a damaged file is forgotten (it only saves time)."""
        path = cache_dir / "files.json"
        try:
            return cls(path, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, json.JSONDecodeError):
            return cls(path)

    def look(self, image: Path) -> tuple[str, buckets.Size]:
        """(content hash, (width, height)) of an image.

        Raises:
            ValueError: it cannot be read.
        """
        name = str(image.resolve())
        try:
            stat = image.stat()
        except OSError as error:
            raise ValueError(f"{image}: {error.strerror}") from error
        remembered = self.known.get(name)
        if remembered and remembered[:2] == [stat.st_size, stat.st_mtime_ns]:
            return remembered[2], (remembered[3], remembered[4])
        width, height = media.image_size(image)
        with open(image, "rb") as file:
            digest = _file_digest(file)
        self.known[name] = [stat.st_size, stat.st_mtime_ns, digest, width, height]
        return digest, (width, height)

    def save(self) -> None:
        """Write atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".partial-{self.path.name}-{os.getpid()}")
        partial.write_text(json.dumps(self.known), encoding="utf-8")
        os.replace(partial, self.path)


def _file_digest(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image to encode: the file, its bucket and its key."""

    file: Path
    bucket: buckets.Size
    key: str
    small: bool
    """Too small for a bucket of the asked resolution."""


class Keys:
    """Keys of what a configuration needs. Loads no model."""

    def __init__(self, config: Config, family: Family):
        self.config, self.family = config, family
        self.files = ImageFiles.load(Path(config.dataset.cache_dir))
        self._vae = family.fingerprint("vae")
        self._text = family.fingerprint("text")
        self._multiple = family.pixel_multiple()
        buckets.bucket_step(config.dataset, self._multiple)

    def source(self, item: EditTuple) -> Picture:
        """The source's entry.

        Raises:
            ValueError: the image cannot be used.
        """
        digest, size = self.files.look(item.source)
        try:
            bucket = buckets.bucket_for(size, self.config.dataset, self._multiple)
        except ValueError as error:
            raise ValueError(f"{item.source}: {error}") from error
        small = buckets.is_below_resolution(bucket, self.config.dataset, self._multiple)
        return Picture(file=item.source, bucket=bucket, key=self._latent_key(digest, bucket), small=small)

    def target(self, item: EditTuple) -> Picture:
        """The target's entry: in the source's bucket, cropped the same way.

        Raises:
            ValueError: the image cannot be used, or its shape is not the source's.
        """
        assert item.target is not None
        source = self.source(item)
        _, (width, height) = self.files.look(item.source)
        digest, size = self.files.look(item.target)
        # Half a per cent: what rounding in an image editor makes.
        if abs(size[0] * height - size[1] * width) > 0.005 * size[0] * height + max(width, height):
            raise ValueError(
                f"{item.target}: {size[0]} x {size[1]} has another shape than its source {item.source.name} ({width} x {height}); "
                f"a target shows the same frame"
            )
        if size[0] < source.bucket[0] or size[1] < source.bucket[1]:
            raise ValueError(
                f"{item.target}: {size[0]} x {size[1]} is smaller than its source's bucket {source.bucket}; it is not scaled up"
            )
        return Picture(file=item.target, bucket=source.bucket, key=self._latent_key(digest, source.bucket), small=source.small)

    def text(self, text: str) -> str:
        """The key of a text's encoding."""
        return _sha("text", text, self._text)

    def _latent_key(self, digest: str, bucket: buckets.Size) -> str:
        return _sha("latent", digest, self._vae, f"{bucket[0]}x{bucket[1]}", PREPROCESSING)


def _sha(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def latent_store(config: Config) -> Store:
    """Where latents lie."""
    return Store(Path(config.dataset.cache_dir) / "latents")


def text_store(config: Config) -> Store:
    """Where text encodings lie."""
    return Store(Path(config.dataset.cache_dir) / "texts")


def texts_of(tuples: Sequence[EditTuple]) -> list[str]:
    """All texts, each once, in order of appearance."""
    return list(dict.fromkeys(getattr(item, role) for item in tuples for role in TEXTS))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a caching run did, over all processes."""

    encoded: int
    kept: int
    small: int = 0
    pruned: int = 0


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among several; `gather` concatenates lists over all of them, on each of them."""

    rank: int = 0
    world: int = 1
    gather: Callable[[list[Any]], list[Any]] = lambda values: values


def cache_latents(
    config: Config,
    family: Family,
    tuples: Sequence[EditTuple],
    device: torch.device,
    processes: Processes | None = None,
    *,
    prune: bool = False,
) -> Summary:
    """Encode every source (and target) that is not cached; this process takes its share.

    Raises:
        ValueError: lists the images that cannot be used, after all others are cached.
    """
    processes = processes or Processes()
    keys, store = Keys(config, family), latent_store(config)
    pictures: dict[str, Picture] = {}
    problems: dict[str, None] = {}
    for item in tqdm(tuples, desc="look at images", disable=processes.rank > 0):
        for look in (keys.source, *([keys.target] if item.target else [])):
            try:
                picture = look(item)
            except ValueError as error:
                problems.setdefault(str(error))
                continue
            pictures.setdefault(picture.key, picture)
    if processes.rank == 0:
        keys.files.save()
    todo = [picture for picture in pictures.values() if not store.has(picture.key)]
    processes.gather([])  # nobody writes before everybody has looked, or the shares would differ
    todo.sort(key=lambda picture: (picture.bucket, picture.key))
    mine = todo[processes.rank :: processes.world]
    failed: list[str] = []
    if mine:
        vae = family.load_vae(device)
        with tqdm(total=len(mine), desc="encode images", unit="image", disable=processes.rank > 0) as bar:
            for group in _groups(mine, config.dataset.cache_batch_size, lambda picture: picture.bucket):
                failed += _encode_pictures(family, vae, device, store, group)
                bar.update(len(group))
    failed = processes.gather(failed)
    pruned = store.prune(pictures) if prune and processes.rank == 0 and not failed and not problems else 0
    _raise_problems([*problems, *failed], len(todo) - len(failed), "images", "dataset.tuples")
    return Summary(encoded=len(todo), kept=len(pictures) - len(todo), small=sum(p.small for p in pictures.values()), pruned=pruned)


def _encode_pictures(family: Family, vae: Any, device: torch.device, store: Store, group: Sequence[Picture]) -> list[str]:
    """Encode pictures of one bucket; returns the problems of those that cannot be read."""
    problems, good, pixels = [], [], []
    for picture in group:
        try:
            image = media.load_image(picture.file)
        except ValueError as error:
            problems.append(str(error))
            continue
        good.append(picture)
        pixels.append(buckets.to_tensor(buckets.crop_to_bucket(image, picture.bucket)))
    if good:
        latents = family.encode_pixels(vae, torch.stack(pixels).unsqueeze(2).to(device)).float().cpu()
        for picture, latent in zip(good, latents, strict=True):
            store.write(picture.key, {"latents": latent})
    return problems


def cache_texts(
    config: Config,
    family: Family,
    tuples: Sequence[EditTuple],
    device: torch.device,
    processes: Processes | None = None,
    *,
    prune: bool = False,
) -> Summary:
    """Encode every text that is not cached, identical ones once; this process takes its share."""
    processes = processes or Processes()
    keys, store = Keys(config, family), text_store(config)
    by_key = {keys.text(text): text for text in texts_of(tuples)}
    todo = sorted(key for key in by_key if not store.has(key))
    processes.gather([])
    mine = todo[processes.rank :: processes.world]
    if mine:
        encoders = family.load_text_encoders(device)
        with tqdm(total=len(mine), desc="encode texts", unit="text", disable=processes.rank > 0) as bar:
            for group in _groups(mine, config.dataset.cache_batch_size, lambda key: None):
                encoded = family.encode_texts(encoders, [by_key[key] for key in group])
                for index, key in enumerate(group):
                    store.write(key, {name: value[index] for name, value in encoded.items()})
                bar.update(len(group))
    processes.gather([])
    pruned = store.prune(by_key) if prune and processes.rank == 0 else 0
    return Summary(encoded=len(todo), kept=len(by_key) - len(todo), pruned=pruned)


def _groups(items: Sequence[T], size: int, kind: Callable[[T], Any]) -> Iterable[list[T]]:
    """Runs of at most `size` neighbours of one kind."""
    group: list[T] = []
    for item in items:
        if group and (len(group) == size or kind(group[0]) != kind(item)):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _raise_problems(problems: Sequence[str], cached: int, what: str, where: str) -> None:
    if problems:
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listed = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN])
        raise ValueError(f"{len(problems)} {what} of {where} cannot be used (the others, {cached} new, are cached):\n{listed}{more}")
