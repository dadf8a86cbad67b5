"""ImgEdit-Bench's basic edits (Ye et al. 2025; PKU-YuanGroup/ImgEdit): 737 tasks in nine groups; the judge's metric is `imgedit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from byg_plugin.data.tuples import load_json
from byg_plugin.documents import utf8
from byg_plugin.evaluation.benchmarks.base import Benchmark, Task

LAYOUT = (
    "ImgEdit-Bench is published at https://github.com/PKU-YuanGroup/ImgEdit (Benchmark/Basic/basic_edit.json) and "
    "https://huggingface.co/datasets/sysuyy/ImgEdit (Benchmark.tar, its images). Expected: DIR/basic_edit.json and the images at "
    "DIR/original_images/ID or DIR/ID, e.g. DIR/original_images/animal/000342021.jpg"
)
GROUPS = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")


def read(data: Path) -> Benchmark:
    """The tasks of a folder.

    Raises:
        ValueError: it is none.
    """
    path = data / "basic_edit.json"
    if not path.is_file():
        raise ValueError(f"--benchmark imgedit: {path}: no such file. {LAYOUT}")
    try:
        edits = load_json(utf8(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"--benchmark imgedit: {path}: not JSON: {error}") from error
    wrong = [key for key, edit in edits.items() if not _is_edit(edit)] if isinstance(edits, dict) else ["(no object)"]
    if wrong:
        raise ValueError(f"--benchmark imgedit: {path}: {wrong[0]} has not id, prompt and edit_type ({', '.join(GROUPS)}). {LAYOUT}")
    folder = data / "original_images"
    folder = folder if folder.is_dir() else data
    tasks = [
        Task(id=key, source=folder / edit["id"], instruction=edit["prompt"], group=edit["edit_type"])
        for group in GROUPS
        for key, edit in edits.items()
        if edit["edit_type"] == group
    ]
    means = {"mean of groups": [{task.id for task in tasks if task.group == group} for group in GROUPS]}
    return Benchmark(name="imgedit", tasks=tasks, published=737, means=means)


def _is_edit(edit: Any) -> bool:
    return isinstance(edit, dict) and all(isinstance(edit.get(name), str) for name in ("id", "prompt")) and edit.get("edit_type") in GROUPS
