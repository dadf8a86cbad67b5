"""Benchmarks by name, a file each: what it reads, where that is published, and its groups. Nothing is downloaded."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from byg_plugin.evaluation.benchmarks.base import Benchmark, checked

NAMES = ("gedit", "imgedit", "longtail", "video")


def read(name: str, data: Path | None, captions: Path | None = None) -> Benchmark:
    """A benchmark of the data that lie in a folder.

    Args:
        name: one of `NAMES`.
        data: the folder; each file says its layout.
        captions: JSONL of `id`, `src_caption`, `tgt_caption`, for benchmarks that have none.

    Raises:
        ValueError: data are missing (names where they are published and the layout), or damaged.
    """
    module = import_module(f"{__name__}.{name}")
    if data is None or not data.is_dir():
        said = "give --data DIR" if data is None else f"--data {data}: no such folder"
        raise ValueError(f"--benchmark {name}: {said}. {module.LAYOUT}")
    return checked(module.read(data), captions)
