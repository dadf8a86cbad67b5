"""The state of a review: a tuples file, which is never changed, and a journal beside it with one line a decision."""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from byg_plugin.data.tuples import TEXTS, read_tuples_file

STATUSES = ("open", "kept", "fixed", "discarded")
REVIEWED = ("kept", "fixed")
_SHOWN = 20
_MAX_TEXT = 20_000  # characters; a caption has hundreds


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


class StaleError(Exception):
    """The tuple was changed by another page since this one read it."""


def original_texts(record: Mapping[str, Any]) -> dict[str, str]:
    """The four texts of a record without blanks at their ends; a missing one is empty."""
    return {name: (record.get(name) or "").strip() for name in TEXTS}


def journal_path(tuples: Path) -> Path:
    """Where the decisions on a tuples file are."""
    return tuples.with_name(f"{tuples.stem}.review.jsonl")


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
        raise ValueError(f"{tuples}: {len(problems)} line(s) are no tuples:\n" + _listed(problems))
    if not items:
        raise ValueError(f"{tuples}: no tuples in it; each line is a JSON object with source, {', '.join(TEXTS)}")
    return items


def read_decisions(journal: Path, items: Sequence[Item]) -> tuple[list[Item], int, int]:
    """Items with what the journal says of them.

    A last line that a kill has cut is left out: nobody was told that it is saved.

    Returns:
        The items, the bytes of the journal that are whole lines, and how many tuples it knows that are not among the items.

    Raises:
        ValueError: a line before the last is damaged.
    """
    contents = journal.read_bytes() if journal.is_file() else b""
    whole = len(contents)
    if not contents.endswith(b"\n"):
        whole = contents.rfind(b"\n") + 1
    by_key = {item.key: index for index, item in enumerate(items)}
    decided = list(items)
    strangers = set()
    for number, line in enumerate(contents[:whole].split(b"\n")[:-1], start=1):
        try:
            entry = _entry(line)
        except ValueError as error:
            raise ValueError(
                f"{journal}: line {number} is damaged ({error}); remove that line to go on without the decision it held"
            ) from error
        index = by_key.get(entry["key"])
        if index is None:
            strangers.add(entry["key"])
            continue
        item = decided[index]
        decided[index] = replace(
            item,
            status=entry["status"],
            texts={**original_texts(item.record), **entry["texts"]},
            revision=item.revision + 1,
        )
    return decided, whole, len(strangers)


class Review:
    """A review that is being worked on. Every change is on disk before `change` returns.

    Args:
        tuples: the JSONL file.

    Raises:
        ValueError: see `read_items` and `read_decisions`; or another process reviews this file.

    Attributes:
        items: the tuples with their state.
        strangers: tuples that the journal knows and the file does not have, or has with other contents.
    """

    def __init__(self, tuples: Path) -> None:
        self.tuples = tuples
        self.journal = journal_path(tuples)
        undecided = read_items(tuples)
        self._one_process = FileLock(f"{self.journal}.lock")
        try:
            self._one_process.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"{tuples}: another process reviews this file; use its page, or end it first") from error
        try:
            self.items, self._size, self.strangers = read_decisions(self.journal, undecided)
            self._file = os.open(self.journal, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
            _sync_folder(self.journal.parent)
            os.ftruncate(self._file, self._size)
        except BaseException:
            self._one_process.release()
            raise
        self._change = threading.Lock()

    def __enter__(self) -> Review:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._file)
        self._one_process.release()

    def change(self, index: int, *, status: str, texts: Mapping[str, str], revision: int, writer: tuple[str, int]) -> Item:
        """Decide on a tuple or edit its texts, and write that down.

        Args:
            status: open, kept or discarded; a tuple that is kept with other texts than the file's becomes fixed.
            texts: all four.
            revision: of the item that the page has read.
            writer: name of the page and its count of writes. Two writes of one page may arrive in either order: the later counts.

        Returns:
            The item as it is now.

        Raises:
            ValueError: the status or a text is none, or a tuple with an empty text is to be kept.
            StaleError: another page has changed it since.
            OSError: the journal cannot be written; nothing has changed.
        """
        if status not in ("open", "kept", "discarded"):
            raise ValueError(f"status = {status!r}: one of open, kept, discarded")
        texts = _checked_texts(texts)
        if status == "kept" and (empty := [name for name in TEXTS if not texts[name]]):
            raise ValueError(f"{', '.join(empty)} is empty; fill it in or discard the tuple")
        with self._change:
            item = self.items[index]
            page, count = writer
            if page == item.writer[0]:
                if count <= item.writer[1]:
                    return item
            elif revision != item.revision:
                raise StaleError
            changed = replace(item, texts=texts, status=status, revision=item.revision + 1, writer=writer)
            if status == "kept" and changed.edited:
                changed = replace(changed, status="fixed")
            if (changed.status, changed.texts) == (item.status, item.texts):
                changed = replace(item, writer=writer)
            else:
                self._append(changed)
            self.items[index] = changed
            return changed

    def _append(self, item: Item) -> None:
        original = original_texts(item.record)
        entry = {
            "key": item.key,
            "status": item.status,
            "texts": {name: text for name, text in item.texts.items() if text != original[name]},
            # For people; the key is what counts.
            "line": item.line,
            "source": item.record["source"],
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        try:
            os.lseek(self._file, self._size, os.SEEK_SET)
            written = 0
            while written < len(line):
                written += os.write(self._file, line[written:])
            os.fsync(self._file)
        except OSError:
            # A full disk: what got there is no line, and must not stand before the next one.
            os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)


