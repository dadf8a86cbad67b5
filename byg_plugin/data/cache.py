"""Content-addressed caches of latents and text encodings.

The name of an entry is a hash of everything it depends on: the picture's (or text's) content, the model's weights, the
preprocessing. So a changed image, caption, model or resolution asks for another entry and nothing else is encoded
again; an entry is never wrong, only absent. Entries are written beside and renamed: a kill leaves whole entries only.

    <cache_dir>/latents/<key>.safetensors   {"latents": (C, F, H, W) float32}
    <cache_dir>/texts/<key>.safetensors     the family's named tensors without batch, in the encoder's dtype
    <cache_dir>/files.json                  content hash, size and reading of each image or clip by path, size and time of change
    <cache_dir>/lost.json                   why a source could not be encoded, by key; where dataset.max_lost allows it
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from byg_plugin.config.sections import Config, DatasetConfig, ModelConfig
from byg_plugin.data import buckets, clips, media
from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import EditTuple
from byg_plugin.documents import json_value
from byg_plugin.finite import first_not_finite, is_finite, refuse_not_finite
from byg_plugin.models.base import Family
from byg_plugin.progress import Progress
from byg_plugin.texts import MASK, text_at
from byg_plugin.user_files import file_digest, listed

# Raise when load_image, crop_to_bucket or to_tensor give other pixels of every file; of some alone: media.READER, clips.READER.
PREPROCESSING = "1"
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


Spec = Mapping[str, tuple[str, tuple[int, ...]]]
"""What a file's header says of its tensors: dtype (as safetensors calls it) and shape by name."""


def _are_latents(spec: Spec) -> bool:
    return list(spec) == ["latents"] and spec["latents"][0] == "F32" and len(spec["latents"][1]) == 4


def _are_encodings(spec: Spec) -> bool:
    """Rows in floats; with a mask, as many as it has."""
    mask = spec.get(MASK)
    rows = {name: value for name, value in spec.items() if name != MASK}
    if mask is not None and (mask[0] != "BOOL" or any(shape[:1] != mask[1] for _, shape in rows.values())):
        return False
    return bool(rows) and all(dtype in ("F32", "BF16", "F16") and shape for dtype, shape in rows.values())


