"""Folders that results go to."""

from __future__ import annotations

import os
from pathlib import Path


def make_writable(folder: Path) -> None:
    """Make a folder and try it with an empty file, before long work.

    Raises:
        OSError: it cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{os.getpid()}"
    probe.write_bytes(b"")
    probe.unlink()
