"""What a benchmark is: tasks by groups, the tuples that edit.py edits, and the rows of its table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from byg_plugin.data.placeholders import PLACEHOLDERS
from byg_plugin.evaluation.items import Item, refuse
from byg_plugin.folders import write_text
from byg_plugin.journal import numbered_records, write_records

TUPLES, MANIFEST = "tuples.jsonl", "benchmark.json"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One edit to make.

    Attributes:
        id: of the tuple and of its edit.
        source: to be edited.
        instruction: what is asked for.
        group: the row of the table that it counts in.
        src_caption, tgt_caption, reverse_instruction: None where the benchmark has none.
    """

    id: str
    source: Path
    instruction: str
    group: str
    src_caption: str | None = None
    tgt_caption: str | None = None
    reverse_instruction: str | None = None


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark as its data are on this machine.

    Attributes:
        name: as the command line calls it.
        tasks: of different ids.
        published: how many tasks the published one has.
        rows: more rows of the table than the tasks' groups: ids by name.
        means: rows that are means of groups' means: by name, the ids of each group.
    """

    name: str
    tasks: Sequence[Task]
    published: int
    rows: Mapping[str, Collection[str]] = field(default_factory=dict)
    means: Mapping[str, Sequence[Collection[str]]] = field(default_factory=dict)

    def groups(self) -> dict[str, set[str]]:
        """Ids by row of the table, the tasks' own groups first."""
        found: dict[str, set[str]] = {}
        for task in self.tasks:
            found.setdefault(task.group, set()).add(task.id)
        return found | {name: {*ids} for name, ids in self.rows.items()}

    def write(self, folder: Path) -> Path:
        """`tuples.jsonl`, for edit.py, and `benchmark.json`, which says the groups; returns the first.

        Raises:
            ValueError: they cannot be written, or would overwrite tuples that are no benchmark's.
        """
        if (folder / TUPLES).exists() and not (folder / MANIFEST).exists():
            raise ValueError(f"--out {folder}: its {TUPLES}, with no {MANIFEST} beside it, is not ours to overwrite; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        groups = {name: sorted(ids) for name, ids in self.groups().items()}
        # First, for it says whose the tuples are, after a kill too.
        write_text(folder / MANIFEST, json.dumps({"benchmark": self.name, "groups": groups}, indent=1) + "\n")
        write_records(folder / TUPLES, (_record(task) for task in self.tasks))
        return folder / TUPLES

    def items(self, edits: Sequence[Item]) -> list[Item]:
        """The edits of all tasks, with the benchmark's own texts and groups.

        Raises:
            ValueError: a task has no edit, or an edit is of none; the first 20 by name.
        """
        by_id = {item.id: item for item in edits}
        known = {task.id for task in self.tasks}
        problems = [f"{task.id}: no edit of this task" for task in self.tasks if task.id not in by_id]
        problems += [f"{name}: an edit of no task" for name in by_id if name not in known]
        refuse(problems, f"--benchmark {self.name}")
        texts = ("instruction", "src_caption", "tgt_caption")
        return [
            replace(by_id[task.id], edit_type=task.group, reference=None, **{name: getattr(task, name) for name in texts})
            for task in self.tasks
        ]


def checked(benchmark: Benchmark, captions: Path | None) -> Benchmark:
    """The benchmark, once its ids are unique and its sources exist, with captions of a file (JSONL: id, src_caption, tgt_caption).

    Raises:
        ValueError: they are not, or the file is damaged.
    """
    twice = [name for name, count in Counter(task.id for task in benchmark.tasks).items() if count > 1]
    problems = [f"{name}: two tasks have this id" for name in twice]
    problems += [f"{task.id}: no such file {task.source}" for task in benchmark.tasks if not task.source.is_file()]
    problems += [f"{task.id}: its instruction is empty" for task in benchmark.tasks if not task.instruction.strip()]
    refuse(problems, f"--benchmark {benchmark.name}")
    if not benchmark.tasks:
        raise ValueError(f"--benchmark {benchmark.name}: no task in its data")
    # As the tuples' reader takes them: what was edited and judged by one instruction is found again.
    benchmark = replace(benchmark, tasks=[replace(task, instruction=task.instruction.strip()) for task in benchmark.tasks])
    if captions is None:
        return benchmark
    known = _captions(captions)
    if not known.keys() & {task.id for task in benchmark.tasks}:
        raise ValueError(f"--captions {captions}: none of its ids is a task's, such as {benchmark.tasks[0].id}")
    return replace(benchmark, tasks=[replace(task, **known.get(task.id, {})) for task in benchmark.tasks])


def _captions(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"--captions {path}: no such file")
    found = {}
    for number, record in numbered_records(path):
        texts = {name: record.get(name) for name in ("src_caption", "tgt_caption")}
        name = record.get("id")
        if not (isinstance(name, str) and all(isinstance(text, str) and text.strip() for text in texts.values())):
            raise ValueError(f"--captions {path}: line {number} needs the texts id, src_caption and tgt_caption")
        found[name] = {key: str(text) for key, text in texts.items()}
    return found


def _record(task: Task) -> dict[str, str]:
    texts = {name: getattr(task, name) or unknown for name, unknown in PLACEHOLDERS.items()}
    return {"source": str(task.source.absolute()), "instruction": task.instruction, **texts, "edit_type": task.group, "id": task.id}
