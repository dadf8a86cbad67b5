"""What a run goes on from: which checkpoint, and whether it is this run's. All of it before a model is loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import nn

from byg_plugin.config.sections import ONCE_ALWAYS_WRITTEN, Config, TrainConfig
from byg_plugin.folders import DISCARDED, make_writable
from byg_plugin.hosts import adapter_shapes
from byg_plugin.models.base import Family
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Objective
from byg_plugin.training import checkpoint
from byg_plugin.training.engine import refuse_idle
from byg_plugin.training.optimizers import make_optimizer

logger = get_logger(__name__)

# What may differ between a checkpoint and the run that goes on from it without changing what is computed.
_FREE = {"sample", "evaluate", "output", "train.save_every", "train.keep_last", "train.log_every", "train.validate_every", "train.tracker"}
_FREE |= {"train.sharding", "train.sharding_offload", "train.collective_timeout"}
# How the data are read. Not which: the digest of the data knows names and buckets, and neither texts nor pixels.
_FREE |= {"dataset.cache_dir", "dataset.cache_batch_size", "dataset.workers", "critic.kept_sources"}
_FIXED = (
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "lora.experts",
    "model.family",
    "model.boundary",
    "conditioning.position",
    "objective.name",
    "train.optimizer",
)


def find_start(output: Path, resume: str | None, discard_later: bool) -> Path | None:
    """The checkpoint that a run into `output.dir` goes on from; None: it starts anew. The folder is made.

    Args:
        output: `output.dir`.
        resume: None, "latest" or a checkpoint folder.
        discard_later: as of `Trainer`.

    Raises:
        ValueError: something there would be written over, or the folder cannot be written.
    """
    folder = output / "checkpoints"
    existing = checkpoint.checkpoints(folder)
    found = None if resume is None else checkpoint.find(folder, resume)
    own = found is not None and is_in(folder, found)
    if discard_later and (not own or resume == "latest"):
        raise ValueError(
            f"--discard-later goes with --resume FOLDER, and FOLDER must be a checkpoint in {folder}"
            + (f", e.g. {existing[-1]}" if existing else "; there is none")
        )
    if found and existing and not discard_later and found.resolve() != existing[-1].resolve():
        which = f"{'later' if own else 'other'} checkpoint {existing[-1].name}"
        discard = f"add --discard-later, which renames later ones to {DISCARDED}step-...; or " if own else ""
        raise ValueError(
            f"--resume {resume}: output.dir = {output} has the {which}, which is never overwritten: {discard}choose another "
            f"output.dir; or go on from the newest with --resume latest"
        )
    if existing and not found:
        raise ValueError(
            f"output.dir = {output} already has checkpoints up to {existing[-1].name}: go on with --resume latest, "
            f"or choose another output.dir"
        )
    try:
        make_writable(folder)
    except OSError as error:
        raise ValueError(f"output.dir = {output} is not writable: {error.strerror}; choose another folder") from error
    return found


def is_in(folder: Path, path: Path) -> bool:
    """Whether a checkpoint is one of `folder`'s."""
    return path.resolve() in [each.resolve() for each in checkpoint.checkpoints(folder)]


def load_start(
    path: Path, config: Config, family: Family, objective: Objective, data: str, device: torch.device, stage: int = 0
) -> tuple[checkpoint.TrainingState, checkpoint.Layout]:
    """A checkpoint that this run can go on from, and what it must hold.

    Args:
        path: the checkpoint.
        config: the whole configuration.
        family: the model family.
        objective: what is trained.
        data: the digest of the run's tuples.
        device: where the run's optimizers will be.
        stage: DeepSpeed's, as of `Launch`.

    Raises:
        ValueError: it is damaged, another run's, at its end, or has weights that this engine cannot leave alone.
    """
    state = checkpoint.load(path)
    _check_same_run(config, state.config)
    _check_rhythm(config, state)
    if state.step > config.train.steps:
        raise ValueError(
            f"train.steps = {config.train.steps} is below the checkpoint's {state.step} steps: raise it, nothing is left to do"
        )
    if state.data != data:
        logger.warning("--resume: the tuples are not those of the checkpoint; the order of batches differs from an uninterrupted run")
    layout = _layout(config, family, objective, device)
    checkpoint.compare(path, state, layout)
    if stage in (1, 2):
        for name, adapter in layout.items():
            refuse_idle(checkpoint.idle_weights(state.adapters[name].optimizer, [*adapter.lora]))
    return state, layout


