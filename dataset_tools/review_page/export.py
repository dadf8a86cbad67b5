"""From a review to the tuples file that training takes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from byg_plugin.data.tuples import read_tuples_file
from byg_plugin.journal import read_records, write_records

from .items import read_items
from .store import journal_path, read_decisions

REVIEWED = ("kept", "fixed")


def export_reviewed(tuples: Path, target: Path, root: Path, *, rules: Literal["error", "warn"] = "error") -> Counter[str]:
    """Write the kept and fixed tuples as a tuples file that the trainer takes; of a review that goes on, what is decided so far.

    Where `target` is there already, its sources keep the splits that hold_out.py has marked them with.

    Args:
        root: what relative sources start from; the trainer needs the same as dataset.image_root, or the file in that folder.
        rules: as dataset.rules, which the trainer needs then too: whether texts that break a hard rule are refused.

    Returns:
        How many tuples have each status.

    Raises:
        ValueError: nothing is kept, `target` is a file of the review or no tuples file, or the trainer would refuse a tuple: nothing is
            written.
    """
    undecided = read_items(tuples)
    if target.resolve() in (tuples.resolve(), journal_path(tuples).resolve()):
        raise ValueError(f"--export {target}: is a file of the review itself; choose another name")
    items, _, _ = read_decisions(journal_path(tuples), undecided)
    chosen = [item for item in items if item.status in REVIEWED]
    if not chosen:
        raise ValueError(f"{tuples}: nothing in it is kept or fixed so far ({journal_path(tuples)}); review it first")
    lines = [item.line for item in chosen]

    def trainer_takes(written: Path) -> None:
        try:
            read_tuples_file(written, root, rules=rules)
        except ValueError as error:
            raise ValueError(_about_lines(str(error), lines, written, tuples)) from error

    marks = _splits(target)
    write_records(target, (_marked(item.reviewed(), marks) for item in chosen), trainer_takes)
    return Counter(item.status for item in items)


def _splits(target: Path) -> dict[str, str]:
    """The marks of an earlier export, by source."""
    if not target.exists():
        return {}
    try:
        records = list(read_records(target))
        return {record["source"]: record["split"] for record in records if record["source"] and record.get("split")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--export {target}: is there and is no tuples file, so it is not written over; choose another name") from error


def _marked(record: dict[str, Any], marks: Mapping[str, str]) -> dict[str, Any]:
    mark = marks.get(record["source"])
    return record if mark is None or record.get("split") else {**record, "split": mark}


def _about_lines(message: str, lines: Sequence[int], written: Path, tuples: Path) -> str:
    """A message on the file that was to be written, with the line numbers of the file under review."""
    named = r"(?m)(?<=^  - )line (\d+)(?=:)|(?<=of |as )line (\d+)(?=;)"
    message = re.sub(named, lambda m: f"line {lines[int(m[1] or m[2]) - 1]}", message)
    message = message.replace('dataset.rules = "warn"', '--rules warn here, and dataset.rules = "warn"')
    return message.replace(str(written), f"kept tuples of {tuples}") + "\nfix or discard them on the page, then export again"