def export_reviewed(tuples: Path, target: Path, root: Path) -> Counter[str]:
    """Write the kept and fixed tuples as a tuples file that the trainer takes; of a review that goes on, what is decided so far.

    Args:
        root: what relative sources start from; the trainer needs the same as dataset.image_root, or the file in that folder.

    Returns:
        How many tuples have each status.

    Raises:
        ValueError: nothing is kept, `target` is a file of the review, or the trainer would refuse a tuple: nothing is written.
    """
    if target.resolve() in (tuples.resolve(), journal_path(tuples).resolve()):
        raise ValueError(f"--export {target}: is a file of the review itself; choose another name")
    items, _, _ = read_decisions(journal_path(tuples), read_items(tuples))
    chosen = [item for item in items if item.status in REVIEWED]
    if not chosen:
        raise ValueError(f"{tuples}: nothing in it is kept or fixed so far ({journal_path(tuples)}); review it first")
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(item.reviewed(), ensure_ascii=False) + "\n" for item in chosen)
            file.flush()
            os.fsync(file.fileno())
        try:
            read_tuples_file(beside, root)
        except ValueError as error:
            raise ValueError(_about_lines(str(error), [item.line for item in chosen], beside, tuples)) from error
        os.replace(beside, target)
        _sync_folder(target.parent)
    finally:
        beside.unlink(missing_ok=True)
    return Counter(item.status for item in items)


def _about_lines(message: str, lines: Sequence[int], written: Path, tuples: Path) -> str:
    """A message on the file that was to be written, with the line numbers of the file under review."""
    named = r"(?m)(?<=^  - )line (\d+)(?=:)|(?<=of |as )line (\d+)(?=;)"
    message = re.sub(named, lambda m: f"line {lines[int(m[1] or m[2]) - 1]}", message)
    return message.replace(str(written), f"kept tuples of {tuples}") + "\nfix or discard them on the page, then export again"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {bad} is not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    # Not splitlines(): captions may hold U+2028 and the like, which it would split at.
    return ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())


def _record(text: str) -> dict[str, Any]:
    record = json.loads(text, object_pairs_hook=_object)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if not isinstance(record.get("source"), str) or not record["source"].strip():
        raise ValueError(f"source = {record.get('source')!r} is not a text")
    for name in (*TEXTS, "edit_type", "target", "id"):
        if not isinstance(record.get(name), str | None):
            raise ValueError(f"{name} = {record[name]!r} is not a text")
    _encodable(json.dumps(record, ensure_ascii=False), "a field")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the reader's default keeps the last of two equal keys and drops the other in silence."""
    names = Counter(name for name, _ in pairs)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{', '.join(twice)} appears twice in one object")
    return dict(pairs)


def _key(record: Mapping[str, Any]) -> str:
    contents = [record["source"], *original_texts(record).values(), *(record.get(name) for name in ("target", "edit_type", "id"))]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def _entry(line: bytes) -> dict[str, Any]:
    entry = json.loads(line)
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str) or entry.get("status") not in STATUSES:
        raise ValueError("no key or status")
    texts = entry.get("texts")
    if not isinstance(texts, dict) or not all(name in TEXTS and isinstance(text, str) for name, text in texts.items()):
        raise ValueError(f"texts = {texts!r}")
    return entry


def _checked_texts(texts: Mapping[str, str]) -> dict[str, str]:
    if set(texts) != set(TEXTS) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"texts: expected {', '.join(TEXTS)}, each a text")
    for name, text in texts.items():
        if len(text) > _MAX_TEXT:
            raise ValueError(f"{name} has {len(text)} characters; at most {_MAX_TEXT}")
        _encodable(text, name)
    return {name: texts[name].strip() for name in TEXTS}


def _encodable(text: str, name: str) -> None:
    # JSON can hold half a surrogate pair, which no file and no tokenizer takes.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds a broken character at {error.start}") from error


def _listed(problems: Sequence[str]) -> str:
    more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "\n".join(f"  - {problem}" for problem in problems[:_SHOWN]) + more


def _sync_folder(folder: Path) -> None:
    """Make the folder's own entries durable; Windows has no such thing."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
