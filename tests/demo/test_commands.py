"""The demos' stages: a training that is interrupted saves, one that is gone on with keeps its precision, a folder is one demo's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from byg_plugin.demo import commands, video_world, world
from tests.support import ROOT

# Saves, which takes longer than the quarter of a second that subprocess.run waits, and ends as a command of ours does.
SAVES = """
import signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(1.5)
    Path({done!r}).touch()
    sys.exit({code})
signal.signal(signal.SIGINT, save)
Path({ready!r}).touch()
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="process groups of POSIX")
@pytest.mark.parametrize("ends", [130, 0])
def test_ctrl_c_waits_for_the_command_that_saves(tmp_path: Path, ends: int):
    ready, done, later = tmp_path / "ready", tmp_path / "done", tmp_path / "later"
    code = SAVES.format(ready=str(ready), done=str(done), code=ends)
    parent = (
        "from byg_plugin import _cli\nfrom byg_plugin.demo import commands\n"
        f"_cli.run(lambda: (commands.run('-c', {code!r}), open({str(later)!r}, 'w')))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to both
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, done.exists(), later.exists()) == (130, True, False), errors
    assert "Traceback" not in errors


def test_a_command_that_fails_ends_the_demo_with_its_code():
    with pytest.raises(SystemExit) as end:
        commands.run("-c", "raise SystemExit(3)")
    assert end.value.code == 3
    commands.run("-c", "pass")


def test_what_was_begun_goes_on_in_its_precision_however_the_cpu_is_timed_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained = tmp_path / "config.json"
    for begun, timed in (("bf16", 1.0), ("no", 0.1)):
        trained.write_text(json.dumps({"train": {"mixed_precision": begun}}), encoding="utf-8")
        monkeypatch.setattr(commands, "_seconds_of_product", lambda dtype, timed=timed: timed if "bfloat16" in str(dtype) else 1.0)
        assert commands._precision([], trained) == [f'train.mixed_precision="{begun}"']
        assert commands._precision(['train.mixed_precision="fp16"'], trained) == []


@pytest.mark.parametrize("text", ['{"tra', "{}", "[]", '{"train": 3}'])
def test_a_damaged_record_of_a_training_is_named(tmp_path: Path, text: str):
    trained = tmp_path / "config.json"
    trained.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: is damaged .*: delete its folder"):
        commands._precision([], trained)


def test_a_folder_of_the_other_demo_or_of_another_size_is_not_gone_on_with(tmp_path: Path):
    commands.write_data(tmp_path / "a", world.write_dataset, ".png", {"train": 2, "eval": 1})
    written = (tmp_path / "a/train/tuples.jsonl").stat().st_mtime_ns
    commands.write_data(tmp_path / "a", world.write_dataset, ".png", {"train": 2, "eval": 1})
    assert (tmp_path / "a/train/tuples.jsonl").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"--out .*a: .*tuples\.jsonl holds 2 tuples of \.png, and this demo's are 2 of \.mkv: delete"):
        commands.write_data(tmp_path / "a", video_world.write_dataset, ".mkv", {"train": 2, "eval": 1})
    with pytest.raises(ValueError, match=r"holds 2 tuples of \.png, and this demo's are 3 of \.png"):
        commands.write_data(tmp_path / "a", world.write_dataset, ".png", {"train": 3, "eval": 1})
