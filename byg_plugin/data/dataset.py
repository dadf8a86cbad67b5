"""What training reads: cached tuples, checked against their files, and a stateless order of batches."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from byg_plugin.config.sections import Config
from byg_plugin.data.cache import Keys, Picture, Spec, Store, latent_store, lost_tuples, read_lost, text_store, texts_beside, too_many_lost
from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import EditTuple, read_tuples
from byg_plugin.models.base import Family
from byg_plugin.objectives.base import Words
from byg_plugin.randomness import generator
from byg_plugin.texts import MASK, stack_texts

_SHOWN = 3
logger = logging.getLogger(__name__)


class CachedTuples(Dataset[dict[str, Any]]):
    """The tuples of one split with their cached latents and text encodings.

    Args:
        config: the whole configuration.
        family: for keys only; no weights are loaded.
        split: `validation` holds out about `dataset.validation_items` tuples, whole sources; `held_out` says how many, on either side.

    Raises:
        ValueError: tuples are wrong, or the cache lacks what they need now (changed image, text, model or size); it says
            what to run.
    """

    def __init__(self, config: Config, family: Family, split: Literal["train", "validation"] = "train"):
        self.config = config
        requires = config.objective.requires
        assert requires <= {"target"}, f"nothing caches {sorted(requires)}"
        self.targets = "target" in requires
        self._latents, self._texts = latent_store(config.dataset), text_store(config.dataset)
        self._keys = Keys(config, family)
        every = read_tuples(config.dataset)
        train, validation = split_tuples(every, config.dataset.validation_items)
        self.split, self.tuples = split, train if split == "train" else validation
        self.held_out = len(validation)
        if self.targets and (without := [item for item in every if item.target is None]):
            raise ValueError(
                f'objective.name = "{config.objective.name}" needs a `target` in every tuple; '
                f"{len(without)} of {len(every)} have none, e.g. {without[0].id}"
            )
        self._leave_out_lost(len(every))
        self._check_cached()

    def _leave_out_lost(self, every: int) -> None:
        """Tuples whose image or clip cannot be used, as far as dataset.max_lost allows them; the rest is an error further on."""
        allowed = self.config.dataset.max_lost
        # What has been made since by a run without max_lost is listed still.
        unreadable = {key: why for key, why in read_lost(self.config.dataset).items() if not self._latents.has(key)} if allowed else {}
        lost = lost_tuples(self._keys, self.tuples, unreadable, targets=self.targets) if allowed else {}
        if not lost:
            return
        first = next(iter(lost.values()))
        if len(lost) == len(self.tuples):
            which = "to train on" if self.split == "train" else "held out"
            raise ValueError(
                f"none of the {len(lost)} tuples {which} can be used, the first because: {first}; remove them from dataset.tuples"
                + ("" if self.split == "train" else ", or change dataset.validation_items")
            )
        if too_many_lost(len(lost), every, self.config.dataset):
            raise ValueError(f"{len(lost)} of {every} tuples cannot be used, dataset.max_lost = {allowed} allows fewer; the first: {first}")
        logger.warning("%d of %d tuples are left out, the first because: %s", len(lost), len(self.tuples), first)
        self.tuples = [item for index, item in enumerate(self.tuples) if index not in lost]

    def _check_cached(self) -> None:
        self._pictures: list[tuple[Picture, Picture | None]] = []
        images: dict[str, str] = {}
        sizes: dict[str, Hashable] = {}
        texts: dict[str, str] = {}
        remembered = dict(self._keys.files.known)
        for item in self.tuples:
            source = self._keys.source(item)
            target = self._keys.target(item) if self.targets else None
            self._pictures.append((source, target))
            images |= {picture.key: str(picture.file) for picture in (source, target) if picture}
            sizes |= {picture.key: (picture.bucket, picture.frames) for picture in (source, target) if picture}
            texts |= {self._keys.text(getattr(item, role)): getattr(item, role) for role in ROLES}
        texts |= {self._keys.text(text): text for text in texts_beside(self.config)}
        if self._keys.files.known != remembered:
            with suppress(ValueError):  # a cache that may only be read: the images are hashed again next time
                self._keys.files.save()
        complaints = []
        for store, wanted, what in ((self._latents, images, "images"), (self._texts, texts, "texts")):
            specs = {key: store.spec(key) for key in wanted}
            present = {key: spec for key, spec in specs.items() if spec is not None}
            complaints += _missing(store, [name for key, name in wanted.items() if key not in present], len(wanted), what)
            complaints += _unlike(store, present, sizes, wanted)
        if complaints:
            raise ValueError(
                f"dataset.cache_dir = {Path(self.config.dataset.cache_dir)} does not match the tuples, model and resolution:\n"
                + "\n".join(f"  - {complaint}" for complaint in complaints)
                + "\nuse the same --config and --set; what is cached already is kept"
            )

    def __len__(self) -> int:
        return len(self.tuples)

    def digest(self) -> str:
        """Identity of the order of batches: the tuples, one after another, and their buckets."""
        contents = [(item.id, self.bucket(index)) for index, item in enumerate(self.tuples)]
        return hashlib.sha256(repr(contents).encode()).hexdigest()

    def bucket(self, index: int) -> tuple[int, ...]:
        """(width, height) in pixels that a tuple is trained at, of a clip also its frames."""
        source = self._pictures[index][0]
        return source.bucket if source.frames == 1 else (*source.bucket, source.frames)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`source` (C, F, H, W), each text role as named tensors, `words`, `index`; `target` where the objective requires it."""
        source, target = self._pictures[index]
        this = self.tuples[index].id
        item: dict[str, Any] = {
            "index": index,
            "words": words_of(self.tuples[index]),
            "source": self._latent(source, f"{source.file}, source of tuple {this}"),
        }
        for role in ROLES:
            item[role] = self.encoding(text := getattr(self.tuples[index], role), f"{text!r}, {role} of tuple {this}")
        if target is not None:
            item["target"] = self._latent(target, f"{target.file}, target of tuple {this}")
        return item

    def _latent(self, picture: Picture, of: str) -> Tensor:
        return self._latents.read(picture.key, of)["latents"]

    def encoding(self, text: str, of: str | None = None) -> dict[str, Tensor]:
        """The cached encoding of one of the tuples' texts, without batch; `of` is what errors call it."""
        return self._texts.read(self._keys.text(text), of or repr(text))


