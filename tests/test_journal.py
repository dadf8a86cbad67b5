"""The files that results grow in: what is left of a torn line, and of one that only lacks its line feed."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import pytest

from byg_plugin.journal import Done, Journal, read_records, write_records
from dataset_tools import pool
from dataset_tools.plot import plot_summary
from dataset_tools.pool import Results
from tests.support.tools_helpers import full_disk

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


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        ('{"image": "a.png"}\n', "line 1 has no source, instruction, so this command did not write it; name another file"),
        ('{"source": "a", "instruction": "b"}\n{"source": "c"}\n', "line 2 has no instruction"),
        ("image,caption\na.png,a car", "line 1 is not JSON"),
        ("a note without a line feed", "line 1 is not JSON"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, contents: str, says: str) -> None:
    out = tmp_path / "t.jsonl"
    out.write_text(contents)
    with pytest.raises(ValueError, match=says):
        Results(out, name="source", label=str, fields=("instruction",))
    assert out.read_text() == contents and [path.name for path in tmp_path.glob("[!.]*")] == ["t.jsonl"]


def test_a_first_line_that_is_torn_is_of_these_results(tmp_path: Path) -> None:
    whole = '{"source": "a", "instruction": "b"}'
    for end in range(1, len(whole)):
        (tmp_path / "t.jsonl").write_text(whole[:end])
        Results(tmp_path / "t.jsonl", name="source", label=str, fields=("instruction",)).close()
        assert not (tmp_path / "t.jsonl").read_text()


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
    lines = (
        (b"{no", "line 2 is not JSON"),
        (b"[]", "line 2 is list"),
        ("{ü}".encode("latin-1"), "line 2 is not JSON"),
        (b'{"n": ' * 100_000, "line 2 is not JSON"),
        (b'{"n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "line 2 is not JSON .nested too deeply"),
        (b'{"n": ' + b"1" * 5000 + b"}", "line 2 is not JSON"),
    )
    for line, said in lines:
        path.write_bytes(b'{"n": 1}\n' + line + b"\n")
        with pytest.raises(ValueError, match=said):
            list(read_records(path))


@pytest.mark.parametrize("line", [b"[" * 100_000 + b"]" * 100_000, b'{"n": ' + b"1" * 5000 + b"}"])
def test_a_last_line_that_only_its_readers_refuse_is_not_cut_off(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"n": 1}\n' + line)
    Journal(path).close()
    assert path.read_bytes() == b'{"n": 1}\n' + line + b"\n"


def test_a_long_last_line_is_read_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'{"n": 1}\n{"x": "' + b"y" * 10_000_000)
    monkeypatch.setattr("byg_plugin.journal._BLOCK", 64)
    read: list[int] = []

    class Counting(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            read.append(len(data))
            return data

    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", *rest: Counting(self, mode) if mode == "r+b" else opened(self, mode, *rest))
    Journal(path).close()
    assert path.read_bytes() == b'{"n": 1}\n'
    assert len(read) > 10 and sum(read) < 4 * 10_000_000


# --- a full disk ---


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    long = {"source": "a.png", "x": "y" * 5000}
    journal = Journal(path)
    journal.append([RECORD])
    with full_disk(2000), pytest.raises(ValueError, match="t.jsonl: cannot be written: .*; make room and run the same command again"):
        journal.append([long])
    journal.close()
    Journal(path).close()
    assert list(read_records(path)) == [RECORD]
    with full_disk(2000), pytest.raises(ValueError, match="t.jsonl: cannot be written"):
        write_records(path, [long])
    with full_disk(2000), pytest.raises(ValueError, match=r"t.summary.png: cannot be written"):
        plot_summary(path)
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"] and list(read_records(path)) == [RECORD]


def test_a_full_place_for_temporary_files_is_named() -> None:
    with full_disk(2000), pytest.raises(ValueError, match=r"cannot be written \(.*TMPDIR"):
        Done().add(str(number) for number in range(5000))
    done = Done()
    try:
        with full_disk(2000), pytest.raises(ValueError, match=r"cannot be written \(.*TMPDIR"):
            for number in range(5000):
                done.claim(str(number))
    finally:
        done.close()


def test_a_disk_without_room_for_side_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.rejects.jsonl").write_text('{"n": 1}')

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as write() raises it: without a file's name

    for name in ("mend_last_line", "make_writable"):
        with monkeypatch.context() as patched:
            patched.setattr(pool, name, refuse)
            with pytest.raises(ValueError, match="out = .*t.jsonl: cannot be written: No space left on device"):
                Results(tmp_path / "t.jsonl", name="source", label=str)


def test_names_with_half_a_character_are_known_again() -> None:
    done = Done()
    done.add(["\ud800", "a"])
    assert not done.claim("\ud800") and not done.claim("a") and done.claim("\ud801") and not done.claim("\ud801")
    done.close()
