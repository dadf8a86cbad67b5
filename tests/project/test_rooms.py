"""Which way the rooms depend: the contracts of pyproject.toml hold, and they can be broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for room in ("byg_plugin", "dataset_tools", "comfyui"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=lambda folder, names: [n for n in names if Path(n).suffix not in ("", ".py")])
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def linted(tree: Path) -> tuple[int, str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_rooms_depend_one_way(tree: Path):
    code, said = linted(tree)
    assert code == 0 and "4 kept, 0 broken" in said, said


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("byg_plugin/config/sections.py", "from byg_plugin.training import memory", "Rooms depend one way"),
        ("byg_plugin/flow.py", "from byg_plugin import sampling", "Rooms depend one way"),
        ("comfyui/card.py", "from byg_plugin.lora import card", "The ComfyUI nodes need ComfyUI alone"),
        ("comfyui/nodes.py", "import diffusers", "The ComfyUI nodes need ComfyUI alone"),
        ("byg_plugin/data/rules.py", "from byg_plugin.data import tuples", "No files import each other in a circle"),
        ("byg_plugin/data/rules.py", "from dataset_tools import balance", "The data tools stand on the package"),
    ],
)
def test_an_import_the_other_way_is_told(tree: Path, file: str, line: str, broken: str):
    path = tree / file
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    code, said = linted(tree)
    assert code == 1 and any(broken in line_said and "BROKEN" in line_said for line_said in said.splitlines()), said
