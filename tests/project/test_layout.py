"""The tests' own rooms: short files, of which none imports another."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import ROOT

_LINES = 500


def faults(folder: Path) -> list[str]:
    """What is wrong with the files of tests in a folder."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if (count := len(text.splitlines())) > _LINES:
            found.append(f"{path.name} has {count} lines, over {_LINES}: split it by subject")
        if imported := re.search(r"^\s*(?:from|import) .*\btest_\w+", text, re.MULTILINE):
            found.append(f"{path.name}: {imported[0].strip()}: what tests share belongs into tests/support")
    return found


def test_test_files_are_short_and_import_no_other() -> None:
    assert not faults(ROOT / "tests")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\n" * 500, ""),
        ("\n" * 501, "has 501 lines"),
        ("from tests.lora.test_files import status\n", "tests/support"),
        ("from a import b\n", ""),
    ],
)
def test_a_long_file_or_an_import_of_another_is_named(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "test_it.py").write_text(text, encoding="utf-8")
    found = faults(tmp_path)
    assert bool(found) == bool(says) and says in "".join(found)
