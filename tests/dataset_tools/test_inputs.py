"""What is read from folders and tables: each file once, each row whole or an error."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from dataset_tools.generate_edits import generate, inputs
from dataset_tools.inputs import files_below, folder_images, table_images, table_rows
from dataset_tools.prepare_captions import clip_inputs, prepare
from dataset_tools.render_videos import jobs
from dataset_tools.settings import CaptionsSettings, GenerateSettings, JudgeSettings, RenderSettings, read_settings
from tests.support.tools_helpers import photos


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("photos/a.png", "photos/sub/b.png", "elsewhere/c.png", "photos/.hidden.png"):
        (tmp_path / name).touch()
    try:
        os.symlink("..", tmp_path / "photos" / "sub" / "up")
        os.symlink("../elsewhere", tmp_path / "photos" / "other")
        os.symlink("itself", tmp_path / "photos" / "itself")
    except OSError:
        pytest.skip("this system lets nobody make links")
    others: Counter[str] = Counter()
    found = sorted(path.relative_to(tmp_path).as_posix() for path in files_below(tmp_path / "photos", (".png",), others))
    assert found == ["photos/a.png", "photos/other/c.png", "photos/sub/b.png"] and others == {"": 1, "hidden": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,caption\na.png,a red car, parked\n", r"t\.csv: line 2 has more fields .* in double quotes"),
        ("file,caption\na.png,a car\n", r"no column 'image' .* it has file, caption"),
    ],
)
def test_tables_that_would_lose_a_text(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        list(table_images(tmp_path / "t.csv", tmp_path, root=None, image="image", caption="caption", style="style"))


@pytest.mark.parametrize(
    ("suffix", "contents", "said"),
    [
        ("txt", "a car".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("txt", "Fläche".encode("latin-1"), "not UTF-8 text"),
        ("json", json.dumps({"caption": "a car"}).encode("utf-16-le"), "UTF-16 text; save it as UTF-8"),
        ("json", b"[" * 100_000, "nested too deeply"),
        ("json", b"9" * 5000, "digits"),
    ],
    ids=range(5),
)
def test_what_lies_beside_an_image_and_cannot_be_read_is_its_problem(tmp_path: Path, suffix: str, contents: bytes, said: str) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / f"a.{suffix}").write_bytes(contents)
    (item,) = folder_images(tmp_path, tmp_path, None, Counter())
    assert item.problem is not None and said in item.problem and f"a.{suffix} beside it" in item.problem


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
@pytest.mark.parametrize("name", ["a\\b.png", "sub\\dir/a.png"])
def test_a_name_that_no_tuple_can_hold_is_a_problem(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    (item,) = folder_images(tmp_path, tmp_path, None, Counter())
    assert item.problem == "its name holds a backslash, which a tuples file reads as /; rename it"
    (outside,) = folder_images(tmp_path, tmp_path / "elsewhere", None, Counter())
    assert outside.problem is None  # absolute, and read as it is


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_tables_in_another_encoding_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    path.write_bytes('{"image": "a.png"}\n'.encode("utf-16"))
    with pytest.raises(ValueError, match=rf"t\.{suffix}: .*UTF-16 text; save it as UTF-8"):
        list(table_rows(path))


def test_a_parquet_table_with_texts_that_are_none_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")])
    parquet.write_table(pyarrow.table({"image": broken}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet: cannot be read as Parquet"):
        list(table_rows(tmp_path / "t.parquet"))


@pytest.mark.parametrize(("name", "said"), [("C:\new\table.png", "control characters"), ("gone\\b.png", "its backslashes are read as /")])
def test_a_row_s_path_that_leads_nowhere_says_why(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": name}) + "\n")
    (item,) = table_images(tmp_path / "t.jsonl", tmp_path, root=None, image="image", caption="caption", style="style")
    assert item.problem is not None and item.problem.startswith("no such file") and said in item.problem


def test_half_a_character_in_a_text_is_the_image_s_problem(tmp_path: Path) -> None:
    """JSON can hold it, a tuple that is trained on cannot."""
    (tmp_path / "a.png").touch()
    (tmp_path / "a.json").write_text('{"caption": "a car \\ud83d"}')
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "style": "\\ud83d"}\n{"image": "a.png", "caption": "a car"}\n')
    (beside,) = folder_images(tmp_path, tmp_path, None, Counter())
    of_row, whole = table_images(tmp_path / "t.jsonl", tmp_path, root=None, image="image", caption="caption", style="style")
    assert beside.problem == r"its caption holds a broken character: 'a car \ud83d'"
    assert of_row.problem == r"its style holds a broken character: '\ud83d'" and whole.problem is None


def test_images_have_one_name_however_the_output_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photos(tmp_path / "data" / "photos", 1)
    (tmp_path / "data" / "c.mp4").touch()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for out in ("../data/t.jsonl", "../work/../data/t.jsonl", str(tmp_path / "data" / "t.jsonl")):
        generated = inputs(GenerateSettings(images="../data/photos", out=out, backend="rules"), Counter())
        assert [item.source for item in generated] == ["photos/p0000.jpg"]
        described = clip_inputs(CaptionsSettings(clips="../data", out=out), Counter())
        assert [row.name for row in described] == ["c.mp4"]


def test_an_image_that_was_named_in_full_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an `out` with `..` made versions before this one name it: it is not paid for twice."""
    photos(tmp_path / "data" / "photos", 2)
    monkeypatch.chdir(tmp_path / "data")
    out = tmp_path / "data" / "t.jsonl"
    settings = GenerateSettings(images="photos", out="../data/t.jsonl", backend="rules")
    assert generate(settings).new == 2
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    out.write_text("".join(json.dumps(line | {"source": str(tmp_path / "data" / line["source"])}) + "\n" for line in lines))
    assert generate(settings).new == 0 and len(out.read_text().splitlines()) == len(lines) > 0


