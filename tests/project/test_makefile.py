"""The Makefile: which environment it uses, and that it never replaces a torch. Nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32" or not shutil.which("make"), reason="no make")

# Stands for an environment's python: notes what pip is asked for and what its last constraints file says.
PYTHON = """#!{shell}
case "$*" in
*pip*) echo "$@" >> "{root}/pip"; eval "last=\\${{$(($# - 2))}}"; cat "$last" >> "{root}/pip" 2>/dev/null || true ;;
*"import torch"*) exit {missing} ;;
*) PYTHONPATH="{root}/site" exec "{python}" "$@" ;;
esac
"""


def make(*arguments: str, **environment: str) -> str:
    """Standard output of make, without what a make that started these tests has put into the environment."""
    done = subprocess.run(
        ["make", "-C", str(ROOT), *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("environment", "python"),
    [
        ({}, ".venv/bin/python"),
        ({"VIRTUAL_ENV": "/envs/venv", "CONDA_PREFIX": "/conda/envs/a", "CONDA_DEFAULT_ENV": "a"}, "/envs/venv/bin/python"),
        ({"CONDA_PREFIX": "/conda/envs/a", "CONDA_DEFAULT_ENV": "a"}, "/conda/envs/a/bin/python"),
        ({"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base"}, ".venv/bin/python"),
    ],
)
def test_the_active_environment_is_used(environment: dict[str, str], python: str):
    said = make("--dry-run", "test", **environment)
    assert f"{python} -m pytest -n auto --dist loadfile --no-loadscope-reorder" in said.splitlines()


@pytest.mark.parametrize("missing", [0, 1])
def test_the_installed_torch_is_what_pip_must_keep(tmp_path: Path, missing: int):
    venv, site = tmp_path / "venv", tmp_path / "site" / "torch-2.3.1+cpu.dist-info"
    (venv / "bin").mkdir(parents=True)
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.3.1+cpu\n")
    stub = venv / "bin" / "python"
    stub.write_text(PYTHON.format(shell=shutil.which("sh"), root=tmp_path, python=sys.executable, missing=missing))
    stub.chmod(0o755)
    make("install", f"VENV={venv}", "TORCH=torch==9 --index-url there")
    *first, second, constraint = (tmp_path / "pip").read_text().splitlines()
    assert first == ["-m pip install torch==9 --index-url there"] * missing
    assert second == f"-m pip install -c constraints.txt -c {venv}/torch-constraint.txt -e .[dev]"
    assert constraint == "torch==2.3.1+cpu"
