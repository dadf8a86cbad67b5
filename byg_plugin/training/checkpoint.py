"""Checkpoints: complete, atomic, safetensors and JSON only.

`<output.dir>/checkpoints/step-000500/` holds
    <name>.safetensors        the LoRA, ready for use
    <name>-ema.safetensors    the same with the EMA weights
    training.safetensors      exact LoRA and EMA tensors and the optimizer's, as trained (no scale folded)
    state.json                step, optimizer scalars, versions, the configuration
A folder under this name is complete: it is written beside under another name, synced, and renamed. Randomness and data
order are functions of (seed, step) and need no state (see `randomness.py`).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as save_private_file
from torch import Tensor

logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{6,})")
_PARTIAL = ".partial-"
TENSORS = "training.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run continues from."""

    step: int
    """Optimizer steps done."""
    lora: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    """`torch.optim.Optimizer.state_dict()`."""
    config: dict[str, Any]
    """The configuration the state was trained with."""
    data: str = ""
    """Digest of the tuples and buckets: the order of batches is a function of them."""


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()]
    return [path for _, path in sorted(found)]


def save(
    folder: Path,
    state: TrainingState,
    lora_files: Mapping[str, tuple[Mapping[str, Tensor], Mapping[str, str]]],
    *,
    keep_last: int,
    extra: Mapping[str, Any],
) -> Path:
    """Write one checkpoint atomically, then drop the oldest beyond `keep_last` (0 keeps all).

    Args:
        folder: the `checkpoints` folder.
        state: what a run continues from.
        lora_files: file name -> (tensors, metadata) of the LoRA files that lie in the checkpoint.
        keep_last: checkpoints kept.
        extra: more of state.json (versions, command).

    Raises:
        ValueError: the disk is full or not writable; earlier checkpoints are as they were.
    """
    final = folder / f"step-{state.step:06d}"
    if final.exists():
        raise ValueError(f"checkpoint {final} exists already and is not overwritten: choose another output.dir")
    partial = folder / f"{_PARTIAL}{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover)
        partial.mkdir()
        for name, (tensors, metadata) in lora_files.items():
            save_file(dict(tensors), partial / name, metadata={"format": "pt", **metadata})
        tensors, scalars = _split_optimizer(state.optimizer)
        tensors |= {f"lora/{k}": v for k, v in state.lora.items()} | {f"ema/{k}": v for k, v in state.ema.items()}
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, partial / TENSORS)
        record = {"step": state.step, "optimizer": scalars, "config": state.config, "data": state.data, **extra}
        (partial / "state.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        _sync(partial)
        _rename_folder(partial, final)
        _sync_folder(folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in its own class
        raise ValueError(_cannot_save(final, error, checkpoints(folder))) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if keep_last:
        for old in checkpoints(folder)[:-keep_last]:
            _remove(old)
    return final


def _rename_folder(partial: Path, final: Path) -> None:
    """Windows refuses while a virus scanner or an indexer looks at a new file inside: that passes within seconds."""
    for _ in range(20):
        try:
            return os.replace(partial, final)
        except PermissionError:
            if os.name != "nt":
                raise
            time.sleep(0.25)
    os.replace(partial, final)


def _remove(old: Path) -> None:
    """Renamed first: a kill in the middle must not leave half a checkpoint under a complete one's name."""
    doomed = old.with_name(f"{_PARTIAL}{old.name}-{os.getpid()}")
    try:
        os.replace(old, doomed)
        shutil.rmtree(doomed)
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
    return f"cannot write {final}: {error}; {kept}. Make room or choose another output.dir, then go on with --resume latest"


def load(path: Path) -> TrainingState:
    """Read a checkpoint.

    Raises:
        ValueError: it is incomplete, damaged or not ours.
    """
    try:
        return _load(path)
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); resume from an earlier checkpoint") from error


def _load(path: Path) -> TrainingState:
    if not (path / "state.json").is_file() or not (path / TENSORS).is_file():
        raise ValueError(f"{path} is not a checkpoint: it has no state.json and {TENSORS}")
    record = json.loads((path / "state.json").read_text(encoding="utf-8"))
    groups: dict[str, dict[str, Tensor]] = {"lora": {}, "ema": {}, "optimizer": {}}
    with safe_open(path / TENSORS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            group, _, name = key.partition("/")
            # A copy: a view would keep the file mapped, and a mapped file cannot be removed on Windows.
            groups[group][name] = file.get_tensor(key).clone()
    return TrainingState(
        step=record["step"],
        lora=groups["lora"],
        ema=groups["ema"],
        optimizer=_join_optimizer(groups["optimizer"], record["optimizer"]),
        config=record["config"],
        data=record.get("data", ""),
    )


def find(folder: Path, resume: str) -> Path:
    """The checkpoint that `--resume latest` or `--resume <folder>` names.

    Raises:
        ValueError: there is none.
    """
    if resume != "latest":
        return Path(resume)
    found = checkpoints(folder)
    if not found:
        raise ValueError(f"--resume latest: no checkpoint in {folder}; start without --resume")
    return found[-1]


def _split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """state_dict() -> flat tensors and JSON scalars. Works for torch's and bitsandbytes' AdamW: any per-parameter state."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}}
    for index, values in state["state"].items():
        scalars["state"][str(index)] = {}
        for name, value in _flat(values):
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
            else:
                scalars["state"][str(index)][name] = value
    return tensors, scalars


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """bitsandbytes hides its quantised moments in a dictionary of their own, and loads them with or without it."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def _join_optimizer(tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in scalars["state"].items()}
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        state.setdefault(int(index), {})[name] = value
    return {"param_groups": scalars["param_groups"], "state": state}


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows cannot open folders and needs no such sync."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
