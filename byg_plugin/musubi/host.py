"""musubi-tuner as a host: its own loop, loading, LoRA, caches and saving around our objective.

`train` checks everything that can be checked before a model is loaded, then gives the host's `train(args)` a network trainer
that overrides its seams only (`trainer.py`).
"""

from __future__ import annotations

import argparse
import glob
import inspect
import logging
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from byg_plugin import families
from byg_plugin.config.sections import Config, DatasetConfig
from byg_plugin.data.dataset import split_tuples
from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import EditTuple, read_tuples
from byg_plugin.folders import alone_in
from byg_plugin.musubi import cache as musubi_cache
from byg_plugin.musubi import options as musubi_options
from byg_plugin.musubi.checkout import Checkout, open_checkout
from byg_plugin.musubi.family import Encoded, TextEncoder
from byg_plugin.musubi.launch import read_host_launch
from byg_plugin.musubi.trainer import check_steps_left, make_trainer, part_name, read_state, states
from byg_plugin.objectives.draws import share_of_high_noise
from byg_plugin.progress import Progress
from byg_plugin.training.launch import Launch, check_launch, take_over

logger = logging.getLogger(__name__)

_FIXED_ON_RESUME = (
    ("model", "family"),
    ("conditioning", "position"),
    *(("musubi", name) for name in ("network_module", "network_dim", "network_alpha", "network_args", "optimizer_type")),
)


def _resume_from(config: Config, resume: str | None, args: Any) -> None:
    folder = Path(args.output_dir)
    existing = states(folder)
    if resume is None:
        name = glob.escape(args.output_name)
        if written := [*existing, *sorted(folder.glob(f"{name}.safetensors")), *sorted(folder.glob(f"{name}-*.safetensors"))]:
            raise ValueError(f"musubi.output_dir = {folder} already has {written[0].name}: go on with --resume FOLDER, or choose another")
        return
    if resume == "latest":
        newest = f"--resume {existing[-1]}" if existing else "none is there yet"
        raise ValueError(f"--resume latest: the host unpickles the state it reads, which can run code, so name the folder: {newest}")
    state = read_state(Path(resume))
    if args.max_train_epochs is None:  # else the host counts the steps itself, once it has its data
        check_steps_left(args.max_train_steps, state["step"])
    part = glob.escape(part_name(args.output_name, state["step"]))
    if written := [*sorted(folder.glob(f"{part}.*")), *sorted(folder.glob(f"{part}-*"))]:
        raise ValueError(
            f"--resume {resume}: {written[0]} is of an earlier run that went on from this state, and would be overwritten: go on from a "
            "later state, set another musubi.output_name, or move those files away"
        )
    saved = state["config"]
    now = config.model_dump(mode="json")
    for section, key in _FIXED_ON_RESUME:
        before, after = (each.get(section, {}).get(key) for each in (saved, now))
        if before != after:
            raise ValueError(f"--resume: the state was trained with {section}.{key} = {before!r}, now it is {after!r}: set it back")
    for key in ("objective", "conditioning"):
        changed = [name for name, value in now[key].items() if saved.get(key, {}).get(name) != value]
        if changed:
            logger.warning("--resume: %s differ from the state's; the curve will differ from an uninterrupted run", ", ".join(changed))
    logger.warning("--resume %s: the host reads optimizer and random states with pickle; only resume from a folder you trust", resume)
    args.resume = resume


# --- commands ---


def training_tuples(dataset: DatasetConfig) -> list[EditTuple]:
    """The tuples without those that say `split = "validation"`; the host validates nothing, so none is held out beyond them."""
    return split_tuples(read_tuples(dataset), 0)[0]


def prepare(config: Config, resume: str | None = None) -> tuple[Checkout, argparse.Namespace, int, Launch]:
    """Everything that can be checked before a model is loaded: host, options, caches, state.

    Returns:
        the checkout, its arguments, the number of its items, and what the launcher asks for.

    Raises:
        ValueError: something the user can mend.
    """
    check_launch("musubi.mixed_precision", config.musubi.get("mixed_precision"))
    checkout = open_checkout(config.model)
    args = musubi_options.arguments(config, checkout.parser())
    launch = read_host_launch(config.model, args)
    checkout.family.check(config.musubi)
    if args.sample_prompts:
        checkout.check_prompts(args.sample_prompts)
    share_of_high_noise(config, families.named(config.model.family).boundary)
    items = musubi_cache.check(Path(args.dataset_config), checkout.family, training_tuples(config.dataset), _encoder_parts(config))
    _resume_from(config, resume, args)
    return checkout, args, items, launch