class Store:
    """A folder of safetensors entries by key.

    Args:
        folder: where they lie.
        fits: whether a file's header is that of an entry of this kind.
        command: what makes them.
    """

    def __init__(self, folder: Path, fits: Callable[[Spec], bool], command: str):
        self.folder, self._fits, self.command = folder, fits, command
        self._finite: set[str] = set()

    def path(self, key: str) -> Path:
        """Where an entry lies."""
        return self.folder / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether a whole entry is there; one that was cut off from outside, or is none of this kind, counts as absent."""
        return self.spec(key) is not None

    def spec(self, key: str) -> Spec | None:
        """What an entry's header says; None where `has` says that there is none."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                spec = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
        except (SafetensorError, OSError):
            return None
        return spec if self._fits(spec) and all(min(shape) > 0 for _, shape in spec.values()) else None

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write an entry atomically.

        Raises:
            ValueError: the disk is full or not writable.
        """
        _write(self.path(key), save({name: value.contiguous().clone() for name, value in tensors.items()}))
        self._finite.discard(key)

    def read(self, key: str, of: str = "") -> dict[str, Tensor]:
        """An entry's tensors. Each entry's numbers are looked at once.

        Args:
            key: of the entry.
            of: what it is of, where the message should say it.

        Raises:
            ValueError: it has gone or was damaged since it was checked, or holds a NaN or an infinity.
        """
        where = f"{self.path(key)} ({of})" if of else self.path(key)
        try:
            tensors = load_file(self.path(key))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{where}: a cached entry that was whole is not any more ({error}); run {self.command} again") from error
        if key not in self._finite:
            refuse_not_finite(tensors, where, f"remove this file and run {self.command} again")
            self._finite.add(key)
        return tensors

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


class Known(NamedTuple):
    """What files.json remembers of an image or clip."""

    bytes: int
    changed: int
    """Its time in ns; -1: it was too young to be known by it."""
    digest: str
    width: int
    height: int
    reader: str = "?"
    """Of an image `media.Look.reader`, of a clip `clips.READER`. Unknown in what was written before it was kept."""
    frames: int = 1
    seconds: float = 0.0

    @property
    def size(self) -> buckets.Size:
        """(width, height) in pixels."""
        return self.width, self.height

    def is_current(self, path: Path) -> bool:
        """Whether all this is what a look at the same contents would give now."""
        return self.reader in ((clips.READER,) if clips.is_clip(path) else ("", media.READER))


_KNOWN = (int, int, str, int, int, str, int, float)


def _remembered(entry: Any) -> Known | None:
    """One entry of files.json; None where it is not one, as after a change by hand."""
    if isinstance(entry, list) and len(entry) in (5, 7):  # written before readers were kept: the hash is worth keeping
        entry = [*entry[:5], *Known._field_defaults.values()]
    if not isinstance(entry, list) or [type(value) for value in entry] != [*_KNOWN]:
        return None
    known = Known(*entry)
    sane = min(known.width, known.height, known.frames) >= 1 and max(known.width, known.height) <= media.MAX_SIDE
    return known if sane and _KEY.fullmatch(known.digest) and 0 <= known.seconds < math.inf else None


@dataclass
class ImageFiles:
    """Content hashes and sizes of images, remembered by (path, bytes, time of change)."""

    path: Path
    known: dict[str, Known] = field(default_factory=dict)
    seen: dict[str, Known] = field(default_factory=dict)
    """What this run has looked at: one answer for the whole of it."""

    @classmethod
    def load(cls, cache_dir: Path) -> ImageFiles:
        """Read what is remembered; a damaged file is forgotten (it only saves time)."""
        path = cache_dir / "files.json"
        try:
            entries = json_value(path.read_bytes())
        except (OSError, ValueError):
            return cls(path)
        if not isinstance(entries, dict):
            return cls(path)
        return cls(path, {name: known for name, entry in entries.items() if (known := _remembered(entry)) is not None})

    def look(self, image: Path) -> Known:
        """Content hash, size and reading of an image or clip.

        Raises:
            ValueError: it cannot be read.
        """
        name = str(image.absolute())
        if name not in self.seen:
            self.seen[name] = self._look(image, name)
        return self.seen[name]

    def clip(self, path: Path) -> clips.Clip:
        """Size and length of a clip.

        Raises:
            ValueError: it cannot be read.
        """
        known = self.look(path)
        return clips.Clip(size=known.size, frames=known.frames, seconds=known.seconds)

    def _look(self, image: Path, name: str) -> Known:
        try:
            stat = image.stat()
            remembered = self.known.get(name)
            if remembered and remembered[:2] != (stat.st_size, stat.st_mtime_ns):
                remembered = None
            if remembered and remembered.is_current(image):
                return remembered
            settled = time.time_ns() - stat.st_mtime_ns > _SETTLED_NS
            if clips.is_clip(image):
                clip = clips.clip_info(image)
                size, rest = clip.size, (clips.READER, clip.frames, float(clip.seconds))
            else:
                seen = media.look(image)
                size, rest = seen.size, (seen.reader, 1, 0.0)
            digest = remembered.digest if remembered else file_digest(image)
        except OSError as error:
            raise ValueError(f"{image}: {error.strerror}; replace it or remove its tuples") from error
        self.known[name] = Known(stat.st_size, stat.st_mtime_ns if settled else -1, digest, *size, *rest)
        return self.known[name]

    def changed(self, image: Path) -> bool:
        """Whether the file is no longer what `look` saw in this run."""
        return file_digest(image) != self.look(image).digest

    def save(self) -> None:
        """Write atomically.

        Raises:
            ValueError: the disk is full or not writable.
        """
        _write(self.path, json.dumps(self.known).encode())


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image or clip to encode: the file, its bucket and its key."""

    file: Path
    bucket: buckets.Size
    frame: buckets.Size
    """Size of the source, whose relative crop is taken."""
    key: str
    small: bool
    """Too small for a bucket of the asked resolution."""
    frames: int = 1
    """Of a clip; an image is a clip of one."""
    fps: float | None = None
    """Frames a second that a clip is read at; None: as it is."""


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
        known = self.files.look(item.source)
        try:
            bucket = buckets.bucket_for(known.size, self.config.dataset, self._multiple)
        except ValueError as error:
            raise ValueError(f"{item.source}: {error}") from error
        small = buckets.is_below_resolution(bucket, self.config.dataset, self._multiple)
        frames, fps = self._length(item.source)
        key = self._latent_key(known, bucket, _reading(known, frames, fps))
        return Picture(file=item.source, bucket=bucket, frame=known.size, key=key, small=small, frames=frames, fps=fps)

    def _length(self, path: Path) -> tuple[int, float | None]:
        """(frames, frames a second) that a source is read with.

        Raises:
            ValueError: a clip is too short, or the family takes none.
        """
        if not clips.is_clip(path):
            return 1, None
        dataset, fps = self.config.dataset, self.config.fps
        most = self.family.clip_frames(dataset.frames)
        if self.family.clip_frames(81) == 1:
            raise ValueError(f"{path}: a clip, and {self.family.name} takes images; give a Wan family in model.family")
        clip = self.files.clip(path)
        available = clip.frames_at(fps)
        least = self.family.clip_frames(dataset.min_frames or dataset.frames)
        if available < least:
            rate = "" if fps is None else f" at {fps:g} frames a second"
            raise ValueError(
                f"{path}: too short: {available} frames{rate} ({clip.seconds:.2f} s), {least} are asked for; remove it, or set a lower "
                f"dataset.frames or dataset.min_frames"
            )
        return self.family.clip_frames(min(available, most)), fps

    def target(self, item: EditTuple) -> Picture:
        """The target's entry: in the source's bucket, cropped the same way.

        Raises:
            ValueError: the image cannot be used, or its shape is not the source's.
        """
        assert item.target is not None
        source = self.source(item)
        width, height = self.files.look(item.source).size
        known = self.files.look(item.target)
        size = known.size
        if clips.is_clip(item.source) != clips.is_clip(item.target):
            raise ValueError(f"{item.target}: a target is an image where its source is one, and a clip where it is a clip")
        if clips.is_clip(item.target) and (available := self.files.clip(item.target).frames_at(source.fps)) < source.frames:
            raise ValueError(
                f"{item.target}: {available} frames, its source is read with {source.frames}; a target is as long as its source"
            )
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
        crop = [f"{width}x{height}"] if size != frame else []
        key = self._latent_key(known, source.bucket, [*crop, *_reading(known, source.frames, source.fps)])
        return replace(source, file=item.target, frame=frame, key=key)

    def text(self, text: str) -> str:
        """The key of a text's encoding."""
        return _sha("text", text, self._text)

    def _latent_key(self, known: Known, bucket: buckets.Size, parts: Sequence[str]) -> str:
        return _sha("latent", known.digest, self._vae, f"{bucket[0]}x{bucket[1]}", *parts, PREPROCESSING)


