"""The command that checks a tuples file: each reason once, exit codes, and that the trainer agrees with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from byg_plugin.data import clips
from byg_plugin.data.tuples import read_tuples_file
from dataset_tools.validate import validate
from tests.support import ROOT
from tests.support.data_fakes import picture, record


def good(name: str, k: int = 0, **changes: Any) -> dict[str, Any]:
    texts = {
        "src_caption": f"a red car {k} on a street",
        "tgt_caption": f"a blue car {k} on a street",
        "instruction": f"paint car {k} blue",
        "reverse_instruction": f"paint car {k} red",
        "edit_type": "color_change",
    }
    return {**record(name, k), **texts, **changes}


def write(folder: Path, *records: dict[str, Any] | str) -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in records]
    (folder / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "t.jsonl"


def by_reason(path: Path) -> dict[str, list[str]]:
    return {reason: [where for where, _ in found] for reason, found in validate([path]).by_reason.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("a.png", (16, 16)), ("b.png", (24, 16))):
        picture(tmp_path / name, size)
    return tmp_path


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "dataset_tools" / "validate.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_each_reason_names_its_line(folder: Path) -> None:
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    shutil.copy(folder / "a.png", folder / "copy.png")
    path = write(
        folder,
        good("a.png", 0),
        "{no json",
        good("nowhere.png", 2),
        good("cut.png", 3),
        good("a.png", 4, reverse_instruction="restore the car"),
        good("a.png", 5, tgt_caption="a street without cars"),
        good("a.png", 0),
        good("a.png", 0, src_caption="a crimson car on a street"),
        good("copy.png", 9),
        good("a.png", 10, edit_type="colour"),
        good("b.png", 11, src_caption="word " * 600),
        good("b.png", 12, split="validation"),
        good("a.png", 13, tgt_caption="a red car 13 on a street"),
    )
    assert by_reason(path) == {
        "schema": ["line 2"],
        "file": ["line 3"],
        "decode": ["line 4"],
        "reverse_refers_back": ["line 5"],
        "target_negative": ["line 6"],
        "duplicate": ["line 7"],
        "same_edit": ["line 7", "line 8"],
        "same_image": ["line 9"],
        "edit_type": ["line 10"],
        "too_long_t5": ["line 11"],
        "too_long_clip": ["line 11"],
        "split": ["line 12"],
        "captions_equal": ["line 13"],
    }


def test_the_style_that_side_data_knows_must_be_in_the_source_caption(folder: Path) -> None:
    style = {"meta": {"source_style": "anime"}}
    path = write(folder, good("a.png", **style), good("b.png", 1, src_caption="an anime drawing of a red car", **style))
    assert by_reason(path) == {"source_style": ["line 1"]}


def test_only_tuples_that_the_trainer_takes_are_usable(folder: Path) -> None:
    path = write(folder, good("a.png"), good("b.png", 1, reverse_instruction="undo it"), good("b.png", 2, tgt_caption="a car, not red"))
    report = validate([path])
    assert (report.records, report.usable, report.edit_types) == (3, 2, {"color_change": 2})


def test_where_broken_rules_are_taken_other_problems_are_not(folder: Path) -> None:
    undo = good("b.png", 1, reverse_instruction="undo it")
    assert len(read_tuples_file(write(folder, good("a.png"), undo), rules="warn")) == 2
    for problem in ("{no json", good("nowhere.png", 2), good("a.png")):
        with pytest.raises(ValueError, match="1 problem.*\n.*line 3"):
            read_tuples_file(write(folder, good("a.png"), undo, problem), rules="warn")


def test_thorough_means_every_frame_of_a_clip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def frames(path: Path, count: int) -> Iterator[int]:
        yield from range(count - 1)
        raise ValueError(f"{path}: frame {count - 1} cannot be read")

    monkeypatch.setattr(clips, "clip_info", lambda path: SimpleNamespace(frames=5))
    monkeypatch.setattr(clips, "read_clip", frames)
    (folder / "v.mp4").write_bytes(b"film")
    path = write(folder, good("v.mp4"))
    assert not validate([path]).hard
    assert "frame 4" in validate([path], thorough=True).by_reason["decode"][0][1]


def test_command_prints_the_table_and_the_exit_code_says_what_the_trainer_will_do(folder: Path) -> None:
    done = command(write(folder, good("a.png"), good("b.png", 1)))
    assert done.returncode == 0 and "2 records, 2 usable tuples" in done.stdout and "color_change 2" in done.stdout
    path = write(folder, good("a.png"), good("b.png", 1, reverse_instruction="undo it"), good("b.png", 2, tgt_caption="a car, not red"))
    done = command(path)
    assert done.returncode == 1, done.stderr
    assert "error        1  reverse_refers_back    line 2" in done.stdout and "must stand alone" in done.stdout
    assert done.stdout.index("error") < done.stdout.index("warning")
    with pytest.raises(ValueError, match="line 2"):
        read_tuples_file(path)


def test_warnings_alone_are_taken_unless_strict(folder: Path) -> None:
    path = write(folder, good("a.png", tgt_caption="a car, not red"))
    assert command(path).returncode == 0 and command(path, "--strict").returncode == 1
    assert len(read_tuples_file(path)) == 1


def test_several_files_and_a_root(folder: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("one", "two"):
        (lists / f"{name}.jsonl").write_text(json.dumps(good("a.png", instruction=f"paint it {name}", reverse_instruction="undo")))
    report = validate([lists / "one.jsonl", lists / "two.jsonl"], folder)
    assert not report.by_reason["same_edit"]
    shutil.copy(lists / "one.jsonl", lists / "three.jsonl")
    twice = validate([lists / "one.jsonl", lists / "three.jsonl"], folder)
    assert [where for where, _ in twice.by_reason["same_edit"]] == ["three.jsonl line 1"]
    (lists / "more").mkdir()
    same = shutil.copy(lists / "one.jsonl", lists / "more" / "one.jsonl")
    named = validate([lists / "one.jsonl", lists / "two.jsonl", same], folder)
    assert named.by_reason["same_edit"] == [(f"{same} line 1", f"'paint it one' as in {lists / 'one.jsonl'} line 1")]
    assert "two.jsonl line 1" in [where for where, _ in named.by_reason["reverse_refers_back"]]
    assert [where for where, _ in report.by_reason["reverse_refers_back"]] == ["one.jsonl line 1", "two.jsonl line 1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--root", "nowhere", "x"], "--root nowhere: no such folder"),
        (["--jobs", "0", "x"], "at least 1"),
        (["--jobs", "1000000", "x"], "--jobs 1000000: at most 1000"),
    ],
)
def test_bad_calls(arguments: list[str], said: str) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_empty_file(folder: Path) -> None:
    done = command(write(folder))
    assert done.returncode == 2 and "no tuples in it" in done.stderr
