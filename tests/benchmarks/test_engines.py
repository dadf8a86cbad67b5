"""The benchmark of the engines measures each of them on real processes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support import ROOT


@pytest.mark.timeout(600)  # interpreters start
def test_every_engine_is_measured_beside_plain(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.engines", "--shape", "tiny", "--repeats", "1", "--out", str(tmp_path / "made.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout.splitlines()[-1])
    assert printed == json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))
    rows = printed["engines"]
    whole = {"plain", *(("ZeRO-1", "ZeRO-2") if find_spec("deepspeed") else ())}
    halved = {"FSDP2", "FSDP2, cpu offload", *(("ZeRO-3", "ZeRO-3, cpu offload") if find_spec("deepspeed") else ())}
    assert rows.keys() == whole | halved
    assert all(row["seconds"] > 0 and row["over_plain"] > 0 for row in rows.values()) and rows["plain"]["over_plain"] == 1.0
    assert all(rows[name]["held"] == 1.0 for name in whole) and all(0.5 <= rows[name]["held"] < 0.52 for name in halved)
