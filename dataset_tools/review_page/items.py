"""The tuples of a file under review, each with what is decided on it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import is_unicode, load_json
from byg_plugin.documents import other_encoding

_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class Item:
    """One tuple of the file with what was decided.

    Attributes:
        line: its line in the tuples file, from 1.
        key: names it in the journal; the same wherever the line stands as long as its contents are the same.
        record: as the file has it.
        texts: the four texts as they are now.
        revision: how many lines of the journal are about it.
        writer: which page wrote last, and its count of writes.
    """

    line: int
    key: str
    record: Mapping[str, Any]
    status: str
    texts: Mapping[str, str]
    revision: int = 0
    writer: tuple[str, int] = ("", 0)

    @property
    def edited(self) -> bool:
        """Whether a text differs from the file's."""
        return self.texts != original_texts(self.record)

    def reviewed(self) -> dict[str, Any]:
        """The record with its texts as they are now; all other fields as they were."""
        return {**self.record, **self.texts}


def original_texts(record: Mapping[str, Any]) -> dict[str, str]:
    """The four texts of a record without blanks at their ends; a missing one is empty."""
    return {name: (record.get(name) or "").strip() for name in ROLES}


def read_items(tuples: Path) -> list[Item]:
    """The tuples of a JSONL file, all of them open.

    Files they name may be missing, and texts may be empty: that is what a review finds.

    Raises:
        ValueError: no such file, or lines that are no records (the first 20 in words).
    """
    if not tuples.is_file():
        raise ValueError(f"{tuples}: no such file; a review reads one JSONL file of tuples")
    items: list[Item] = []
    problems: list[str] = []
    times_seen: Counter[str] = Counter()
    for line, text in _lines(tuples):
        try:
            record = _record(text)
        except ValueError as error:
            problems.append(f"line {line}: {error}")
            continue
        key = _key(record)
        times_seen[key] += 1
        if times_seen[key] > 1:  # each of several equal lines is decided by itself
            key = f"{key}#{times_seen[key]}"
        items.append(Item(line=line, key=key, record=record, status="open", texts=original_texts(record)))
    if problems:
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        listed = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN])
        raise ValueError(f"{tuples}: {len(problems)} line(s) are no tuples:\n{listed}{more}")
    if not items:
        raise ValueError(f"{tuples}: no tuples in it; each line is a JSON object with source, {', '.join(ROLES)}")
    return items


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    data = path.read_bytes()
    if other := other_encoding(data):
        raise ValueError(f"{path}: {other} text; save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {bad} is not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    # Not splitlines(): captions may hold U+2028 and the like, which it would split at.
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _record(text: str) -> dict[str, Any]:
    record = load_json(text)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if not isinstance(record.get("source"), str) or not record["source"].strip():
        raise ValueError(f"source = {record.get('source')!r} is not a text")
    for name in (*ROLES, "edit_type", "target", "id"):
        if not isinstance(record.get(name), str | None):
            raise ValueError(f"{name} = {record[name]!r} is not a text")
    if not is_unicode(json.dumps(record, ensure_ascii=False)):
        raise ValueError("a field holds a broken character")
    return record


def _key(record: Mapping[str, Any]) -> str:
    contents = [record["source"], *original_texts(record).values(), *(record.get(name) for name in ("target", "edit_type", "id"))]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]
