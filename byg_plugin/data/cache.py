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
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm.auto import tqdm

from byg_plugin.data import buckets, media
from byg_plugin.data.tuples import TEXTS, EditTuple
from byg_plugin.models.base import Family
from byg_plugin.training.config import Config

PREPROCESSING = "1"  # raise when load_image, crop_to_bucket or to_tensor give other pixels
_SHOWN = 10
_KEY = re.compile(r"[0-9a-f]{64}")
_PARTIAL = ".partial-"
# Two changes of a file within the clock tick of its file system (2 s on FAT) bear one time: a hash is trusted by time only
# when the file was older than that when it was hashed.
_SETTLED_NS = 2_000_000_000
T = TypeVar("T")


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside it, synced, renamed.

    Raises:
        ValueError: the disk is full or not writable.
    """
    partial = path.with_name(f"{_PARTIAL}{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ValueError(
            f"dataset.cache_dir: {path.parent} cannot be written: {error.strerror or error}; what is cached already is intact, "
            f"make room or choose another folder and run the same command again"
        ) from error


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
        """Write an entry atomically.

        Raises:
            ValueError: the disk is full or not writable.
        """
        _write(self.path(key), save({name: value.contiguous().clone() for name, value in tensors.items()}))

    def read(self, key: str) -> dict[str, Tensor]:
        """An entry's tensors.

        Raises:
            ValueError: it has gone or was damaged since it was checked.
        """
        try:
            return load_file(self.path(key))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path(key)}: a cached entry that was whole is not any more ({error}); run the caching again") from error

    def count(self) -> int:
        """How many entries there are, of whatever model and content."""
        return sum(1 for path in self.folder.glob("*.safetensors") if _KEY.fullmatch(path.stem))

    def prune(self, keep: Iterable[str]) -> int:
        """Remove entries (files of our naming only) that are not in `keep`, and what killed runs left; returns how many."""
        wanted = set(keep)
        unused = [p for p in self.folder.glob("*.safetensors") if _KEY.fullmatch(p.stem) and p.stem not in wanted]
        unused += self.folder.glob(f"{_PARTIAL}*.safetensors-*")
        for path in unused:
            path.unlink()
        return len(unused)


@dataclass
class ImageFiles:
    """Content hashes and sizes of images, remembered by (path, bytes, time of change)."""

    path: Path
    known: dict[str, list[Any]] = field(default_factory=dict)
    seen: dict[str, tuple[str, buckets.Size]] = field(default_factory=dict)
    """What this run has looked at: one answer for the whole of it."""

    @classmethod
    def load(cls, cache_dir: Path) -> ImageFiles:
        """Read what is remembered; a damaged file is forgotten (it only saves time)."""
        path = cache_dir / "files.json"
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return cls(path)
        if not isinstance(known, dict):
            return cls(path)
        return cls(path, {name: entry for name, entry in known.items() if isinstance(entry, list) and len(entry) == 5})

    def look(self, image: Path) -> tuple[str, buckets.Size]:
        """(content hash, (width, height)) of an image.

        Raises:
            ValueError: it cannot be read.
        """
        name = str(image.absolute())
        if name not in self.seen:
            self.seen[name] = self._look(image, name)
        return self.seen[name]

    def _look(self, image: Path, name: str) -> tuple[str, buckets.Size]:
        try:
            stat = image.stat()
            remembered = self.known.get(name)
            if remembered and remembered[:2] == [stat.st_size, stat.st_mtime_ns]:
                return remembered[2], (remembered[3], remembered[4])
            settled = time.time_ns() - stat.st_mtime_ns > _SETTLED_NS
            width, height = media.image_size(image)
            with open(image, "rb") as file:
                digest = _file_digest(file)
        except OSError as error:
            raise ValueError(f"{image}: {error.strerror}; replace it or remove its tuples") from error
        self.known[name] = [stat.st_size, stat.st_mtime_ns if settled else -1, digest, width, height]
        return digest, (width, height)

    def changed(self, image: Path) -> bool:
        """Whether the file is no longer what `look` saw in this run."""
        with open(image, "rb") as file:
            return _file_digest(file) != self.look(image)[0]

    def save(self) -> None:
        """Write atomically.

        Raises:
            ValueError: the disk is full or not writable.
        """
        _write(self.path, json.dumps(self.known).encode())


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
    frame: buckets.Size
    """Size of the source, whose relative crop is taken."""
    key: str
    small: bool
    """Too small for a bucket of the asked resolution."""


class Keys:
    """Keys of what a configuration needs. Loads no model."""

    def __init__(self, config: Config, family: Family):
        self.config, self.family = config, family
        self.files = ImageFiles.load(Path(config.dataset.cache_dir))
        self._multiple = family.pixel_multiple()
        buckets.bucket_step(config.dataset, self._multiple)

    # Each when it is needed: latents can be cached before there are text encoders.
    @cached_property
    def _vae(self) -> str:
        return self.family.fingerprint("vae")

    @cached_property
    def _text(self) -> str:
        return self.family.fingerprint("text")

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
        return Picture(file=item.source, bucket=bucket, frame=size, key=self._latent_key(digest, bucket), small=small)

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
            bucket = f"{source.bucket[0]} x {source.bucket[1]}"
            raise ValueError(
                f"{item.target}: {size[0]} x {size[1]} pixels would be scaled up to its source's bucket of {bucket}; use a larger target, "
                f"a smaller source or a lower dataset.resolution"
            )
        frame = (width, height)
        key = self._latent_key(digest, source.bucket, *([f"{width}x{height}"] if size != frame else []))
        return Picture(file=item.target, bucket=source.bucket, frame=frame, key=key, small=source.small)

    def text(self, text: str) -> str:
        """The key of a text's encoding."""
        return _sha("text", text, self._text)

    def _latent_key(self, digest: str, bucket: buckets.Size, *crop: str) -> str:
        return _sha("latent", digest, self._vae, f"{bucket[0]}x{bucket[1]}", *crop, PREPROCESSING)


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
    cut: tuple[str, ...] = ()
    """Texts encoded in this run that are longer than the family takes."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among several; `gather` concatenates lists over all of them, on each of them."""

    rank: int = 0
    world: int = 1
    gather: Callable[[list[Any]], list[Any]] = lambda values: values