def _missing(store: Store, missing: Sequence[str], count: int, what: str) -> list[str]:
    """A sentence on what is not in the store, of `count` that are wanted, with the command that makes it; none if there is nothing."""
    if not missing:
        return []
    examples = ", ".join(repr(name) for name in missing[:_SHOWN])
    entries = store.count()
    why = f"none of {entries} entries has their content, this model and this size" if entries else "nothing is cached yet"
    return [f"{len(missing)} of {count} {what} are not cached as they are now, {why}: {examples}; run {store.command}"]


def _unlike(store: Store, specs: Mapping[str, Spec], sizes: Mapping[str, Hashable], wanted: Mapping[str, str]) -> list[str]:
    """A sentence on entries that no batch can hold beside the others: what was put there is not what this model encodes.

    Args:
        store: where they lie.
        specs: of the entries that are there, by key.
        sizes: what a latent's shape goes with; encodings of texts, which are not in it, have one.
        wanted: what each is of.
    """
    # What all have in common is right: the model is part of the key. Channels first, so that a size with one entry counts too.
    fixed = {key: _without_length(spec) for key, spec in specs.items()}
    common = _alike({key: _leading(spec) for key, spec in fixed.items()}, dict.fromkeys(specs))
    common &= _alike({key: tuple(sorted(spec.items())) for key, spec in fixed.items()}, sizes)
    odd = [key for key in specs if key not in common]
    if not odd:
        return []
    named = "".join(f"\n    {store.path(key)} ({wanted[key]})" for key in odd[:_SHOWN])
    return [f"{len(odd)} entries have other tensors or shapes than the rest; remove these files and run {store.command}:{named}"]


def _without_length(spec: Spec) -> Spec:
    """Without the rows, where texts keep their own number of them."""
    return {name: (dtype, shape[1:]) for name, (dtype, shape) in spec.items()} if MASK in spec else spec


def _leading(spec: Spec) -> Hashable:
    """Names, dtypes and the first dimension (of latents the channels)."""
    return tuple(sorted((name, dtype, *shape[:1]) for name, (dtype, shape) in spec.items()))


def _alike(facts: Mapping[str, Hashable], groups: Mapping[str, Hashable]) -> set[str]:
    """Keys whose fact is the commonest of their group; where two are equally common, neither can be told to be right."""
    counts: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    for key, fact in facts.items():
        counts[groups.get(key)][fact] += 1
    right = {}
    for group, found in counts.items():
        (first, most), *others = found.most_common(2)
        right[group] = None if others and others[0][1] == most else first
    return {key for key, fact in facts.items() if fact == right[groups.get(key)]}


def words_of(item: EditTuple) -> Words:
    """A tuple's texts, for a batch."""
    return Words(item.id, item.instruction, item.src_caption, item.tgt_caption, item.edit_type)