def _check_same_run(config: Config, saved: dict[str, Any]) -> None:
    """Refuse what cannot continue, and say loudly what makes the run another one."""
    now = config.model_dump(mode="json")
    chosen = config.model_dump(mode="json", exclude_defaults=True)
    changed = [
        (f"{section}.{key}", saved.get(section, {}).get(key), value)
        for section, values in now.items()
        for key, value in values.items()
        if saved.get(section, {}).get(key) != value
        and not (value is None and f"{section}.{key}" in ONCE_ALWAYS_WRITTEN)
        # What a checkpoint of an earlier version does not know was as its default is.
        and (key in saved.get(section, {}) or key in chosen.get(section, {}) or f"{section}.{key}" in _FIXED)
    ]
    fixed = [f"{key}: {old!r} -> {new!r}" for key, old, new in changed if key in _FIXED]
    if fixed:
        raise ValueError(f"--resume: the checkpoint was trained with other values of {'; '.join(fixed)}; set them back, or start a new run")
    for key, old, new in changed:
        if key not in _FREE and key.partition(".")[0] not in _FREE:
            logger.warning("--resume: %s was %r and is now %r; the curve will differ from an uninterrupted run", key, old, new)


def _check_rhythm(config: Config, state: checkpoint.TrainingState) -> None:
    """Refuse a change by which the steps so far would have trained other adapters than they have: nobody could tell it from damage."""
    saved, seed = state.config["objective"], config.train.seed
    before = {key: saved[key] for key in config.objective.rhythm if key in saved and saved[key] != getattr(config.objective, key)}
    if not before:
        return
    try:
        # Each by itself: together with what the run has now they may be refused.
        valid = {key: getattr(type(config.objective).model_validate({key: value}), key) for key, value in before.items()}
    except ValueError as error:
        raise ValueError(f"--resume: the checkpoint is damaged: its objective has {before}; use an earlier one") from error
    then, now = (make_objective(section) for section in (config.objective.model_copy(update=valid), config.objective))
    steps = range(state.step)
    if then.adapters != now.adapters or any(then.plan(step, seed).adapters != now.plan(step, seed).adapters for step in steps):
        changes = "; ".join(f"objective.{key}: {old!r} -> {getattr(config.objective, key)!r}" for key, old in before.items())
        raise ValueError(
            f"--resume: the checkpoint's {state.step} steps trained what other values of {changes} would not have; set them back, or "
            "start a new run"
        )


def _layout(config: Config, family: Family, objective: Objective, device: torch.device) -> checkpoint.Layout:
    return {
        adapter: checkpoint.AdapterLayout(
            lora={name: checkpoint.kind(torch.empty(shape, device="meta")) for name, shape in shapes.items()},
            optimizer=_optimizer_layout(config.train, shapes, device),
            trained=partial(_steps_of, adapter, objective, config.train.seed),
            averaged=adapter in objective.averaged,
        )
        for adapter, shapes in adapter_shapes(config, family, objective.adapters).items()
    }


def _steps_of(adapter: str, objective: Objective, seed: int, steps: int) -> int:
    return sum(adapter in objective.plan(step, seed).adapters for step in range(steps))


def _optimizer_layout(train: TrainConfig, shapes: dict[str, tuple[int, int]], device: torch.device) -> dict[str, dict[str, str]]:
    """The optimizer tells: it is asked for one step of zeros of each shape."""
    states: dict[tuple[int, ...], dict[str, str]] = {}
    for shape in set(shapes.values()):
        weight = nn.Parameter(torch.zeros(shape, device=device))
        weight.grad = torch.zeros_like(weight)
        optimizer = make_optimizer(train, [weight])
        optimizer.step()
        tensors, scalars = checkpoint.split_optimizer(optimizer.state_dict())
        states[shape] = {name.removeprefix("optimizer/0/"): checkpoint.kind(value) for name, value in tensors.items()}
        states[shape] |= {name: checkpoint.kind(value) for name, value in scalars["state"]["0"].items()}
    return {name: states[shape] for name, shape in shapes.items()}
