"""Checkpoints: complete, atomic, safetensors and JSON only.

`<output.dir>/checkpoints/step-000500/` holds
    <name>.safetensors        the LoRA, ready for use
    <name>-ema.safetensors    the same with the EMA weights
    training.safetensors      of each adapter the exact LoRA and EMA tensors and the optimizer's, as trained (no scale folded):
                              edit/lora/<name>, edit/ema/<name>, edit/optimizer/<index>/<name>
    state.json                step, of each adapter the optimizer's scalars, versions, the configuration
A folder under this name is complete: it is written beside under another name, synced, and renamed. What is read is compared with
what the run would have: names, shapes, types, finite values. Randomness and data order are functions of (seed, step) and need no
state (see `randomness.py`). Before adapters had names there was the one called "edit" now: such checkpoints load as that.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as save_private_file
from torch import Tensor

from byg_plugin import folders
from byg_plugin.documents import json_value
from byg_plugin.finite import first_not_finite
from byg_plugin.objectives.base import EDIT

logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{6,})")
TENSORS = "training.safetensors"
STATE = "state.json"


@dataclass(frozen=True, kw_only=True)
class AdapterState:
    """One trainable set of weights."""

    lora: dict[str, Tensor]
    ema: dict[str, Tensor]
    """Empty without an average."""
    optimizer: dict[str, Any]
    """`torch.optim.Optimizer.state_dict()`."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run continues from."""

    step: int
    """Optimizer steps done."""
    adapters: dict[str, AdapterState]
    config: dict[str, Any]
    """The configuration the state was trained with."""
    data: str = ""
    """Digest of the tuples and buckets: the order of batches is a function of them."""
    unnamed: bool = False
    """Whether it was read from a file whose entries do not begin with an adapter's name."""


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def name_of(step: int) -> str:
    """Of a checkpoint's folder."""
    return f"step-{step:06d}"


def save(
    folder: Path,
    state: TrainingState,
    lora_files: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]],
    *,
    keep_last: int,
    spared: str | None = None,
    extra: Mapping[str, Any],
) -> Path:
    """Write one checkpoint atomically, then drop the oldest beyond `keep_last` (0 keeps all).

    Args:
        folder: the `checkpoints` folder.
        state: what a run continues from.
        lora_files: file name -> (tensors, metadata) of the LoRA files that lie in the checkpoint.
        keep_last: checkpoints kept.
        spared: name of one that is kept beside them.
        extra: more of state.json (versions, command).

    Raises:
        ValueError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    final = folder / name_of(state.step)
    if final.exists():
        raise ValueError(f"checkpoint {final} exists already and is not overwritten: choose another output.dir")
    try:
        with folders.written_whole(final) as partial:
            for name, (tensors, metadata) in lora_files.items():
                save_file(dict(tensors), partial / name, metadata={"format": "pt", **metadata})
            tensors = {f"{name}/{key}": value for name, adapter in state.adapters.items() for key, value in tensors_of(adapter).items()}
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, partial / TENSORS)
            scalars = {name: split_optimizer(adapter.optimizer)[1] for name, adapter in state.adapters.items()}
            record = {"step": state.step, "optimizers": scalars, "config": state.config, "data": state.data, **extra}
            (partial / STATE).write_text(json.dumps(record, indent=2), encoding="utf-8")
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own class
        raise ValueError(_cannot_save(final, error, checkpoints(folder))) from error
    if keep_last:
        for old in checkpoints(folder)[:-keep_last]:
            if old.name != spared:
                _remove(old)
    return final


def _remove(old: Path) -> None:
    try:
        folders.remove_whole(old)
    except OSError as error:  # e.g. open in another program on Windows: no reason to end a run
        logger.warning("old checkpoint %s was not removed: %s", old, error)


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' `save_file` with the permissions of any other new file: its own are private, and other programs read these."""
    path.touch()
    mode = path.stat().st_mode
    save_private_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def _cannot_save(final: Path, error: Exception, earlier: list[Path]) -> str:
    kept = f"the last complete checkpoint is {earlier[-1]}" if earlier else "there is no earlier checkpoint"
    return f"cannot write {final}: {error}; {kept}. {make_room(final.parent)}"


