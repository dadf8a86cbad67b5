"""The files that results grow in: what is left of a torn line, and of one that only lacks its line feed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dataset_tools.journal import Journal, read_records, write_records
from dataset_tools.pool import Results

RECORD = {"source": "a.png", "caption": "ü 'quoted' {braces} \u2028 end"}


def test_a_line_torn_anywhere_is_cut_off_and_a_whole_one_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    first = json.dumps({"n": 1}).encode() + b"\n"
    line = json.dumps(RECORD, ensure_ascii=False).encode()
    for end in range(1, len(line) + 1):
        path.write_bytes(first + line[:end])
        journal = Journal(path)
        journal.append([{"n": 2}])
        journal.close()
        assert list(read_records(path)) == [{"n": 1}, *([RECORD] if end == len(line) else []), {"n": 2}], end


def test_lines_are_whole_and_synced_however_little_the_disk_takes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, done = os.write, []
    monkeypatch.setattr(os, "write", lambda file, data: (done.append("write"), write(file, data[:7]))[1])
    monkeypatch.setattr(os, "fsync", lambda file: done.append("sync"))
    journal = Journal(tmp_path / "t.jsonl")
    journal.append([RECORD, RECORD])
    assert done.count("write") > 5 and done[-1] == "sync"
    journal.close()
    assert list(read_records(tmp_path / "t.jsonl")) == [RECORD, RECORD]
    write_records(tmp_path / "w.jsonl", [RECORD])
    assert done.count("sync") == 2


def test_rejects_are_taken_back_from_a_file_with_a_torn_line(tmp_path: Path) -> None:
    rejects = tmp_path / "t.rejects.jsonl"
    rejects.write_text('{"source": "a", "kind": "server"}\n{"source": "b", "kind": "rules"}\n{"source": "c", "ki')
    Results(tmp_path / "t.jsonl", name="source", label=str, retry="server").close()
    assert list(read_records(rejects)) == [{"source": "b", "kind": "rules"}]


def test_a_torn_line_longer_than_a_block(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"n": 1}\n{"x": "' + b"y" * 200_000)
    Journal(path).close()
    assert list(read_records(path)) == [{"n": 1}]


def test_writing_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_records(path, [RECORD])

    def refuse(written: Path) -> None:
        assert list(read_records(written)) == [{"n": 3}]
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write_records(path, [{"n": 3}], refuse)
    with pytest.raises(ZeroDivisionError):
        write_records(path, ({"n": 1 // k} for k in (1, 0)))
    assert list(read_records(path)) == [RECORD] and [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for make in (lambda: Journal(tmp_path / "file" / "t.jsonl"), lambda: write_records(tmp_path / "file" / "t.jsonl", [])):
        with pytest.raises(ValueError, match="t.jsonl: cannot be written"):
            make()


def test_what_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for line, said in (
        (b"{no", "line 2 is not JSON"),
        (b"[" * 100_000, r"line 2 is not JSON \(nested too deeply"),
        (b"[]", "line 2 is list"),
        ("{ü}".encode("latin-1"), "line 2 is not JSON"),
    ):
        path.write_bytes(b'{"n": 1}\n' + line + b"\n")
        with pytest.raises(ValueError, match=said):
            list(read_records(path))


def test_a_last_line_that_is_nested_without_end_is_not_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    line = b"[" * 100_000 + b"]" * 100_000
    path.write_bytes(line)
    Journal(path).close()
    assert path.read_bytes() == line + b"\n"
