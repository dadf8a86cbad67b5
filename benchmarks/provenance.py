"""Which code made a result."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit(*code: str) -> tuple[str, bool]:
    """The full hash of the commit that is checked out, and whether `code` (paths, patterns) differs from it.

    Ask before anything is measured: the code may change meanwhile. Outside a clone, or without git, ("unknown", False): no
    measurement is lost for it.
    """
    try:
        head = _git("rev-parse", "HEAD")
        return head, bool(_git("status", "--porcelain", "--", *code))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", False


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
