"""The journal of a review: one line a decision beside the tuples file, which is never changed."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import is_unicode
from byg_plugin.documents import json_value
from byg_plugin.journal import only_process

from .items import Item, original_texts, read_items

STATUSES = ("open", "kept", "fixed", "discarded")
_MAX_TEXT = 20_000  # characters; a caption has hundreds


class StaleError(Exception):
    """The tuple was changed by another page since this one read it."""


def journal_path(tuples: Path) -> Path:
    """Where the decisions on a tuples file are."""
    return tuples.with_name(f"{tuples.stem}.review.jsonl")


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
        undecided = read_items(tuples)
        self.tuples = tuples
        self.journal = journal_path(tuples)
        problem = f"{tuples}: another process reviews this file; use its page, or end it first"
        self._one_process = only_process(Path(f"{self.journal}.lock"), problem)
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
        if status == "kept" and (empty := [name for name in ROLES if not texts[name]]):
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


def _entry(line: bytes) -> dict[str, Any]:
    entry = json_value(line)
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str) or entry.get("status") not in STATUSES:
        raise ValueError("no key or status")
    texts = entry.get("texts")
    if not isinstance(texts, dict) or not all(name in ROLES and isinstance(text, str) for name, text in texts.items()):
        raise ValueError("its texts are not those of a tuple")
    return entry


def _checked_texts(texts: Mapping[str, str]) -> dict[str, str]:
    if set(texts) != set(ROLES) or not all(isinstance(text, str) for text in texts.values()):
        raise ValueError(f"texts: expected {', '.join(ROLES)}, each a text")
    for name, text in texts.items():
        if len(text) > _MAX_TEXT:
            raise ValueError(f"{name} has {len(text)} characters; at most {_MAX_TEXT}")
        if not is_unicode(text):
            raise ValueError(f"{name} holds a broken character")
    return {name: texts[name].strip() for name in ROLES}


def _sync_folder(folder: Path) -> None:
    """Make the folder's own entries durable; Windows has no such thing."""
    if os.name != "nt":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
