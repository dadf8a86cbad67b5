"""log.jsonl, validation.jsonl and evaluation.jsonl: a line a step, that a resumed run goes on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from byg_plugin.documents import json_value
from byg_plugin.folders import write_text

logger = get_logger(__name__)


def append(path: Path, step: int, values: Mapping[str, float]) -> None:
    """One more line.

    Raises:
        OSError: the log cannot be written.
    """
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **values}) + "\n")


def steps_in(path: Path) -> set[int]:
    """The steps that have a line."""
    return {step for line in _lines(path) if (step := _step_of(line)) is not None}


def records(path: Path) -> list[dict[str, Any]]:
    """The lines that we wrote, in their order."""
    return [record for line in _lines(path) if (record := _record(line)) is not None]


def drop_lines_after(path: Path, step: int) -> None:
    """Lines that are none of ours stay where they are.

    Raises:
        OSError: the log cannot be read or written.
    """
    if not path.is_file():
        return
    steps = [(line, _step_of(line)) for line in _lines(path)]
    if foreign := [line for line, found in steps if found is None]:
        logger.warning("%s: %d lines are not a record of a step and are left as they are, e.g. %.60r", path, len(foreign), foreign[0])
    write_text(path, "".join(f"{line}\n" for line, found in steps if found is None or found <= step))


def _step_of(line: str) -> int | None:
    """The step of a line that we wrote; None: someone else's."""
    record = _record(line)
    return None if record is None else record["step"]


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json_value(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _lines(path: Path) -> list[str]:
    """The lines of a log with their ends; one that a kill or a full disk cut off is no line."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
    return [line for line in text.split("\n")[:-1] if line]