def _reading(known: Known, frames: int, fps: float | None) -> list[str]:
    """What a key has beyond that of an image whose numbers are its pixels. A clip of one is its first frame, whatever the rate."""
    if frames > 1:
        return [f"{frames} frames at {fps}, reader {known.reader}"]
    return [f"reader {known.reader}"] if known.reader else []


def _sha(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def latent_store(dataset: DatasetConfig) -> Store:
    """Where latents lie."""
    return Store(Path(dataset.cache_dir) / "latents", _are_latents, "python -m byg_plugin.cache_latents")


def text_store(dataset: DatasetConfig) -> Store:
    """Where text encodings lie."""
    return Store(Path(dataset.cache_dir) / "texts", _are_encodings, "python -m byg_plugin.cache_text_encoder_outputs")


def texts_of(tuples: Sequence[EditTuple]) -> list[str]:
    """All texts, each once, in order of appearance."""
    return list(dict.fromkeys(getattr(item, role) for item in tuples for role in ROLES))


def texts_beside(config: Config) -> list[str]:
    """Texts that no tuple has: of the branch that guidance of previews and of scored edits leads away from, and the objective's own."""
    previews = [config.negative] if (config.sample.every or config.evaluate.every) and config.negative is not None else []
    return [*previews, *config.objective.texts_beside(config.model.spec).values()]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a caching run did, over all processes."""

    encoded: int
    kept: int
    small: int = 0
    pruned: int = 0
    cut: tuple[str, ...] = ()
    """Texts encoded in this run that are longer than the family takes."""
    lost: tuple[str, ...] = ()
    """Images and clips that cannot be used, with the reason; fewer than dataset.max_lost allows."""


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
    keys, store = Keys(config, family), latent_store(config.dataset)
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
    todo.sort(key=lambda picture: (picture.bucket, picture.frames, picture.key))
    shard = todo[processes.rank :: processes.world]
    failed: list[tuple[str, str]] = []
    if shard:
        vae = family.load_vae(device)
        with Progress(total=len(shard), desc="encode images and clips", unit="file", disable=processes.rank > 0) as bar:
            for group in _groups(shard, config.dataset.cache_batch_size, lambda picture: (picture.bucket, picture.frames)):
                failed += _encode_pictures(family, vae, device, keys.files, store, group)
                bar.update(len(group))
    failed = processes.gather(failed)
    if processes.rank == 0 and config.dataset.max_lost:
        write_lost(config.dataset, dict(failed), [key for key in pictures if store.has(key)])
    pruned = store.prune(pictures) if prune and processes.rank == 0 and not failed and not problems else 0
    every = [*problems, *(reason for _, reason in failed)]
    _check_lost(config.dataset, every, lost_tuples(keys, tuples, dict(failed)), len(tuples), len(todo) - len(failed))
    kept, small = len(pictures) - len(todo), sum(p.small for p in pictures.values())
    return Summary(encoded=len(todo) - len(failed), kept=kept, small=small, pruned=pruned, lost=tuple(every))


def lost_tuples(keys: Keys, tuples: Sequence[EditTuple], unreadable: Mapping[str, str], *, targets: bool = True) -> dict[int, str]:
    """Numbers of the tuples that cannot be used, with the reason.

    Args:
        keys: of the configuration.
        tuples: all of them.
        unreadable: reasons by the key of a latent that could not be made.
        targets: whether targets are needed too.
    """
    lost: dict[int, str] = {}
    for index, item in enumerate(tuples):
        for look in (keys.source, *([keys.target] if item.target and targets else [])):
            try:
                key = look(item).key
            except ValueError as error:
                lost.setdefault(index, str(error))
                continue
            if key in unreadable:
                lost.setdefault(index, unreadable[key])
    return lost


def read_lost(dataset: DatasetConfig) -> dict[str, str]:
    """Why latents could not be made, by key; none where nothing was cached yet."""
    path = Path(dataset.cache_dir) / "lost.json"
    try:
        lost = json_value(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: why for key, why in lost.items() if isinstance(why, str)} if isinstance(lost, dict) else {}


def write_lost(dataset: DatasetConfig, lost: Mapping[str, str], made: Iterable[str]) -> None:
    """Remember `lost` beside what was known, and forget what has been made since."""
    before = read_lost(dataset)
    present = set(made)
    now = {key: reason for key, reason in {**before, **lost}.items() if key not in present}
    if now != before:
        _write(Path(dataset.cache_dir) / "lost.json", json.dumps(now).encode())


def _look_at_all(files: ImageFiles, tuples: Sequence[EditTuple], processes: Processes) -> None:
    """Hash every image that is not remembered, each in one process, and tell the others.

    What cannot be read stays unknown; who asks for it again gets the error.
    """
    paths = list(dict.fromkeys(path for item in tuples for path in (item.source, item.target) if path))
    for path in Progress(paths[processes.rank :: processes.world], desc="look at images", unit="image", disable=processes.rank > 0):
        with suppress(ValueError):
            files.look(path)
    for seen in processes.gather([files.seen]):  # not what is remembered: another's old entry would replace a new one
        files.known |= seen
        files.seen |= seen


def _encode_pictures(
    family: Family, vae: Any, device: torch.device, files: ImageFiles, store: Store, group: Sequence[Picture]
) -> list[tuple[str, str]]:
    """Encode pictures of one bucket; returns key and problem of those that cannot be read."""
    problems, good, pixels = [], [], []
    for picture in group:
        try:
            frames = _pixels(picture)
            if files.changed(picture.file):  # its key is the old content's: the entry would be wrong for ever
                raise ValueError(f"{picture.file}: was changed while it was being cached; run the same command again")
        except ValueError as error:
            problems.append((picture.key, str(error)))
            continue
        good.append(picture)
        pixels.append(frames)
    if good:
        with _memory_advice(len(good)):
            latents = family.encode_pixels(vae, torch.stack(pixels).to(device)).float().cpu()
        for picture, latent in zip(good, latents, strict=True):
            if is_finite(latent):
                store.write(picture.key, {"latents": latent})
            else:
                why = f"{picture.file}: its latents are not finite, which the autoencoder gave; is model.vae the right file, and whole?"
                problems.append((picture.key, why))
    return problems


def _pixels(picture: Picture) -> Tensor:
    """(3, F, H, W) in [-1, 1]: each frame is cropped as it is decoded, only the result is kept."""
    if not clips.is_clip(picture.file):
        images: Iterable[Any] = [media.load_image(picture.file)]
    else:
        images = clips.read_clip(picture.file, picture.frames, picture.fps)
    return torch.stack([buckets.to_tensor(buckets.crop_to_bucket(image, picture.bucket, picture.frame)) for image in images], dim=1)


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
    keys, store = Keys(config, family), text_store(config.dataset)
    by_key = {keys.text(text): text for text in [*texts_of(tuples), *texts_beside(config)]}
    todo = sorted(key for key in by_key if not store.has(key))
    processes.gather([])
    shard = todo[processes.rank :: processes.world]
    cut: list[str] = []
    if shard:
        encoders = family.load_text_encoders(device)
        with Progress(total=len(shard), desc="encode texts", unit="text", disable=processes.rank > 0) as bar:
            for group in _groups(shard, config.dataset.cache_batch_size, lambda key: None):
                texts = [by_key[key] for key in group]
                with _memory_advice(len(group)):
                    encoded = family.encode_texts(encoders, texts)
                for index, key in enumerate(group):
                    one = text_at(encoded, index)
                    if (part := first_not_finite(one)) is not None:
                        raise ValueError(_not_finite_text(config.model, by_key[key], part))
                    store.write(key, one)
                cut += [text for text, longer in zip(texts, family.longer_than_limit(encoders, texts), strict=True) if longer]
                bar.update(len(group))
    cut = processes.gather(cut)
    pruned = store.prune(by_key) if prune and processes.rank == 0 else 0
    return Summary(encoded=len(todo), kept=len(by_key) - len(todo), pruned=pruned, cut=tuple(cut))


def _not_finite_text(model: ModelConfig, text: str, part: str) -> str:
    """A message; `part` is the tensor's name in the family's encoding."""
    encoder, dtype = f"model.{'clip' if part == 'pooled' else model.spec.text_encoders[0]}", model.dtype
    remedy = "T5 and Qwen overflow in float16, set model.dtype = 'bfloat16'" if dtype == "float16" else "is it the right file, and whole?"
    return f"model.dtype = {dtype!r}: {encoder} gives an encoding ({part}) that is not finite, of {text!r}; {remedy}"


@contextmanager
def _memory_advice(batch: int) -> Iterator[None]:
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        remedy = (
            "lower dataset.cache_batch_size"
            if batch > 1
            else 'lower dataset.resolution, for clips dataset.frames or set dataset.vae_tiling = true, or set model.device = "cpu"'
        )
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


def too_many_lost(lost: int, tuples: int, dataset: DatasetConfig) -> bool:
    """Whether more of so many tuples are lost than `dataset.max_lost` allows: caching and training ask alike."""
    return lost / max(1, tuples) > dataset.max_lost


def _check_lost(dataset: DatasetConfig, problems: Sequence[str], lost: Mapping[int, str], tuples: int, cached: int) -> None:
    if problems and too_many_lost(len(lost), tuples, dataset):
        allowed = f"; dataset.max_lost = {dataset.max_lost} allows fewer of {tuples} tuples" if dataset.max_lost else ""
        what = "image(s) or clip(s)" if dataset.frames > 1 else "image(s)"
        raise UnusableImages(
            f"{len(problems)} {what} of dataset.tuples cannot be used{allowed} (the others are cached, {cached} new):\n"
            + listed(problems, _SHOWN)
        )
