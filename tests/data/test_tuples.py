"""Tuples: what is read, and every bad file with its message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from byg_plugin.config.sections import DatasetConfig
from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import EditTuple, read_tuples, read_tuples_file
from tests.support.data_fakes import picture, record, write_tuples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        picture(tmp_path / "data" / name, (16, 16))
    return tmp_path / "data"


def read(folder: Path, *records: dict[str, Any]) -> list[EditTuple]:
    return read_tuples_file(write_tuples(folder / "tuples.jsonl", records))


def refused(path: Path, root: Path | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        read_tuples_file(path, root)
    return str(caught.value)


def refused_records(folder: Path, *records: dict[str, Any]) -> str:
    return refused(write_tuples(folder / "tuples.jsonl", records))


def test_all_fields(folder: Path) -> None:
    (item,) = read(folder, record("a.png", edit_type="colour", target="b.png", id="x", meta={"any": [1]}, instruction="  paint it \n"))
    assert item.source == folder / "a.png" and item.target == folder / "b.png"
    assert (item.id, item.edit_type, item.instruction, item.src_caption) == ("x", "colour", "paint it", "src_caption 0 of a.png")


def test_several_tuples_an_image_get_different_lasting_ids(folder: Path) -> None:
    first, second = read(folder, record("a.png", 0), record("a.png", 1))
    assert first.source == second.source and first.id != second.id
    again = read(folder, record("b.png"), record("a.png", 1), record("a.png", 0))
    assert [item.id for item in again[1:]] == [second.id, first.id]


def test_an_id_is_the_same_in_another_folder_and_of_another_system(folder: Path) -> None:
    (here,) = read(folder, record("sub/c.png")) if picture(folder / "sub" / "c.png", (16, 16)) else ()
    moved = folder.rename(folder.with_name("elsewhere"))
    (elsewhere,) = read(moved, {**record("sub/c.png"), "source": "sub\\c.png"})
    assert here.id == elsewhere.id and elsewhere.source == moved / "sub" / "c.png"


def test_byte_order_mark_blank_lines_crlf_and_line_separators_inside_a_caption(folder: Path) -> None:
    line = json.dumps(record("a.png", src_caption="one\u2028two"), ensure_ascii=False)
    (folder / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + f"\r\n{line}\r\n\r\n".encode())
    (item,) = read_tuples_file(folder / "t.jsonl")
    assert item.src_caption == "one\u2028two"


def test_image_root_and_absolute_paths(folder: Path, tmp_path: Path) -> None:
    path = write_tuples(tmp_path / "lists" / "t.jsonl", [record("a.png"), record(str(folder / "b.png"))])
    config = DatasetConfig(tuples=str(path), image_root=str(folder), cache_dir="c")
    assert [item.source for item in read_tuples(config)] == [folder / "a.png", folder / "b.png"]
    assert "no such file" in refused(path)  # they are not beside the list
    with pytest.raises(ValueError, match=r"dataset\.image_root = .*nowhere: no such folder"):
        read_tuples(config.model_copy(update={"image_root": str(tmp_path / "nowhere")}))


@pytest.mark.parametrize("name", ["source", *ROLES])
def test_missing_field(folder: Path, name: str) -> None:
    assert f"line 2: {name} is missing" in refused_records(folder, record("a.png"), record("a.png", 1, **{name: None}))


@pytest.mark.parametrize("name", ["source", *ROLES])
@pytest.mark.parametrize("empty", ["", " \n\t"])
def test_empty_field(folder: Path, name: str, empty: str) -> None:
    assert f"line 1: {name} is empty" in refused_records(folder, record("a.png", **{name: empty}))


@pytest.mark.parametrize("name", [*ROLES, "id", "edit_type", "target"])
def test_wrong_type(folder: Path, name: str) -> None:
    assert f"line 1: {name} = 7 is not a text" in refused_records(folder, record("a.png", **{name: 7}))


def test_misspelt_field_names_the_nearest(folder: Path) -> None:
    said = refused_records(folder, record("a.png", instruction=None, instrution="x"))
    assert "unknown field 'instrution'; did you mean 'instruction'?" in said and "instruction is missing" in said


def test_field_like_no_other_points_to_meta(folder: Path) -> None:
    assert "unknown field 'zzz'; put side data into 'meta'" in refused_records(folder, record("a.png", zzz=1))


def test_duplicate_id_names_both_lines(folder: Path) -> None:
    said = refused_records(folder, record("a.png", id="x"), record("b.png"), record("b.png", 1, id="x"))
    assert "line 3: duplicate id: has the id 'x' of line 1" in said


def test_equal_tuples(folder: Path) -> None:
    assert "line 2: duplicate id: has the same contents as line 1" in refused_records(folder, record("a.png"), record("a.png"))


@pytest.mark.parametrize("name", ["source", "target"])
def test_missing_image(folder: Path, name: str) -> None:
    said = refused_records(folder, record("a.png", **{name: "nowhere.png"}))
    assert f"line 1: {name}: no such file {folder / 'nowhere.png'}" in said


def test_caption_in_the_place_of_a_path(folder: Path) -> None:
    assert "source: no such file" in refused_records(folder, record("a" * 5000))


def test_half_a_surrogate_pair(folder: Path) -> None:
    assert "line 1: instruction holds a broken character" in refused_records(folder, record("a.png", instruction="x\ud800"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"source": "a.png",}', "line 2: not JSON"),
        ("[1, 2]", "line 2: expected a JSON object on each line, got list"),
        ('{"source": "a.png", "source": "b.png"}', "line 2: source appears twice in one object"),
    ],
)
def test_bad_line(folder: Path, line: str, said: str) -> None:
    (folder / "t.jsonl").write_text(json.dumps(record("a.png")) + "\n" + line + "\n")
    assert said in refused(folder / "t.jsonl")


def test_not_utf8(folder: Path) -> None:
    (folder / "t.jsonl").write_bytes(json.dumps(record("a.png", instruction="Fläche"), ensure_ascii=False).encode("latin-1"))
    said = refused(folder / "t.jsonl")
    assert "line 1: not UTF-8" in said and "save the file as UTF-8" in said


def test_all_problems_at_once_the_first_20_in_words(folder: Path) -> None:
    path = write_tuples(folder / "t.jsonl", [record("a.png", k, reverse_instruction=None) for k in range(25)])
    with path.open("a") as file:
        file.write("no json\n")
    said = refused(path)
    assert "26 problem(s)" in said and said.count("\n  - ") == 20 and "... and 6 more" in said
    for line in ("line 1: reverse_instruction", "line 20: reverse_instruction"):
        assert line in said
    assert "line 21:" not in said


def test_empty_file_and_missing_file(folder: Path) -> None:
    (folder / "t.jsonl").write_text("\n")
    assert "no tuples in it" in refused(folder / "t.jsonl")
    assert "no such file or folder" in refused(folder / "nothing.jsonl")


# --- a folder with a .json beside each image ---


def beside(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def texts(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in record("x", number, **changes).items() if name != "source"}


def test_folder_of_one_tuple_and_a_list(folder: Path) -> None:
    beside(folder, "a.json", texts(0))
    beside(folder, "b.json", [texts(1), texts(2, target="a.png")])
    items = read_tuples_file(folder)
    assert [item.source.name for item in items] == ["a.png", "b.png", "b.png"]
    assert items[2].target == folder / "a.png" and items[1].instruction == "instruction 1 of x"


def test_folder_image_that_is_only_a_target_needs_no_json(folder: Path) -> None:
    beside(folder, "a.json", texts(target="b.png"))
    assert len(read_tuples_file(folder)) == 1


def test_folder_problems(folder: Path) -> None:
    beside(folder, "a.json", [texts(0, tgt_caption=None), 5])
    beside(folder, "c.json", texts())
    said = refused(folder)
    for part in (
        "a.json[0]: tgt_caption is missing",
        "a.json[1]: expected a JSON object, got int",
        "c.json: needs one image of the same name beside it, there is none",
        "1 image(s) have no .json of the same name beside them",
        "b.png",
    ):
        assert part in said


def test_folder_json_that_is_none_or_of_another_image_or_of_two(folder: Path) -> None:
    picture(folder / "b.jpg", (16, 16))
    beside(folder, "b.json", texts())
    beside(folder, "a.json", {**texts(), "source": "b.png"})
    said = refused(folder)
    assert "b.json: needs one image of the same name beside it, there is b.jpg, b.png" in said
    assert "a.json: source = 'b.png' is not a.png" in said
    (folder / "a.json").write_bytes(b"\xff{")
    assert "a.json: not UTF-8 text" in refused(folder)


def test_folder_without_images(tmp_path: Path) -> None:
    assert "no image or clip in this folder" in refused(tmp_path)


def test_folder_with_an_image_root(folder: Path) -> None:
    beside(folder, "a.json", texts())
    assert "leave it out" in refused(folder, folder)


def test_hard_rules_are_errors_and_discouraged_forms_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = record("a.png", 0, reverse_instruction="restore the sky")
    path = write_tuples(folder / "t.jsonl", [broken, record("a.png", 1, tgt_caption="a field without trees")])
    said = refused(path)
    assert "line 1: reverse_instruction has 'restore'" in said and "must stand alone" in said and 'dataset.rules = "warn"' in said
    assert "line 2" not in said
    tuples = read_tuples(DatasetConfig(tuples=str(path), cache_dir="c", rules="warn"))
    assert len(tuples) == 2
    assert "1 reverse_refers_back, 1 target_negative" in caplog.text


def test_split_is_kept_and_an_unknown_one_refused(folder: Path) -> None:
    assert [item.split for item in read(folder, record("a.png"), record("b.png", split="validation"))] == [None, "validation"]
    assert "split = 'test' is none of train, validation" in refused_records(folder, record("a.png", split="test"))


# --- what others wrote: other encodings, JSON without end, paths of other systems ---


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_texts_in_another_encoding_are_named_once(folder: Path, encoding: str) -> None:
    lines = (folder / "t.jsonl", "".join(json.dumps(record("a.png", number)) + "\n" for number in range(3)))
    lines[0].write_bytes(lines[1].encode(encoding))
    said = refused(lines[0])
    assert f"1 problem(s), nothing was done:\n  - line 1: {encoding[:6].upper()} text; save the file as UTF-8" in said
    lines[0].unlink()
    (folder / "a.json").write_bytes(json.dumps(texts()).encode(encoding))
    assert f"a.json: {encoding[:6].upper()} text; save it as UTF-8" in refused(folder)


@pytest.mark.parametrize("brackets", ["[", '{"a":'])
def test_json_nested_without_end_is_named(folder: Path, brackets: str) -> None:
    line = brackets * 100_000
    (folder / "t.jsonl").write_text(line + "\n")
    assert "line 1: nested too deeply" in refused(folder / "t.jsonl")
    (folder / "a.json").write_text(line)
    assert "a.json: not JSON: nested too deeply" in refused(folder)


def test_meta_may_be_nested_and_an_integer_of_5000_digits_is_named(folder: Path) -> None:
    deep = json.loads("[" * 50 + "]" * 50)
    assert len(read(folder, record("a.png", meta={"deep": deep}))) == 1
    (folder / "t.jsonl").write_text(json.dumps(record("a.png", meta=0))[:-2] + "9" * 5000 + "}\n")
    assert "line 1: " in refused(folder / "t.jsonl") and "digits" in refused(folder / "t.jsonl")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("C:\new\table.png", "it holds control characters; in JSON a backslash begins an escape"),
        ("nul\0.png", "it holds control characters"),
        ("gone\\b.png", "gone/b.png (its backslashes are read as /)"),
        ("gone.png", "no such file"),
    ],
)
@pytest.mark.parametrize("field", ["source", "target"])
def test_a_path_that_leads_nowhere_says_why(folder: Path, source: str, said: str, field: str) -> None:
    message = refused_records(folder, record("a.png", **{field: source}))
    assert f"{field}: no such file" in message and said in message and not {"\0", "\t"} & set(message)


def test_an_escape_that_json_has_not_names_the_backslash(folder: Path) -> None:
    line = json.dumps(record("a.png")).replace('"a.png"', '"D:\\photos\\a.png"')
    (folder / "t.jsonl").write_text(line + "\n")
    said = refused(folder / "t.jsonl")
    assert "line 1: not JSON: Invalid \\escape at column" in said and "in JSON a backslash is written \\\\" in said
    (folder / "a.json").write_text(line)
    assert "a.json: not JSON: Invalid \\escape" in refused(folder) and "in JSON a backslash is written \\\\" in refused(folder)
