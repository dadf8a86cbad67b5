"""Folders that results go to: writable, written whole, and one run's alone."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from byg_plugin.documents import json_value

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)
PARTIAL = ".partial-"
DISCARDED = "discarded-"
LOCK = "training.lock"
HOLDER = "training.lock.json"
_ORPHANS_END = 20.0  # seconds: loader processes share a killed run's lock, and look for their parent every 5


def make_writable(folder: Path) -> None:
    """Make a folder and try it with an empty file, before long work.

    Raises:
        OSError: it cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()


# --- written whole ---


@contextmanager
def written_whole(final: Path, *, replace: bool = False) -> Iterator[Path]:
    """A new folder under another name that is synced and gets its own when the block ends; an exception removes it.

    What kills have left behind beside it is removed first, as far as it can be: another program may have a file of it open.

    Args:
        final: the folder's own name.
        replace: what is there under that name makes way.

    Raises:
        OSError: it cannot be written or renamed.
    """
    partial = final.with_name(f"{PARTIAL}{final.name}-{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for leftover in final.parent.glob(f"{PARTIAL}*"):
            _remove_leftover(leftover)
        partial.mkdir()
        yield partial
        _sync(partial)
        if replace and final.exists():
            remove_whole(final)
        rename(partial, final)
        _sync_folder(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_leftover(path: Path) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:  # no reason to lose what is about to be written
        logger.warning("%s, which was left behind, was not removed: %s", path, error)


def remove_whole(folder: Path) -> None:
    """Renamed first: a kill in the middle must not leave half a folder under a whole one's name.

    Raises:
        OSError: it cannot be renamed or removed.
    """
    doomed = folder.with_name(f"{PARTIAL}old-{folder.name}-{os.getpid()}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def rename(old: Path, new: Path) -> None:
    """Windows refuses while a virus scanner or an indexer looks at a new file inside: that passes within seconds."""
    for _ in range(20):
        try:
            return os.replace(old, new)
        except PermissionError:
            if os.name != "nt":
                raise
            time.sleep(0.25)
    os.replace(old, new)


def set_aside(folder: Path) -> Path:
    """Rename `step-000006` to `discarded-step-000006` (or -2, -3, ... where that is taken); returns the new place.

    Raises:
        OSError: it cannot be renamed.
    """
    aside, number = folder.with_name(f"{DISCARDED}{folder.name}"), 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{DISCARDED}{folder.name}-{number}")
    rename(folder, aside)
    return aside


def write_text(path: Path, text: str) -> None:
    """A small text file, whole or not at all.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        # What others have written into a log comes back as it was, also where it is no UTF-8.
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Windows cannot open folders and needs no such sync."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- one run's alone ---


@contextmanager
def alone_in(folder: Path, key: str) -> Iterator[None]:
    """Hold a folder for one run: the operating system's lock on `training.lock`, which a kill gives back.

    `training.lock.json` beside it says who holds it. Where the file system has no locks, a warning says so and nothing is held.

    Args:
        folder: made where it is not there.
        key: the option that names it, for messages.

    Raises:
        ValueError: another process has it (with its number and host), or the folder cannot be written.
    """
    try:
        make_writable(folder)
        lockable = _has_locks(folder)
    except OSError as error:
        raise ValueError(f"{key} = {folder} is not writable: {error.strerror}; choose another folder") from error
    if not lockable:
        logger.warning("%s = %s: this file system has no locks; a second training in it would not be noticed", key, folder)
        yield
        return
    lock = _acquired(folder, key)
    try:
        _write_holder(folder, key)
        yield
    finally:
        with suppress(OSError):
            (folder / HOLDER).unlink(missing_ok=True)
        lock.release()


def _has_locks(folder: Path) -> bool:
    """Asked here: some versions of filelock take a missing lock for a held one, others use a file that a kill leaves behind."""
    if sys.platform == "win32":
        return True
    probe = folder / f".probe-{os.getpid()}"
    with open(probe, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL):
                raise
            return False
        finally:
            probe.unlink()
    return True


def _acquired(folder: Path, key: str) -> FileLock:
    lock = FileLock(folder / LOCK)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not _is_dead(_holder(folder)):
                raise
            lock.acquire(timeout=_ORPHANS_END)
    except Timeout as error:
        raise ValueError(
            f"{key} = {folder} is in use by another training ({_described(_holder(folder))}): "
            "wait for its end, stop it, or choose another folder"
        ) from error
    except OSError as error:
        raise ValueError(f"{key} = {folder}: {LOCK} cannot be locked: {error.strerror}; choose another folder") from error
    return lock


def _write_holder(folder: Path, key: str) -> None:
    record = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        write_text(folder / HOLDER, json.dumps(record))
    except OSError as error:
        raise ValueError(f"{key} = {folder}: cannot write {HOLDER}: {error.strerror}; make room or choose another folder") from error


def _holder(folder: Path) -> dict[str, Any]:
    """Who holds the folder, as far as it can be read."""
    try:
        found = json_value((folder / HOLDER).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _described(holder: dict[str, Any]) -> str:
    names = {"pid": "process", "host": "on", "since": "since"}
    return " ".join(f"{word} {holder[key]!s:.80}" for key, word in names.items() if key in holder) or f"see {LOCK} there"


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host that is gone."""
    pid = holder.get("pid")
    if type(pid) is not int or not 0 < pid < 2**31 or holder.get("host") != socket.gethostname() or os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
