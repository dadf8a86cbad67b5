"""The importer from the paired layout: nothing lost, nothing made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from byg_plugin.data.import_kontext import import_kontext, main
from byg_plugin.data.tuples import read_tuples_file
from tests.support import ROOT
from tests.support.data_fakes import picture

TEXTS = {".txt": "make it red", ".src.txt": "a car", ".tgt.txt": "a red car", ".rev.txt": "give it its old colour"}


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """a and b are whole, c has an instruction only."""
    for name in ("a", "b", "c"):
        picture(tmp_path / "targets" / f"{name}.png", (16, 16))
        picture(tmp_path / "controls" / f"{name}.jpg", (16, 16))
        for suffix, text in TEXTS.items():
            if name != "c" or suffix == ".txt":
                (tmp_path / "targets" / f"{name}{suffix}").write_text(f"\ufeff{text} {name}\n", encoding="utf-8")
    return tmp_path


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_control_is_the_source_and_target_the_optional_target(layout: Path) -> None:
    done = import_kontext(layout / "targets", layout / "controls", layout / "tuples.jsonl")
    assert (done.complete, done.incomplete) == (2, 1)
    assert lines(layout / "tuples.jsonl")[0] == {
        "source": "controls/a.jpg",
        "src_caption": "a car a",
        "tgt_caption": "a red car a",
        "instruction": "make it red a",
        "reverse_instruction": "give it its old colour a",
        "target": "targets/a.png",
    }
    items = read_tuples_file(layout / "tuples.jsonl")
    assert [item.source for item in items] == [layout / "controls" / f"{name}.jpg" for name in "ab"]
    assert [item.target for item in items] == [layout / "targets" / f"{name}.png" for name in "ab"]


def test_what_is_incomplete_is_named_and_not_made_up(layout: Path) -> None:
    (layout / "targets" / "b.rev.txt").write_text(" \n")
    import_kontext(layout / "targets", layout / "controls", layout / "tuples.jsonl")
    assert lines(layout / "tuples.incomplete.jsonl") == [
        {
            "source": "controls/b.jpg",
            "src_caption": "a car b",
            "tgt_caption": "a red car b",
            "instruction": "make it red b",
            "target": "targets/b.png",
            "missing": ["reverse_instruction"],
        },
        {
            "source": "controls/c.jpg",
            "instruction": "make it red c",
            "target": "targets/c.png",
            "missing": ["src_caption", "tgt_caption", "reverse_instruction"],
        },
    ]
    with pytest.raises(ValueError, match="unknown field 'missing'"):  # never trained on as they are
        read_tuples_file(layout / "tuples.incomplete.jsonl")


def test_filling_in_and_running_again_completes_it(layout: Path) -> None:
    out = layout / "tuples.jsonl"
    import_kontext(layout / "targets", layout / "controls", out)
    for suffix, text in TEXTS.items():
        (layout / "targets" / f"c{suffix}").write_text(text)
    assert import_kontext(layout / "targets", layout / "controls", out).complete == 3
    assert len(read_tuples_file(out)) == 3 and not (layout / "tuples.incomplete.jsonl").exists()


def test_finished_tuples_outlive_an_import_without_a_complete_one(layout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = layout / "tuples.jsonl"
    options = ["--targets", str(layout / "targets"), "--controls", str(layout / "controls"), "--out", str(out)]
    for name in "ab":
        (layout / "targets" / f"{name}.src.txt").unlink()
    with pytest.raises(SystemExit):
        main(options)
    assert f"no complete tuple, {out} is not written" in capsys.readouterr().out and not out.exists()
    out.write_text("mine\n")
    with pytest.raises(SystemExit):
        main(options)
    assert f"no complete tuple, {out} is left as it was" in capsys.readouterr().out
    assert out.read_text() == "mine\n" and len(lines(layout / "tuples.incomplete.jsonl")) == 3


def test_no_instruction_is_missing_too(layout: Path) -> None:
    (layout / "targets" / "a.txt").unlink()
    import_kontext(layout / "targets", layout / "controls", layout / "tuples.jsonl")
    assert lines(layout / "tuples.incomplete.jsonl")[0]["missing"] == ["instruction"]


def test_images_below_the_list_are_relative_however_it_is_written(layout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(layout / "targets")
    import_kontext(Path("../targets"), layout / "controls", Path("../tuples.jsonl"))
    assert (lines(layout / "tuples.jsonl")[0]["source"], lines(layout / "tuples.jsonl")[0]["target"]) == ("controls/a.jpg", "targets/a.png")


def test_images_elsewhere_are_absolute(layout: Path) -> None:
    out = layout / "lists" / "deep" / "tuples.jsonl"
    import_kontext(layout / "targets", layout / "controls", out)
    assert lines(out)[0]["source"] == (layout / "controls" / "a.jpg").as_posix()
    assert len(read_tuples_file(out)) == 2


def test_all_bad_items_at_once_and_nothing_is_written(layout: Path) -> None:
    (layout / "tuples.jsonl").write_text("mine\n")
    picture(layout / "targets" / "alone.png", (16, 16))
    picture(layout / "controls" / "single.jpg", (16, 16))
    picture(layout / "controls" / "a.png", (16, 16))
    (layout / "targets" / "b.txt").write_bytes("Fläche".encode("latin-1"))
    (layout / "targets" / "c.src.txt").write_bytes("a car".encode("utf-16"))
    with pytest.raises(ValueError) as caught:
        import_kontext(layout / "targets", layout / "controls", layout / "tuples.jsonl")
    said = str(caught.value)
    for part in (
        "5 problem(s), nothing was written",
        f"alone.png: no image named alone in {layout / 'controls'}",
        f"single.jpg: no image named single in {layout / 'targets'}",
        "--controls: a.jpg and a.png have one name",
        "b.txt: not UTF-8 text",
        "c.src.txt: UTF-16 text; save it as UTF-8",
    ):
        assert part in said
    assert (layout / "tuples.jsonl").read_text() == "mine\n" and not (layout / "tuples.incomplete.jsonl").exists()


def test_missing_and_empty_folders(layout: Path) -> None:
    (layout / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--controls .*nowhere: no such folder"):
        import_kontext(layout / "targets", layout / "nowhere", layout / "t.jsonl")
    with pytest.raises(ValueError, match=r"--targets .*empty: no image in it"):
        import_kontext(layout / "empty", layout / "controls", layout / "t.jsonl")


def test_place_that_cannot_be_written(layout: Path) -> None:
    (layout / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out .*t\.jsonl: cannot be written"):
        import_kontext(layout / "targets", layout / "controls", layout / "file" / "t.jsonl")


def test_command(layout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--targets", str(layout / "targets"), "--controls", str(layout / "controls"), "--out", str(layout / "t.jsonl")]
    with pytest.raises(SystemExit) as caught:
        main(options)
    said = capsys.readouterr().out
    assert caught.value.code == 1
    for part in (
        "2 tuples in",
        "1 items lack texts",
        "t.incomplete.jsonl",
        "NAME.src.txt (src_caption)",
        "NAME.rev.txt",
        "run this command again",
    ):
        assert part in said
    for suffix, text in TEXTS.items():
        (layout / "targets" / f"c{suffix}").write_text(text)
    main(options)  # exit code 0
    bad = subprocess.run(
        [sys.executable, "-m", "byg_plugin.data.import_kontext", "--targets", "nowhere", "--controls", ".", "--out", "t.jsonl"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert bad.returncode == 2 and bad.stderr == "error: --targets nowhere: no such folder\n"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="no such names there")
@pytest.mark.parametrize(("name", "said"), [("d\\e", "holds a backslash"), (os.fsdecode(b"d\xff"), "is not Unicode text")])
def test_a_name_that_no_tuple_can_hold(layout: Path, name: str, said: str) -> None:
    for folder in ("targets", "controls"):
        (layout / folder / f"{name}.png").write_bytes((layout / "targets" / "a.png").read_bytes())
    with pytest.raises(ValueError, match=said):
        import_kontext(layout / "targets", layout / "controls", layout / "tuples.jsonl")
