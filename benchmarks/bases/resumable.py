"""What survives a kill: the states of trainings, and their curve."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from benchmarks.bases.common import Average, Log
from byg_plugin.training.checkpoint import save_file


class Training:
    """One resumable training: its state in one file, which is whole at any time.

    Args:
        path: the file.
        settings: what the state is a function of.
        minutes: between two savings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], minutes: float):
        self._path, self._seconds = path, 60 * minutes
        self._settings = json.dumps(settings, sort_keys=True)
        self._written = time.perf_counter()
        self._cpu = time.process_time()
        self._spent = 0.0

    def load(self, module: nn.Module, optimizers: list[torch.optim.Optimizer], average: Average | None) -> int:
        """Put what was saved into them and return how many steps are done.

        Raises:
            ValueError: the file was made with other settings.
        """
        if not self._path.is_file():
            return 0
        with safe_open(self._path, framework="pt") as file:
            header = file.metadata()
            if header["settings"] != self._settings:
                raise ValueError(f"--work: {self._path} was made with other settings; delete it, or choose another folder")
            module.load_state_dict({name[7:]: file.get_tensor(name) for name in file.keys() if name.startswith("module.")})  # noqa: SIM118
            for number, optimizer in enumerate(optimizers):
                _load_optimizer(optimizer, f"optimizer.{number}.", file)
            if average:
                average.step = int(header["step"])
                average.mean = [file.get_tensor(f"average.{i}") for i in range(len(average.mean))]
        self._spent = float(header["cpu_seconds"])
        return int(header["step"])

    def cpu_seconds(self) -> float:
        """Of this training, over all its runs."""
        return self._spent + time.process_time() - self._cpu

    def save(self, step: int, module: nn.Module, optimizers: list[torch.optim.Optimizer], average: Average | None, *, now: bool) -> None:
        """Write the state if it is time, or `now`."""
        if not now and time.perf_counter() - self._written < self._seconds:
            return
        tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
        for number, optimizer in enumerate(optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in state.items()}
        if average:
            tensors |= {f"average.{i}": value for i, value in enumerate(average.mean)}
        header = {"step": str(step), "settings": self._settings, "cpu_seconds": f"{self.cpu_seconds():.1f}"}
        # Copies: safetensors refuses what shares memory, as tied embeddings do.
        partial = self._path.with_name(f".partial-{self._path.name}")
        save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, partial, metadata=header)
        os.replace(partial, self._path)
        self._written = time.perf_counter()


def _load_optimizer(optimizer: torch.optim.Optimizer, prefix: str, file: Any) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name in (name for name in file.keys() if name.startswith(prefix)):  # noqa: SIM118
        index, _, key = name[len(prefix) :].partition(".")
        state.setdefault(int(index), {})[key] = file.get_tensor(name)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


Curve = dict[tuple[str, int], dict[str, Any]]


def read_curve(path: Path) -> Curve:
    """Rows by stage and step; a line that a kill cut off is dropped."""
    lines: Curve = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            row = json.loads(text)
            lines[row["stage"], row["step"]] = row
    return lines


def curve_log(path: Path) -> Log:
    """Lines of JSON; a step that is made again after a kill replaces its line."""
    lines = read_curve(path)

    def log(stage: str, step: int, values: dict[str, float]) -> None:
        lines[stage, step] = {"stage": stage, "step": step} | {name: round(value, 5) for name, value in values.items()}
        print(json.dumps(lines[stage, step]), flush=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in lines.values()), encoding="utf-8")

    return log