class UnusableImages(ValueError):
    """Images that cannot be cached, the same list on every process; all others are cached."""


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
        UnusableImages: lists the images that cannot be used, after all others are cached.
        ValueError: the cache folder cannot be written.
    """
    processes = processes or Processes()
    keys, store = Keys(config, family), latent_store(config)
    pictures: dict[str, Picture] = {}
    problems: dict[str, None] = {}
    try:
        _look_at_all(keys.files, tuples, processes)
    finally:
        if processes.rank == 0:  # interrupted too: hashing a large set takes long
            keys.files.save()
    for item in tuples:
        for look in (keys.source, *([keys.target] if item.target else [])):
            try:
                picture = look(item)
            except ValueError as error:
                problems.setdefault(str(error))
                continue
            pictures.setdefault(picture.key, picture)
    todo = [picture for picture in pictures.values() if not store.has(picture.key)]
    processes.gather([])  # nobody writes before everybody has looked, or the shares would differ
    todo.sort(key=lambda picture: (picture.bucket, picture.key))
    mine = todo[processes.rank :: processes.world]
    failed: list[str] = []
    if mine:
        vae = family.load_vae(device)
        with tqdm(total=len(mine), desc="encode images", unit="image", disable=processes.rank > 0) as bar:
            for group in _groups(mine, config.dataset.cache_batch_size, lambda picture: picture.bucket):
                failed += _encode_pictures(family, vae, device, keys.files, store, group)
                bar.update(len(group))
    failed = processes.gather(failed)
    pruned = store.prune(pictures) if prune and processes.rank == 0 and not failed and not problems else 0
    _raise_problems([*problems, *failed], len(todo) - len(failed))
    return Summary(encoded=len(todo), kept=len(pictures) - len(todo), small=sum(p.small for p in pictures.values()), pruned=pruned)


def _look_at_all(files: ImageFiles, tuples: Sequence[EditTuple], processes: Processes) -> None:
    """Hash every image that is not remembered, each in one process, and tell the others.

    What cannot be read stays unknown; who asks for it again gets the error.
    """
    paths = list(dict.fromkeys(path for item in tuples for path in (item.source, item.target) if path))
    for path in tqdm(paths[processes.rank :: processes.world], desc="look at images", unit="image", disable=processes.rank > 0):
        with suppress(ValueError):
            files.look(path)
    for known, seen in processes.gather([(files.known, files.seen)]):
        files.known |= known
        files.seen |= seen


def _encode_pictures(
    family: Family, vae: Any, device: torch.device, files: ImageFiles, store: Store, group: Sequence[Picture]
) -> list[str]:
    """Encode pictures of one bucket; returns the problems of those that cannot be read."""
    problems, good, pixels = [], [], []
    for picture in group:
        try:
            image = media.load_image(picture.file)
            if files.changed(picture.file):  # its key is the old content's: the entry would be wrong for ever
                raise ValueError(f"{picture.file}: was changed while it was being cached; run the same command again")
        except ValueError as error:
            problems.append(str(error))
            continue
        good.append(picture)
        pixels.append(buckets.to_tensor(buckets.crop_to_bucket(image, picture.bucket, picture.frame)))
    if good:
        with _memory_advice(len(good)):
            latents = family.encode_pixels(vae, torch.stack(pixels).unsqueeze(2).to(device)).float().cpu()
        for picture, latent in zip(good, latents, strict=True):
            if latent.isfinite().all():
                store.write(picture.key, {"latents": latent})
            else:
                problems.append(f"{picture.file}: its latents are not finite; is model.vae the right file?")
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
    """Encode every text that is not cached, identical ones once; this process takes its share.

    Raises:
        ValueError: the cache folder cannot be written, or an encoding is not finite.
    """
    processes = processes or Processes()
    keys, store = Keys(config, family), text_store(config)
    by_key = {keys.text(text): text for text in texts_of(tuples)}
    todo = sorted(key for key in by_key if not store.has(key))
    processes.gather([])
    mine = todo[processes.rank :: processes.world]
    cut: list[str] = []
    if mine:
        encoders = family.load_text_encoders(device)
        with tqdm(total=len(mine), desc="encode texts", unit="text", disable=processes.rank > 0) as bar:
            for group in _groups(mine, config.dataset.cache_batch_size, lambda key: None):
                texts = [by_key[key] for key in group]
                with _memory_advice(len(group)):
                    encoded = family.encode_texts(encoders, texts)
                if not all(value.isfinite().all() for value in encoded.values()):
                    raise ValueError(
                        f"model.dtype = {config.model.dtype!r}: the encoding of {by_key[group[0]]!r} or of the {len(group) - 1} after it "
                        f"is not finite; T5 overflows in float16, set model.dtype = 'bfloat16'"
                    )
                for index, key in enumerate(group):
                    store.write(key, {name: value[index] for name, value in encoded.items()})
                cut += [text for text, longer in zip(texts, family.longer_than_limit(encoders, texts), strict=True) if longer]
                bar.update(len(group))
    cut = processes.gather(cut)
    pruned = store.prune(by_key) if prune and processes.rank == 0 else 0
    return Summary(encoded=len(todo), kept=len(by_key) - len(todo), pruned=pruned, cut=tuple(cut))


@contextmanager
def _memory_advice(batch: int) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        remedy = "lower dataset.cache_batch_size" if batch > 1 else 'lower dataset.resolution, or set model.device = "cpu"'
        raise ValueError(f"out of GPU memory with {batch} encoded at once; {remedy}; what is cached already is kept") from error


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


def _raise_problems(problems: Sequence[str], cached: int) -> None:
    if problems:
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listed = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN])
        raise UnusableImages(
            f"{len(problems)} image(s) of dataset.tuples cannot be used (the others are cached, {cached} new):\n{listed}{more}"
        )