def train(config: Config, resume: str | None = None) -> Path:
    """Train in the host; returns the LoRA file. `musubi.output_dir` is this run's alone meanwhile.

    Raises:
        ValueError: something the user can mend, before any model is loaded.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    checkout, args, _, launch = prepare(config, resume)
    take_over()
    # The host makes its processes' accelerator itself, and only then could be asked which one is the first.
    first = os.environ.get("RANK", "0") == "0"
    with alone_in(Path(args.output_dir), "musubi.output_dir") if first else nullcontext():
        make_trainer(checkout, config, launch).train(args)
    return Path(args.output_dir) / f"{args.output_name}.safetensors"


def dry_run(config: Config, resume: str | None = None) -> None:
    """Print what would be trained.

    Raises:
        ValueError: what `train` would stop at before a model is loaded.
    """
    checkout, args, items, launch = prepare(config, resume)
    tuples = training_tuples(config.dataset)
    print(f"host: {Path(inspect.getfile(checkout.trainer)).parent}, {checkout.trainer_class.__name__}")
    print(f"items with latents and texts: {items}, tuples: {len(tuples)}")
    print(f"engine: {launch.name}")
    print(f"LoRA: {args.network_module}, rank {args.network_dim}, alpha {args.network_alpha}")
    print(f"{args.max_train_steps} steps of {args.optimizer_type}")
    if resume is not None:
        done = read_state(Path(resume))["step"]
        print(f"goes on at step {done}, in files called {part_name(args.output_name, done)}")


def cache_texts(config: Config, *, prune: bool = False) -> list[str]:
    """Add the four roles to the host's text cache files; what is there already is kept.

    Returns:
        the texts encoded here that are longer than the model takes.

    Raises:
        ValueError: items and tuples do not match, a file is missing or cannot be written.
    """
    if prune:
        raise ValueError("--prune: the host's own caching scripts remove files of items that are gone; leave it out")
    checkout = open_checkout(config.model)
    tuples = training_tuples(config.dataset)
    path = config.musubi.get("dataset_config")
    if not isinstance(path, str) or not Path(path).is_file():
        raise ValueError(f"musubi.dataset_config = {path!r}: no such file; give the host's dataset TOML")
    every = musubi_cache.matched(musubi_cache.latents_of(Path(path), checkout.family), tuples)
    identity = _encoder_identity(config)
    todo = [(item, some) for item, some in every if not musubi_cache.is_current(item.path, some, identity)]
    cut = _encode_and_write(checkout, config, todo, identity) if todo else []
    print(f"{len(todo)} items' texts cached, {len(every) - len(todo)} were current", flush=True)
    return cut


@torch.no_grad()
def _encode_and_write(
    checkout: Checkout, config: Config, todo: Sequence[tuple[musubi_cache.Item, list[EditTuple]]], identity: str
) -> list[str]:
    """Item by item: what a stopped run has written stays, and no more than a few encodings are held. Returns the texts that are cut."""
    encoder = load_text_encoder(checkout, config)
    counts = Counter(getattr(one, role) for _, some in todo for one in some for role in ROLES)
    remembered = lru_cache(maxsize=_REMEMBERED)(encoder.encode)

    def encoding(text: str) -> Encoded:
        return remembered(text) if counts[text] > 1 else encoder.encode(text)

    with Progress(total=len(todo), desc="encode texts", unit="item") as bar:
        # One item at several resolutions lies in several caches: side by side its texts are encoded once.
        for item, some in sorted(todo, key=lambda pair: pair[0].stem):
            musubi_cache.write_roles(item, some, encoding, checkout.family, identity)
            bar.update()
    return [text for text in counts if encoder.length(text) > config.conditioning.max_text_tokens]


_REMEMBERED = 32  # encodings of texts that come again; of FLUX.2 klein 9B one has 12 MiB


def _encoder_identity(config: Config) -> str:
    parts = _encoder_parts(config)
    for name, part in zip(musubi_options.spec_of(config.model).text_encoders, parts, strict=False):
        if part is None:
            path = config.musubi.get(name)
            raise ValueError(f"musubi.{name} = {path!r}: no such file; give the text encoder that the host's own caching takes")
    return musubi_cache.ENCODER_PARTS.join(part for part in parts if part is not None)


def _encoder_parts(config: Config) -> list[str | None]:
    """What encodings depend on: each encoder's file (None: it is not here; training alone does without), its type, the limit of tokens."""
    parts: list[str | None] = []
    for name in musubi_options.spec_of(config.model).text_encoders:
        path = config.musubi.get(name)
        file = Path(path) if isinstance(path, str) else None
        parts.append(f"{file.name}:{file.stat().st_size}" if file is not None and file.is_file() else None)
    fp8 = any(config.musubi.get(name) for name in ("fp8_t5", "fp8_text_encoder", "fp8_vl", "fp8_llm"))
    return [*parts, "fp8" if fp8 else "bf16", str(config.conditioning.max_text_tokens)]


def load_text_encoder(checkout: Checkout, config: Config) -> TextEncoder:
    """The host's encoders, with its settings, on the configured device."""
    from byg_plugin.config.device import resolve_device

    device = resolve_device(config.model.device)
    return checkout.family.load_text_encoder(checkout.module, config.musubi, config.conditioning.max_text_tokens, device)
