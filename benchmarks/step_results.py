"""The results file of a shape: measured on a device, or counted without one."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import provenance
from benchmarks.step_bench import Bench
from benchmarks.step_figures import FAST
from benchmarks.step_host import times
from benchmarks.step_shapes import Shape, preset_of, shape_named
from byg_plugin import timesteps
from byg_plugin.models import wan


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on; no names, no paths."""
    found = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30) if hasattr(os, "sysconf") else None,
        "torch": torch.__version__,
        "device": device.type,
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def commit() -> dict[str, Any]:
    """The commit, and whether the code that a step runs differed from it."""
    head, changed = provenance.commit("byg_plugin/hosts", "byg_plugin/objectives", "byg_plugin/models", "benchmarks/step*.py")
    return {"hash": head, "modified": changed}


def _shape_record(name: str, shape: Shape) -> dict[str, Any]:
    return {
        "name": name,
        "transformer": shape.transformer,
        "family": shape.family,
        "t": shape.t,
        "noisy_tokens": shape.frames * (shape.side // 2) ** 2,
        "text_tokens": shape.text_tokens,
        "batch": shape.batch,
        "rank": shape.rank,
        "dtype": shape.dtype,
        "mixed_precision": shape.mixed_precision,
    }


def measure(name: str, device: torch.device, repeats: int, clock: str) -> dict[str, Any]:
    """The whole results file of a shape."""
    made_by = commit()
    bench = Bench(shape_named(name), device, clock)
    rows = bench.measure(repeats)
    shape = bench.shape
    return {
        "machine": machine(device),
        "commit": made_by,
        "shape": _shape_record(name, shape),
        "matmul_share": bench.matmul_share(),
        "resident_bytes": bench.resident_bytes(),
        "repeats": repeats,
        "clock": clock,
        "rows": rows,
    }


COUNTED = ("paired", "printed", "frozen 2", "merged", "default, fewer", "merged, fewer", FAST)


def count(name: str) -> dict[str, Any]:
    """FLOPs of a shape's steps on the meta device: the same code, no weights and no arithmetic. Activations kept and recomputed."""
    made_by = commit()
    # Neither 16-bit weights nor autocast change what is multiplied, and the meta device knows neither.
    shape = replace(shape_named(name), checkpointing=(False, True), dtype="float32", mixed_precision="no")
    with _as_on_a_device(shape):
        bench = Bench(shape, torch.device("meta"))
        bench.host.device = torch.device("cpu")  # what autocast asks for
        rows = [bench.counted(row, setting) for row, setting in bench.plan if row.name in COUNTED]
    return {
        "machine": {"torch": torch.__version__, "device": "meta"},
        "commit": made_by,
        "shape": _shape_record(name, shape),
        "rows": rows,
    }


@contextmanager
def _as_on_a_device(shape: Shape) -> Iterator[None]:
    """What the meta device lacks: torch.is_autocast_enabled and torch.autocast raise for it, and its tensors have no values."""
    autocast, exact_time, as_int = torch.is_autocast_enabled, wan.exact_time, Tensor.__int__
    # The one number that a step reads from a tensor is the rollout's node at t.
    node = int(timesteps.nodes_through(timesteps.uniform_nodes(preset_of(shape).rollout_steps), times(shape))[1].max())
    torch.is_autocast_enabled = lambda *device: False if device == ("meta",) else autocast(*device)  # type: ignore[assignment]
    wan.exact_time = lambda network: nullcontext()
    Tensor.__int__ = lambda tensor: node if tensor.is_meta else as_int(tensor)  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.is_autocast_enabled, wan.exact_time = autocast, exact_time
        Tensor.__int__ = as_int  # type: ignore[method-assign]