def split_tuples(tuples: Sequence[EditTuple], validation_items: int) -> tuple[list[EditTuple], list[EditTuple]]:
    """(training, validation): whole sources in a stable random order go to validation until it has enough tuples.

    Where tuples say `split = "validation"` themselves, these are the held-out ones, whatever `validation_items` is. Otherwise a source
    of which a tuple says `split = "train"` is trained on whole, and the choice is among the others.

    Raises:
        ValueError: nothing would be left to train on, there are too few to choose from, or a source is on both sides.
    """
    by_source: dict[str, list[EditTuple]] = defaultdict(list)
    for item in tuples:
        by_source[str(item.source)].append(item)
    if any(item.split == "validation" for item in tuples):
        return _marked(tuples, by_source)
    # The order hangs on each source's own name: new tuples do not reshuffle what was held out, nor does a move of the folder.
    order = sorted((source for source, items in by_source.items() if not any(item.split for item in items)), key=_held_out_rank)
    held_out: set[str] = set()
    count = 0
    for source in order:
        if count >= validation_items:
            break
        held_out.add(source)
        count += len(by_source[source])
    train = [item for item in tuples if str(item.source) not in held_out]
    if not train:
        raise ValueError(
            f"dataset.validation_items = {validation_items} leaves nothing to train on: {len(tuples)} tuples of {len(by_source)} sources"
        )
    if not count and validation_items:
        raise ValueError(
            f"dataset.validation_items = {validation_items}: every source has split = 'train', so none can be held out; mark some with "
            "split = 'validation', or leave `split` out"
        )
    if count < validation_items:
        raise ValueError(
            f"dataset.validation_items = {validation_items}: {count} of {len(tuples)} tuples can be held out, the others' sources have "
            f"split = 'train'; set at most {count}, or leave `split` out of more tuples"
        )
    return train, [item for item in tuples if str(item.source) in held_out]


def _marked(tuples: Sequence[EditTuple], by_source: Mapping[str, Sequence[EditTuple]]) -> tuple[list[EditTuple], list[EditTuple]]:
    for source, items in by_source.items():
        if len({item.split == "validation" for item in items}) > 1:
            raise ValueError(f"{source}: some of its tuples have split = 'validation' and some not; a source is held out whole")
    train = [item for item in tuples if item.split != "validation"]
    if not train:
        raise ValueError("every tuple has split = 'validation': nothing is left to train on")
    return train, [item for item in tuples if item.split == "validation"]


def _held_out_rank(source: str) -> tuple[str, str, str]:
    """A stable random rank by file name; the folder's name decides among equal ones (0001/source.png, 0002/source.png)."""
    path = Path(source)
    names = (path.name, f"{path.parent.name}/{path.name}")
    by_name, by_folder = (hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest() for name in names)
    return by_name, by_folder, source


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack items of one bucket; text encodings stay named tensors."""
    batch: dict[str, Any] = {name: [item[name] for item in items] for name in ("index", "words")}
    batch["source"] = torch.stack([item["source"] for item in items])
    for role in ROLES:
        batch[role] = stack_texts([item[role] for item in items])
    if "target" in items[0]:
        batch["target"] = torch.stack([item["target"] for item in items])
    return batch


class BucketBatches:
    """An endless order of one-bucket batches that is a pure function of (seed, step): resuming needs no state.

    In each epoch every tuple appears at least once; a bucket's last batch is filled up from its beginning, so that no
    tuple is ever dropped.
    """

    def __init__(self, data: CachedTuples, batch_size: int, seed: int):
        self.batch_size, self.seed = batch_size, seed
        by_bucket: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index in range(len(data)):
            by_bucket[data.bucket(index)].append(index)
        self._buckets = [by_bucket[bucket] for bucket in sorted(by_bucket)]
        self.per_epoch = sum(-(-len(members) // batch_size) for members in self._buckets)
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of one epoch, shuffled inside buckets and among them."""
        if self._epoch[0] != epoch:
            rng = generator(self.seed, "order", epoch)
            batches = []
            for members in self._buckets:
                order = [members[i] for i in torch.randperm(len(members), generator=rng).tolist()]
                for first in range(0, len(order), self.batch_size):
                    batches.append([order[(first + k) % len(order)] for k in range(self.batch_size)])
            shuffled = [batches[i] for i in torch.randperm(len(batches), generator=rng).tolist()]
            self._epoch = (epoch, shuffled)
        return self._epoch[1]

    def micro_batch(self, step: int, micro: int, rank: int, world: int, accumulation: int) -> list[int]:
        """Tuples of one micro-step. N processes take together what one takes with N times the accumulation."""
        epoch, index = divmod((step * accumulation + micro) * world + rank, self.per_epoch)
        return self.batches(epoch)[index]
