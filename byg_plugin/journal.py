"""Files that grow by whole lines and survive a kill at any moment, and the set of what is in them.

Results are their own journal: an input is done when, and only when, its line stands in one of the files. A line is one
write in append mode and is synced before it counts. A line that a power cut tore is removed at the next start.
"""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from byg_plugin.documents import json_value, utf8

_BLOCK = 1 << 16


def only_process(path: Path, problem: str) -> Any:
    """A lock of a file or folder, taken; it ends with `release` or with the process.

    Raises:
        ValueError: another process has it; `problem` says so.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(problem) from error
    return lock


class Journal:
    """An append-only JSONL file.

    Raises:
        ValueError: it cannot be opened or written.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            mend_last_line(path)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        except OSError as error:
            raise ValueError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from error

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records and wait until they are on the disk.

        Raises:
            ValueError: the disk is full; what was added before is intact.
        """
        data = b"".join(map(_line, records))
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be written: {error.strerror or error}; make room and run the same command again"
            ) from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def mend_last_line(path: Path) -> None:
    """Where the last line feed is missing: add it to a whole record (of an editor that leaves it out), cut off a torn one.

    Raises:
        OSError: the file cannot be read or written.
    """
    if not path.is_file():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        last, start, block = b"", end, _BLOCK
        while start and b"\n" not in last:
            start = max(0, start - block)
            block *= 2  # or a long line is read as often as it has blocks
            file.seek(start)
            last = file.read(end - start)
        last = last[last.rfind(b"\n") + 1 :]
        if not last:
            return
        if _is_torn(last):
            file.truncate(end - len(last))
        else:
            file.seek(end)
            file.write(b"\n")


def _is_torn(line: bytes) -> bool:
    try:
        json_value(line)  # no beginning of an object is one
    except (json.JSONDecodeError, UnicodeDecodeError):
        return True
    except ValueError:
        pass  # nested without end, thousands of digits: nothing that we have written; whoever reads it says so
    return False


def numbered_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 1, object) of a JSONL file, one after another.

    Raises:
        ValueError: a line is not a JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json_value(utf8(line))
            except ValueError as error:
                raise ValueError(f"{path}: line {number} is not JSON ({error}); mend or remove it") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}: line {number} is {type(record).__name__}, not a JSON object; mend or remove it")
            yield number, record


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one after another; none where there is no file.

    Raises:
        ValueError: see `numbered_records`.
    """
    if path.is_file():
        yield from (record for _, record in numbered_records(path))


def write_records(path: Path, records: Iterable[Mapping[str, Any]], check: Callable[[Path], object] | None = None) -> None:
    """Write a JSONL file whole or not at all.

    Args:
        check: raises if the written file, which is not at its place yet, must not get there.

    Raises:
        ValueError: it cannot be written.
    """
    with replacing(path, check) as file:
        file.writelines(map(_line, records))


@contextmanager
def replacing(path: Path, check: Callable[[Path], object] | None = None) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when it is written whole and on the disk.

    Args:
        check: as of `write_records`.

    Raises:
        ValueError: it cannot be written.
    """
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if check:
            check(partial)
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror or error}; make room or choose another place") from error
    finally:
        if partial.exists():
            partial.unlink()


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in what a model said or in a file's name
        return json.dumps(record).encode() + b"\n"


def _stored(name: str) -> bytes:
    return name.encode(errors="surrogatepass")  # JSON can hold half a surrogate pair


class Done:
    """A set of names on the disk: its memory does not grow. It is made anew from the files at each start.

    Raises:
        ValueError: the place for temporary files cannot be written; all methods.
    """

    def __init__(self) -> None:
        with self._writing():
            self._folder = tempfile.TemporaryDirectory(prefix="byg-done-")
            self._db = sqlite3.connect(str(Path(self._folder.name) / "done.sqlite"), check_same_thread=False, isolation_level=None)
            # It is thrown away at the end: no journal, no sync.
            self._db.executescript(
                "PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; CREATE TABLE done (name BLOB PRIMARY KEY) WITHOUT ROWID;"
            )

    def add(self, names: Iterable[str]) -> None:
        """Names that are done."""
        with self._writing():
            self._db.execute("BEGIN")
            self._db.executemany("INSERT OR IGNORE INTO done VALUES (?)", ((_stored(name),) for name in names))
            self._db.execute("COMMIT")

    def claim(self, name: str) -> bool:
        """Add a name; whether it was new."""
        with self._writing():
            return self._db.execute("INSERT OR IGNORE INTO done VALUES (?)", (_stored(name),)).rowcount == 1

    def close(self) -> None:
        """Remove the files."""
        self._db.close()
        self._folder.cleanup()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            raise ValueError(
                f"{tempfile.tempdir or 'temporary files'}: cannot be written ({error}); make room there, or name another place in $TMPDIR"
            ) from error
