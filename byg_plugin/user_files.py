"""Users' files and folders of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def is_hidden(name: str) -> bool:
    """Whether a file's name says that it is no user's file: a Mac keeps `._x.png` beside `x.png` on a disk of another kind."""
    return name.startswith(".")


def files_in(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """The files of a folder with one of these suffixes (lower case), by name; hidden ones are passed over."""
    wanted = tuple(suffixes)
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in wanted and not is_hidden(path.name))


def hidden_in(folder: Path, suffixes: Iterable[str]) -> str:
    """Words for the error that there is nothing in a folder: how many hidden files were passed over; empty for none."""
    wanted = tuple(suffixes)
    count = sum(path.suffix.lower() in wanted and is_hidden(path.name) for path in folder.iterdir())
    return f"; {count} hidden one(s) are passed over" if count else ""


def base_of(tuples: str | Path) -> Path:
    """The folder of a file of tuples, as `name_below` wants it: without `..`, or no path would lie below it."""
    return Path(os.path.abspath(tuples)).parent


def name_below(path: Path, base: Path) -> str:
    """A path as a file in the folder `base` names it: relative below it, absolute otherwise; forward slashes."""
    absolute = Path(os.path.abspath(path))
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else absolute.as_posix()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def listed(problems: Sequence[str], shown: int) -> str:
    """The first problems, a line each, and how many more there are: the end of a message."""
    more = f"\n  ... and {len(problems) - shown} more" if len(problems) > shown else ""
    return "\n".join(f"  - {problem}" for problem in problems[:shown]) + more
