"""`scores.jsonl`: what has been scored, one line an item and metric. A line counts as long as what it was made of is unchanged.

The later of two lines counts. Lines are whole or not there (`journal.Journal`): a kill loses the item in flight alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from byg_plugin.evaluation import frames
from byg_plugin.evaluation.items import Item
from byg_plugin.evaluation.metrics.answers import JudgedMetric
from byg_plugin.evaluation.metrics.base import Metric, Scores
from byg_plugin.journal import Journal, mend_last_line, numbered_records
from byg_plugin.user_files import file_digest

NAME = "scores.jsonl"
_RECIPE = 2  # raise when a metric gives other scores of the same item
_TEXTS = ("instruction", "src_caption", "tgt_caption")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The scores of one edit, by column of all its metrics; None where a column is not defined for it."""

    id: str
    edit_type: str | None = None
    scores: Scores = field(default_factory=dict)


def score(
    items: Sequence[Item], metrics: Mapping[str, Metric], folder: Path, on_item: Callable[[], object] = lambda: None
) -> tuple[list[Row], int]:
    """Score every item by every metric, but for what the folder's file has already.

    Args:
        items: of different ids.
        metrics: by name.
        folder: of the file; made where it is not there.
        on_item: called after each.

    Returns:
        A row an item, in their order, and how many items were looked at anew.

    Raises:
        ValueError: a file cannot be read or written, or a score is not finite; names it. What was scored before is in the file.
    """
    journal = Journal(folder / NAME)
    try:
        done = _done(folder / NAME)
        rows, looked_at = [], 0
        for item in items:
            contents = _contents(item)
            due = {name: _key(item, contents, name, metric) for name, metric in metrics.items()}
            due = {name: key for name, key in due.items() if (item.id, name) not in done or done[item.id, name][0] != key}
            if due:
                looked_at += 1
                seen = frames.look(item)
                scored = {name: (key, _finite(item, name, metrics[name](seen))) for name, key in due.items()}
                journal.append(_line(item, name, metrics[name], *one) for name, one in scored.items())
                done |= {(item.id, name): one for name, one in scored.items()}
            merged = {column: value for name in metrics for column, value in done[item.id, name][1].items()}
            rows.append(Row(id=item.id, edit_type=item.edit_type, scores=merged))
            on_item()
    finally:
        journal.close()
    return rows, looked_at


def read(folder: Path) -> list[Row]:
    """The rows of another run's file.

    Raises:
        ValueError: there is none, or a line is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such file; byg_plugin/evaluate.py --out {folder} writes it")
    rows: dict[str, Row] = {}
    for number, record in numbered_records(path):
        name, _, _, scores = _checked(record, path, number)
        earlier = rows.get(name, Row(id=name))
        rows[name] = Row(id=name, edit_type=record.get("edit_type"), scores=earlier.scores | scores)
    return list(rows.values())


def same_settings(items: Sequence[Item], metrics: Mapping[str, Metric], folder: Path) -> list[str]:
    """Metrics of which another run's file does not say the settings: files of earlier versions.

    Args:
        items, metrics: of this run.
        folder: of the other run's file.

    Raises:
        ValueError: an item was scored with other settings there; names the metric and both.
    """
    ids, found = {item.id for item in items}, {}
    for _, record in numbered_records(folder / NAME):
        if record.get("id") in ids and record.get("metric") in metrics:
            found[record["id"], record["metric"]] = record.get("settings")
    for (_, name), theirs in found.items():
        ours = json.loads(json.dumps(dict(metrics[name].settings)))
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"--compare {folder}: {name} was scored there with {json.dumps(theirs)} and here with {json.dumps(ours)}, which cannot be "
                f"compared; score both runs alike, or leave {name} out of --metrics"
            )
    return list(dict.fromkeys(name for (_, name), theirs in found.items() if theirs is None))


def _done(path: Path) -> dict[tuple[str, str], tuple[str, Scores]]:
    mend_last_line(path)
    lines = (_checked(record, path, number) for number, record in numbered_records(path))
    return {(item, metric): (key, scores) for item, metric, key, scores in lines}


def _checked(record: Mapping[str, object], path: Path, number: int) -> tuple[str, str, str, Scores]:
    item, metric, key, scores = (record.get(name) for name in ("id", "metric", "of", "scores"))
    known = isinstance(scores, dict) and all(value is None or type(value) in (int, float) for value in scores.values())
    if not (isinstance(item, str) and isinstance(metric, str) and isinstance(key, str) and known):
        raise ValueError(f"{path}: line {number} has not the scores of an item; remove it")
    assert isinstance(scores, dict)
    return item, metric, key, scores


def _line(item: Item, name: str, metric: Metric, key: str, scores: Scores) -> dict[str, object]:
    settings = dict(metric.settings)
    return {"id": item.id, "edit_type": item.edit_type, "metric": name, "settings": settings, "of": key, "scores": scores}


def _finite(item: Item, metric: str, scores: Scores) -> Scores:
    wrong = [f"{column} = {value}" for column, value in scores.items() if value is not None and not math.isfinite(value)]
    if wrong:
        raise ValueError(f"{item.id}: {', '.join(wrong)} is not finite; look at {item.edit}, or leave {metric} out of --metrics")
    return scores


def _contents(item: Item) -> str:
    """What an item's scores are made of, without the metric."""
    files = [path and file_digest(path) for path in (item.source, item.edit, item.reference, item.mask)]
    return json.dumps([files, [getattr(item, name) for name in _TEXTS], item.size])


def _key(item: Item, contents: str, name: str, metric: Metric) -> str:
    made_of: list[object] = [_RECIPE, contents, name, dict(metric.settings)]
    if isinstance(metric, JudgedMetric):
        made_of.append(metric.judged.answers(item))
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
