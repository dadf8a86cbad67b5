"""GEdit-Bench's English subset (Liu et al. 2025; stepfun-ai/GEdit-Bench on the hub): 606 tasks in eleven groups.

The benchmark's Overall is the mean of the groups' means; the judge's metric is `viescore`. `(intersection)` is the same over the tasks
that every method of the original paper has answered.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from byg_plugin.evaluation.benchmarks.base import Benchmark, Task
from byg_plugin.journal import numbered_records

LAYOUT = (
    "GEdit-Bench is published at https://huggingface.co/datasets/stepfun-ai/GEdit-Bench as Parquet; docs/evaluation.md has the line that "
    "exports it. Expected: DIR/gedit.jsonl (key, task_type, instruction, instruction_language, Intersection_exist) and DIR/images/KEY.png"
)
GROUPS = (
    *("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change"),
    *("subject-add", "subject-remove", "subject-replace", "text_change", "tone_transfer"),
)
_FIELDS = {"key": str, "task_type": str, "instruction": str, "instruction_language": str, "Intersection_exist": bool}


def read(data: Path) -> Benchmark:
    """The English tasks of an exported folder.

    Raises:
        ValueError: it is none.
    """
    path = data / "gedit.jsonl"
    if not path.is_file():
        raise ValueError(f"--benchmark gedit: {path}: no such file. {LAYOUT}")
    rows = [_checked(path, number, row) for number, row in numbered_records(path)]
    english = [row for row in rows if row["instruction_language"] == "en"]
    tasks = [
        Task(id=row["key"], source=data / "images" / f"{row['key']}.png", instruction=row["instruction"], group=row["task_type"])
        for group in GROUPS
        for row in english
        if row["task_type"] == group
    ]
    both = {row["key"] for row in english if row["Intersection_exist"]}
    ids = [{task.id for task in tasks if task.group == group} for group in GROUPS]
    means = {"mean of groups": ids, "mean of groups (intersection)": [one & both for one in ids]}
    return Benchmark(name="gedit", tasks=tasks, published=606, means=means)


def _checked(path: Path, number: int, row: dict[str, Any]) -> dict[str, Any]:
    wrong = [name for name, kind in _FIELDS.items() if not isinstance(row.get(name), kind)]
    if wrong or row["task_type"] not in GROUPS:
        wrong = wrong or [f"task_type = {row['task_type']!r}"]
        raise ValueError(f"--benchmark gedit: {path}: line {number}: {', '.join(wrong)} is missing or wrong. {LAYOUT}")
    return row
