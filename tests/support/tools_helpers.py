"""Processes for the tests of the data tools: the stub server, and the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support import ROOT

KEY = "sk-test-0123456789abcdef"
ENVIRONMENT = {
    **{
        name: value
        for name, value in os.environ.items()
        if not name.startswith("OPENAI_") and name.lower() not in ("http_proxy", "all_proxy")
    },
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "OPENAI_API_KEY": KEY,
    "NO_PROXY": "127.0.0.1",
}


class Stub:
    """A running stub server."""

    def __init__(self, url: str, log: Path):
        self.url, self._log = url, log

    @property
    def requests(self) -> list[dict[str, Any]]:
        return records(self._log)


@contextmanager
def stub(folder: Path, mode: str, **plan: Any) -> Iterator[Stub]:
    """The server as a process; ended with its block."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "requests.log"
    (folder / "plan.json").write_text(json.dumps({"mode": mode, "log": str(log), **plan}))
    command = [sys.executable, "-m", "tests.support.stub_server", str(folder / "plan.json")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        yield Stub(f"http://127.0.0.1:{int(process.stdout.readline())}/v1", log)
    finally:
        process.kill()
        process.communicate()


def start(tool: str, *arguments: Any, **environment: str) -> subprocess.Popen[str]:
    """A tool as a process."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "dataset_tools" / f"{tool}.py"), *map(str, arguments)],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(tool: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    """A tool, to its end; pytest ends it with the test."""
    process = start(tool, *arguments, **environment)
    out, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file of this process grows beyond `room` bytes: what a full disk does, to every library that writes."""
    resource = pytest.importorskip("resource", reason="limits of a file's size are POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def records(path: Path) -> list[dict[str, Any]]:
    """A JSONL file's objects; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def photos(folder: Path, count: int, side: int = 16) -> Path:
    """A folder of small images with captions that number them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"p{number:04d}.jpg")
        (folder / f"p{number:04d}.txt").write_text(f"photo number {number} of a red car", encoding="utf-8")
    return folder