@pytest.mark.parametrize("from_file", [False, True])
def test_every_place_may_begin_in_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_file: bool) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    for model, section, names in (
        (GenerateSettings, "generate", ("images", "out", "image_root", "model")),
        (CaptionsSettings, "captions", ("table", "out", "model")),
        (CaptionsSettings, "captions", ("clips", "out", "model")),
        (RenderSettings, "render", ("captions", "out", "model")),
        (JudgeSettings, "judge", ("edits", "tuples", "results", "out", "prompts", "model")),
    ):
        (tmp_path / "c.toml").write_text(f"[{section}]\n" + "".join(f'{name} = "~/q/{name}"\n' for name in names if from_file))
        given = () if from_file else [f"--{name.replace('_', '-')}=~/q/{name}" for name in names]
        settings = read_settings(model, section, "", ["--config=~/c.toml", *given])
        assert [getattr(settings, name) for name in names] == [str(tmp_path / "q" / name) for name in names]


def _generated(table: Path) -> None:
    generate(GenerateSettings(images=str(table), out=str(table), backend="rules"))


def _cleaned(table: Path) -> None:
    prepare(CaptionsSettings(table=str(table), out=str(table), caption_column="caption"))


def _rendered(table: Path) -> None:
    jobs(RenderSettings(captions=str(table), out=str(table.parent)))


@pytest.mark.parametrize("write", [_generated, _cleaned, _rendered])
def test_a_table_is_never_written_over(tmp_path: Path, write: Callable[[Path], None]) -> None:
    table = tmp_path / "tuples.jsonl"
    table.write_text('{"id": "a", "image": "a.png", "caption": "c", "prompt": "p", "style": "s"}\n')
    before = table.read_bytes()
    with pytest.raises(ValueError, match=r"out = .*tuples.jsonl: is the file that (images|table|captions) = .* reads, and would be spoilt"):
        write(table)
    assert table.read_bytes() == before
