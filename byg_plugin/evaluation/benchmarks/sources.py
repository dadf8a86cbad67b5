"""Sources that lie in folders of styles, with what stands in a .txt beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from byg_plugin.documents import utf8
from byg_plugin.user_files import files_in


def captioned(folder: Path, suffixes: Sequence[str]) -> list[tuple[Path, str | None]]:
    """The files of a folder and their captions; none where there is no folder.

    Raises:
        ValueError: a caption is not UTF-8; names it.
    """
    return [(path, _caption(path.with_suffix(".txt"))) for path in files_in(folder, suffixes)] if folder.is_dir() else []


def _caption(path: Path) -> str | None:
    try:
        return " ".join(utf8(path.read_bytes()).split()).rstrip(".") or None if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
