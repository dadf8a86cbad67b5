"""The review page's journal: decisions on disk, kills, full disks, the export."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import read_tuples_file
from byg_plugin.journal import read_records, write_records
from dataset_tools.review_page import store
from dataset_tools.review_page.export import export_reviewed
from dataset_tools.review_page.items import Item, read_items
from dataset_tools.review_page.store import Review, StaleError, journal_path
from tests.support import ROOT
from tests.support.review_server import PATIENCE, on_disk, record, statuses, write_tuples


def decide(review: Review, index: int, status: str, *, page: str = "p", count: int = 1, revision: int | None = None, **texts: str) -> Item:
    item = review.items[index]
    revision = item.revision if revision is None else revision
    return review.change(index, status=status, texts={**item.texts, **texts}, revision=revision, writer=(page, count))


# ---- the journal


def test_each_change_is_a_line_on_disk_before_it_is_answered(tuples: Path, monkeypatch: pytest.MonkeyPatch):
    before = tuples.read_bytes()
    synced: list[bytes] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (fsync(handle), synced.append(journal_path(tuples).read_bytes())))
    with Review(tuples) as review:
        for count, (index, status) in enumerate([(0, "kept"), (1, "discarded"), (0, "open"), (3, "kept")], start=1):
            decide(review, index, status, count=count)
            assert synced[-1].count(b"\n") == count
        fixed = decide(review, 2, "kept", count=5, instruction="  make it blue ")
        assert fixed.status == "fixed" and fixed.texts["instruction"] == "make it blue"
    assert statuses(tuples) == ["open", "discarded", "fixed", "kept"]
    assert on_disk(tuples)[2].texts["instruction"] == "make it blue"
    assert tuples.read_bytes() == before


def test_a_line_that_a_kill_has_cut_is_left_out_wherever_it_was_cut(tuples: Path):
    with Review(tuples) as review:
        decide(review, 0, "kept")
        first = journal_path(tuples).read_bytes()
        decide(review, 1, "kept", count=2, instruction="prune the tree, ü")
    whole = journal_path(tuples).read_bytes()
    for cut in range(len(first), len(whole)):
        journal_path(tuples).write_bytes(whole[:cut])
        assert statuses(tuples) == ["kept", "open", "open", "open"]
    journal_path(tuples).write_bytes(first + b'{"key": "' + b"x" * 2000)
    with Review(tuples) as review:  # it must not run into the next line
        decide(review, 2, "discarded")
    assert statuses(tuples) == ["kept", "open", "discarded", "open"]
    assert whole.startswith(first) and journal_path(tuples).read_bytes().startswith(first)


def test_a_damaged_line_before_the_last_is_named(tuples: Path):
    with Review(tuples) as review:
        decide(review, 0, "kept")
    good = journal_path(tuples).read_bytes()
    levels = [b'{"key": "a", "status": "open", "texts": {"x": ' + b"[" * deep + b"]" * deep + b"}}" for deep in (900, 100_000)]
    for line in (b'{"key": "a", "sta', *levels, b"[" * 100_000, b"1" * 5000):
        journal_path(tuples).write_bytes(line + b"\n" + good)
        with pytest.raises(ValueError, match=r"tuples\.review\.jsonl: line 1 is damaged"):
            Review(tuples)


def test_a_full_disk_leaves_state_and_journal_as_they_were(tuples: Path, monkeypatch: pytest.MonkeyPatch):
    with Review(tuples) as review:
        decide(review, 0, "kept")
        write, journal = os.write, journal_path(tuples).read_bytes()

        def full(handle: int, data: bytes) -> int:
            if len(data) < 60:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(handle, data[:50])

        with monkeypatch.context() as patched:
            patched.setattr(store.os, "write", full)
            with pytest.raises(OSError, match="No space"):
                decide(review, 1, "kept", count=2)
        assert review.items[1].status == "open"
        assert journal_path(tuples).read_bytes() == journal
        decide(review, 1, "discarded", count=3)
    assert statuses(tuples)[:2] == ["kept", "discarded"]


def test_writes_of_one_page_count_in_its_order_and_those_of_another_not_unseen(tuples: Path):
    with Review(tuples) as review:
        decide(review, 0, "open", count=7, revision=0, instruction="the later text")
        decide(review, 0, "open", count=6, revision=0, instruction="the earlier text")
        assert review.items[0].texts["instruction"] == "the later text"
        with pytest.raises(StaleError):
            decide(review, 0, "discarded", page="another", revision=0)
        assert decide(review, 0, "discarded", page="another", revision=1).status == "discarded"
    assert on_disk(tuples)[0].status == "discarded"


def test_equal_tuples_are_decided_one_by_one_and_decisions_follow_moved_lines(tmp_path: Path):
    tuples = write_tuples(tmp_path, [record(0), record(1), record(1)])
    with Review(tuples) as review:
        decide(review, 1, "discarded")
        decide(review, 2, "kept", count=2)
    write_tuples(tmp_path, [record(2), record(1), record(0), record(1)])
    assert statuses(tuples) == ["open", "discarded", "open", "kept"]


def test_decisions_on_changed_tuples_wait_and_are_counted(tuples: Path):
    with Review(tuples) as review:
        decide(review, 0, "kept")
    write_tuples(tuples.parent, [record(0, instruction="another one"), record(1)])
    with Review(tuples) as review:
        assert review.strangers == 1 and review.items[0].status == "open"
        decide(review, 1, "kept")
    write_tuples(tuples.parent, [record(0), record(1)])
    assert statuses(tuples) == ["kept", "kept"]


def test_one_process_reviews_a_file(tuples: Path):
    with Review(tuples), pytest.raises(ValueError, match="another process reviews"):
        Review(tuples)
    with Review(tuples):
        pass


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": "fixed"}, "one of open, kept, discarded"),
        ({"texts": {"instruction": "alone"}}, "expected src_caption"),
        ({"texts": dict.fromkeys(ROLES, " ")}, "is empty"),
        ({"texts": dict.fromkeys(ROLES, "x" * 20_001)}, "20001 characters"),
        ({"texts": dict.fromkeys(ROLES, "\ud800")}, "broken character"),
    ],
)
def test_what_is_no_decision_is_refused(tuples: Path, change: dict[str, Any], said: str):
    with Review(tuples) as review:
        usual = {"status": "kept", "texts": review.items[0].texts, "revision": 0, "writer": ("p", 1)}
        with pytest.raises(ValueError, match=said):
            review.change(0, **{**usual, **change})
        assert review.items[0].status == "open"
    assert journal_path(tuples).read_bytes() == b""


def test_lines_that_are_no_tuples_are_named_before_anything_is_served(tmp_path: Path):
    path = tmp_path / "tuples.jsonl"
    lines = [
        "[]",
        '{"source": 3}',
        '{"source": "a.png", "instruction": ["x"]}',
        '{"source": "a", "source": "b"}',
        '{"source": "\\ud800"}',
        "{",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match="6 line") as raised:
        read_items(path)
    assert all(f"line {number}:" in str(raised.value) for number in range(1, 7))


# ---- the export


def test_the_export_is_the_kept_and_fixed_tuples_as_the_trainer_takes_them(tmp_path: Path):
    images = tmp_path / "images"
    images.mkdir()
    tuples = write_tuples(images, [record(0, meta={"seed": 1}), record(1, id="one"), record(2), record(3)]).rename(tmp_path / "t.jsonl")
    with Review(tuples) as review:
        decide(review, 0, "kept")
        decide(review, 1, "kept", count=2, tgt_caption="a red cup")
        decide(review, 2, "discarded", count=3)
        target = tmp_path / "reviewed.jsonl"
        done = command(tuples, "--root", images, "--export", target)  # while the page is open
    assert done.returncode == 0, done.stderr
    assert "2 tuples (1 kept, 1 fixed, 1 discarded, 1 open)" in done.stdout and "dataset.image_root" in done.stdout
    written = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert written == [record(0, meta={"seed": 1}), record(1, id="one", tgt_caption="a red cup")]
    assert [item.tgt_caption for item in read_tuples_file(target, images)] == ["tgt_caption of 0", "a red cup"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".lock") == [
        "reviewed.jsonl",
        "t.jsonl",
        "t.review.jsonl",
    ]


def test_an_export_that_the_trainer_would_refuse_is_not_written(tuples: Path):
    with Review(tuples) as review:
        for index in (1, 2):
            decide(review, index, "kept", count=index)
    (tuples.parent / "2.png").unlink()
    target = tuples.parent / "out.jsonl"
    earlier = json.dumps(record(9)) + "\n"
    target.write_text(earlier)
    with pytest.raises(ValueError, match=r"line 3: source: no such file .*2\.png"):
        export_reviewed(tuples, target, tuples.parent)
    assert target.read_text() == earlier
    for own in (tuples, journal_path(tuples)):
        with pytest.raises(ValueError, match="file of the review itself"):
            export_reviewed(tuples, own, tuples.parent)


def test_an_export_that_is_made_again_keeps_what_was_held_out(tuples: Path):
    target = tuples.parent / "out.jsonl"
    with Review(tuples) as review:
        for index in (0, 1):
            decide(review, index, "kept", count=index + 1)
        export_reviewed(tuples, target, tuples.parent)
        exported = list(read_records(target))
        write_records(target, [{**exported[0], "split": "validation"}, exported[1]])  # as hold_out.py does
        decide(review, 2, "kept", count=3)
    export_reviewed(tuples, target, tuples.parent)
    again = list(read_records(target))
    assert [one.get("split") for one in again] == ["validation", None, None]
    assert [one["source"] for one in again[:2]] == [one["source"] for one in exported]


def test_a_split_of_the_tuple_itself_stands_above_an_earlier_export(tmp_path: Path):
    tuples = write_tuples(tmp_path, [record(0, split="train")])
    target = tmp_path / "out.jsonl"
    with Review(tuples) as review:
        decide(review, 0, "kept")
    write_records(target, [record(0, split="validation")])
    export_reviewed(tuples, target, tmp_path)
    assert [one["split"] for one in read_records(target)] == ["train"]


@pytest.mark.parametrize("text", ["my own notes", '{"a": 1}', '{"source": ["x"], "split": "train"}'])
def test_an_export_writes_over_no_file_of_another_kind(tuples: Path, text: str):
    with Review(tuples) as review:
        decide(review, 0, "kept")
    target = tuples.parent / "notes.txt"
    target.write_text(text)
    with pytest.raises(ValueError, match=r"--export .*notes\.txt: is there and is no tuples file.*choose another name"):
        export_reviewed(tuples, target, tuples.parent)
    assert target.read_text() == text


def test_texts_that_break_a_rule_are_exported_if_the_reviewer_says_so(tmp_path: Path):
    tuples = write_tuples(tmp_path, [record(0, reverse_instruction="restore the original cup")])
    target = tmp_path / "out.jsonl"
    with Review(tuples) as review:
        decide(review, 0, "kept")
        with pytest.raises(ValueError, match='to train on such texts all the same: --rules warn here, and dataset.rules = "warn"'):
            export_reviewed(tuples, target, tmp_path)
    assert not target.exists()
    done = command(tuples, "--export", target, "--rules", "warn")
    assert done.returncode == 0 and len(read_tuples_file(target, rules="warn")) == 1, done.stderr
    done = command(tuples, "--rules", "warn")
    assert done.returncode == 2 and "--rules warn: is of --export" in done.stderr
    done = command(tuples, "--export", target, "--rules", "warn", "--port", "-7", "--allow-host", "x")
    assert done.returncode == 2 and "--export has no use for --port, --allow-host: leave it out" in done.stderr


# ---- the server


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "dataset_tools" / "review.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE * 2,
    )