@contextmanager
def naming_a_full_disk(path: Path, folder: Path) -> Iterator[None]:
    """Around what writes `path`; `folder` is the `checkpoints` folder.

    Raises:
        ValueError: it cannot be written; with the remedy.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}. {make_room(folder)}") from error


def make_room(folder: Path) -> str:
    """What works after a full disk, as the end of a message."""
    found = checkpoints(folder)
    if not found:
        return "Make room, then run the same command again: there is no checkpoint to go on from yet"
    return f"Make room, then go on with --resume latest; or go on in another output.dir with --resume {found[-1]}"


# --- what is read ---


@dataclass(frozen=True, kw_only=True)
class AdapterLayout:
    """What a checkpoint of this run holds of an adapter: the kind of each tensor, as `kind` says it."""

    lora: dict[str, str]
    """By the LoRA's names, in the order of the optimizer's parameters."""
    optimizer: dict[str, dict[str, str]]
    """By the LoRA's names, the optimizer's state of that parameter once it has been trained."""
    trained: Callable[[int], int]
    """How many of the run's first steps train it."""
    averaged: bool = True
    """Whether it has a moving average, where the run's configuration has one."""


Layout = Mapping[str, AdapterLayout]
"""By adapter."""


def kind(value: Any) -> str:
    """Type and shape of a tensor, type of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def load(path: Path) -> TrainingState:
    """Read a checkpoint.

    Raises:
        ValueError: it is incomplete, damaged or not ours; names file and entry, and what works instead.
    """
    try:
        return _load(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{path} {_complaint(error)}; {way_back(path.parent, but=path)}") from error


class _NoCheckpoint(ValueError):
    """A folder without what makes it one."""


def _complaint(error: Exception) -> str:
    if isinstance(error, _NoCheckpoint):
        return f"is not a checkpoint: {error}"
    reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return f"is damaged: {reason}"


def _load(path: Path) -> TrainingState:
    if missing := [name for name in (STATE, TENSORS) if not (path / name).is_file()]:
        raise _NoCheckpoint(f"it has no {' and no '.join(missing)}")
    record = _record(path)
    unnamed = "optimizers" not in record
    optimizers = {EDIT: record["optimizer"]} if unnamed else record["optimizers"]
    groups = _tensors(path, list(optimizers), unnamed)
    return TrainingState(
        step=record["step"],
        adapters={
            name: AdapterState(
                lora=groups[name]["lora"], ema=groups[name]["ema"], optimizer=_join_optimizer(groups[name]["optimizer"], scalars)
            )
            for name, scalars in optimizers.items()
        },
        config=record["config"],
        data=record.get("data", ""),
        unnamed=unnamed,
    )


def _record(path: Path) -> dict[str, Any]:
    """state.json, of which every entry that is used has its type."""
    try:
        record = json_value((path / STATE).read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{STATE} is not UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{STATE} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{STATE} holds a {type(record).__name__}, not an object")
    step = record.get("step")
    if type(step) is not int or step < 0:  # True is an int
        raise ValueError(f"{STATE}: step = {_shown(step)} is no number of steps")
    if (named := _NAME.fullmatch(path.name)) and int(named[1]) != step:
        raise ValueError(f"{STATE}: step = {_shown(step)} is not the folder's")
    config = record.get("config")
    if not isinstance(config, dict) or not all(isinstance(section, dict) for section in config.values()):
        raise ValueError(f"{STATE}: config = {_shown(config)} is not a configuration")
    decay = config.get("objective", {}).get("ema_decay")
    if type(decay) not in (int, float) or not 0 <= decay < 1:
        raise ValueError(f"{STATE}: config.objective.ema_decay = {_shown(decay)} is not in [0, 1)")
    named = record.get("optimizers", {})
    if not isinstance(named, dict):
        raise ValueError(f"{STATE}: optimizers = {_shown(named)} is no object by adapter")
    optimizers = {f"optimizers.{name}": value for name, value in named.items()}
    for key, optimizer in (optimizers if "optimizers" in record else {"optimizer": record.get("optimizer")}).items():
        states = optimizer.get("state") if isinstance(optimizer, dict) else None
        if not isinstance(states, dict) or not all(isinstance(values, dict) for values in states.values()):
            raise ValueError(f"{STATE}: {key} = {_shown(optimizer)} is not an optimizer's state")
        idle = optimizer.get("idle", [])
        if not isinstance(idle, list) or not all(type(index) is int for index in idle):
            raise ValueError(f"{STATE}: {key}.idle = {_shown(idle)} is no list of parameters' numbers")
    if not isinstance(record.get("data", ""), str):
        raise ValueError(f"{STATE}: data = {_shown(record['data'])} is no text")
    return record


def _shown(value: Any) -> str:
    """For a message: the repr of what is nested too deeply would be an error of its own."""
    return f"a {type(value).__name__}" if isinstance(value, dict | list) else f"{value!r:.40}"


def _tensors(path: Path, adapters: Sequence[str], unnamed: bool) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The groups of training.safetensors by adapter, all finite."""
    groups: dict[str, dict[str, dict[str, Tensor]]] = {adapter: {"lora": {}, "ema": {}, "optimizer": {}} for adapter in adapters}
    every: dict[str, Tensor] = {}
    with safe_open(path / TENSORS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            adapter, _, entry = (EDIT, "", key) if unnamed else key.partition("/")
            group, _, name = entry.partition("/")
            if group not in groups.get(adapter, {}):
                raise ValueError(f"{TENSORS}: {key} is neither lora, ema nor optimizer of {', '.join(adapters)}")
            # A copy: a view would keep the file mapped, and a mapped file cannot be removed on Windows.
            every[key] = groups[adapter][group][name] = file.get_tensor(key).clone()
    if (key := first_not_finite(every)) is not None:
        raise ValueError(f"{TENSORS}: tensor {key} holds NaN or infinite values")
    return groups


def compare(path: Path, state: TrainingState, layout: Layout) -> None:
    """Refuse a checkpoint that is not what this run would have written at its step.

    An EMA may be missing where the checkpoint's own configuration had none.

    Raises:
        ValueError: names the entry that is missing, unknown or of another type or shape, and what works instead.
    """
    if difference := _difference(state, layout):
        raise ValueError(f"{path} is damaged: {difference}; {way_back(path.parent, but=path, layout=layout)}")


def _difference(state: TrainingState, layout: Layout) -> str | None:
    for name in [*layout, *state.adapters]:
        if name not in state.adapters or name not in layout:
            return f"adapter {name} is {'not part of this run' if name in state.adapters else 'missing'}"
    found = (_adapter_difference(state, name, adapter) for name, adapter in layout.items())
    return next((text for text in found if text), None)


def _adapter_difference(state: TrainingState, name: str, layout: AdapterLayout) -> str | None:
    adapter, prefix = state.adapters[name], "" if state.unnamed else f"{name}/"
    averaged = layout.lora if layout.averaged and state.config["objective"]["ema_decay"] else {}
    found = [f"{TENSORS}: {prefix}lora/{text}" for text in _compared(adapter.lora, layout.lora)]
    found += [f"{TENSORS}: {prefix}ema/{text}" for text in _compared(adapter.ema, averaged)]
    return next(iter(found), None) or _optimizer_difference(adapter.optimizer, layout, layout.trained(state.step), f"{prefix}optimizer")


def _compared(found: Mapping[Any, Any], wanted: Mapping[Any, str]) -> Iterator[str]:
    yield from (f"{name} is missing" for name in wanted if name not in found)
    yield from (f"{name} is not part of this run" for name in found if name not in wanted)
    for name, known in wanted.items():
        if name in found and kind(found[name]) != known:
            yield f"{name} is {kind(found[name])}, here it is {known}"


def _optimizer_difference(optimizer: Mapping[str, Any], layout: AdapterLayout, steps: int, prefix: str) -> str | None:
    """An expert that no step has trained yet has no state; after a step a parameter has one, or is `idle`: no gradient reaches it."""
    names = list(layout.lora)
    groups, states = optimizer["param_groups"], optimizer["state"]
    numbers = [group.get("params") if isinstance(group, dict) else None for group in groups] if isinstance(groups, list) else groups
    if numbers != [[*range(len(names))]]:
        return f"{STATE}: param_groups does not hold this run's {len(names)} parameters ({prefix})"
    if unknown := [index for index in states if index not in range(len(names))]:
        return f"{prefix}/{unknown[0]} is not part of this run"
    experts: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        experts.setdefault(name.partition(".")[0], []).append(index)
    trained = {expert: members for expert, members in experts.items() if any(states.get(index) for index in members)}
    if steps and not trained:
        trained = experts
    else:
        idle = set(idle_weights(optimizer, names))
        trained = {expert: [index for index in members if names[index] not in idle] for expert, members in trained.items()}
    for index in (index for members in trained.values() for index in members):
        for text in _compared(states.get(index, {}), layout.optimizer[names[index]]):
            return f"the optimizer's {names[index]}/{text} ({prefix}/{index})"
    return _count_difference(states, trained, steps)


def idle_weights(optimizer: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Of an adapter's parameters those that no gradient reaches: without a state, in an expert that has been trained."""
    idle, states = optimizer.get("idle", ()), optimizer["state"]
    trained = {name.partition(".")[0] for index, name in enumerate(names) if states.get(index)}
    return [name for index, name in enumerate(names) if index in idle and not states.get(index) and name.partition(".")[0] in trained]


def _count_difference(states: Mapping[int, Mapping[str, Any]], trained: Mapping[str, list[int]], steps: int) -> str | None:
    """Optimizers that count their steps have counted each of the run's once, in the expert that it trained."""
    counts = {expert: {_number(states[i].get("step")) for i in members} for expert, members in trained.items()}
    if any(None in found for found in counts.values()):
        return None  # this one does not count
    uneven = [expert for expert, found in counts.items() if len(found) > 1]
    if uneven or sum(next(iter(found)) for found in counts.values() if found) != steps:
        counted = "; ".join(f"{expert} {sorted(found)}" for expert, found in counts.items())
        return f"the optimizer has counted other steps than the run's {steps}: {counted:.200}"
    return None


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def way_back(folder: Path, *, but: Path | None = None, layout: Layout | None = None) -> str:
    """What works: the newest checkpoint that can be used, and how. The end of a message.

    Args:
        folder: the `checkpoints` folder.
        but: one that is known to be unusable.
        layout: as of `compare`; None: only what can be said without it.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        if path != but and _is_usable(path, layout):
            how = "latest" if path == found[-1] else f"{path} --discard-later"
            return f"the last good checkpoint is {path}: go on with --resume {how}"
    if not found:
        return f"there is no checkpoint in {folder}: start without --resume"
    return f"no checkpoint in {folder} can be used: move that folder away and start without --resume, or choose another output.dir"


def _is_usable(path: Path, layout: Layout | None) -> bool:
    try:
        state = _load(path)
    except (OSError, SafetensorError, ValueError):
        return False
    return layout is None or _difference(state, layout) is None


def find(folder: Path, resume: str) -> Path:
    """The checkpoint that `--resume latest` or `--resume <folder>` names.

    Raises:
        ValueError: there is none.
    """
    if not resume.strip():
        raise ValueError('--resume "": give latest or the folder of a checkpoint, or leave --resume out to start anew')
    if resume != "latest":
        if not Path(resume).is_dir():
            raise ValueError(f"--resume {resume}: no such folder; {way_back(folder)}")
        return Path(resume)
    found = checkpoints(folder)
    if not found:
        raise ValueError(f"--resume latest: no checkpoint in {folder}; start without --resume")
    return found[-1]


def later(folder: Path, path: Path) -> list[Path]:
    """Checkpoints in `folder` after `path`, which is one of them."""
    found = [each.resolve() for each in checkpoints(folder)]
    return checkpoints(folder)[found.index(path.resolve()) + 1 :]


def tensors_of(adapter: AdapterState) -> dict[str, Tensor]:
    """All tensors of an adapter by their entries in training.safetensors."""
    tensors, _ = split_optimizer(adapter.optimizer)
    return tensors | {f"lora/{k}": v for k, v in adapter.lora.items()} | {f"ema/{k}": v for k, v in adapter.ema.items()}


def split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """state_dict() -> flat tensors and JSON scalars. Works for torch's and bitsandbytes' AdamW: any per-parameter state.

    `idle`, where there are some, are the parameters without a state: no gradient reached them, or their expert's turn has not come.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}}
    for index, values in state["state"].items():
        scalars["state"][str(index)] = {}
        for name, value in _flat(values):
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                scalars["state"][str(index)][name] = value
    if idle := [index for group in state["param_groups"] for index in group["params"] if index not in state["state"]]:
        scalars["idle"] = idle
    return tensors, scalars


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """bitsandbytes hides its quantised moments in a dictionary of their own, and loads them with or without it."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def _join_optimizer(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {_index(index): dict(values) for index, values in scalars["state"].items()}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        state.setdefault(_index(index), {})[name] = value
    return {"param_groups": scalars.get("param_groups"), "state": state, "idle": scalars.get("idle", [])}


def _index(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise ValueError(f"optimizer/{text:.40} is no parameter's number")
    return int(text)
