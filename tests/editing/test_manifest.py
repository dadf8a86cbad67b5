"""`edits.jsonl`: what lies in a folder of edits, written as they are made and read by what judges them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from byg_plugin import EditPipeline
from byg_plugin.data.rules import ROLES
from byg_plugin.editing import manifest
from byg_plugin.editing.jobs import Job
from byg_plugin.editing.manifest import Edit, read_manifest
from byg_plugin.editing.results import Results
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.files import read_lora
from tests.support.editing import command, difference, photo, pipeline
from tests.support.tiny import workspace


def edit(folder: Path, name: str = "a", **changes: Any) -> Edit:
    values: dict[str, Any] = {
        "source": folder / "in" / f"{name}.jpg",
        "edit": folder / "out" / f"{name}.png",
        "side_by_side": folder / "out" / f"{name}_side_by_side.png",
        "instruction": "add the snow \u2028 下雪",
        "seed": 2**63 - 1,
        "size": (64, 48),
        "settings": {"steps": 3, "guidance": None},
        "card": LoraCard(family="flux", guidance=3.5),
    }
    return Edit(**values | changes)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "in").mkdir()
    return tmp_path / "out"


def test_what_is_written_is_read(out: Path):
    texts = {"src_caption": "a", "tgt_caption": "b", "reverse_instruction": "c", "edit_type": "style", "id": "7"}
    edits = [edit(out.parent), edit(out.parent, "b", frames=5, fps=25.0, **texts)]
    for one in edits:
        manifest.append(out, one)
    assert read_manifest(out) == read_manifest(str(out)) == edits
    data = (out / "edits.jsonl").read_bytes()
    assert data.isascii() and data.endswith(b"\n") and data.count(b"\n") == 2
    assert json.loads(data.splitlines()[0])["source"] == "../in/a.jpg"


def test_the_folders_can_be_moved_together(out: Path, tmp_path: Path):
    manifest.append(out, edit(tmp_path))
    (tmp_path / "moved").mkdir()
    for name in ("in", "out"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    (found,) = read_manifest(tmp_path / "moved" / "out")
    assert found == edit(tmp_path / "moved")


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_a_source_behind_links_is_found(out: Path, tmp_path: Path):
    (tmp_path / "in" / "a.jpg").write_bytes(b"x")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "link").symlink_to(tmp_path / "in")
    (tmp_path / "deep" / "er" / "short").symlink_to(out)
    for source in ("deep/er/link/a.jpg", "deep/er/link/../in/a.jpg"):
        manifest.append(tmp_path / "deep/er/short", edit(tmp_path, source=tmp_path / source))
    for folder in (out, tmp_path / "deep/er/short"):
        assert [one.source.read_bytes() for one in read_manifest(folder)] == [b"x", b"x"]


def test_lines_of_edits_that_are_made_anew_are_taken_out(out: Path):
    for name in ("a", "b", "c"):
        manifest.append(out, edit(out.parent, name))
    before = (out / "edits.jsonl").read_text(encoding="utf-8").splitlines()
    manifest.take_out(out, {"b.png"})
    assert (out / "edits.jsonl").read_text(encoding="utf-8").splitlines() == [before[0], before[2]]
    manifest.take_out(out, {"a.png", "c.png"})
    assert read_manifest(out) == []


def test_a_folder_that_is_edited_into_has_a_manifest_before_its_first_file(out: Path):
    """A run that is stopped in its first edit, or before it has reached all that are made anew, can be started again."""
    manifest.take_out(out, {"a.png"})
    assert [path.name for path in out.iterdir()] == ["edits.jsonl"] and read_manifest(out) == []


def test_a_file_of_either_kind_that_is_made_anew_takes_the_line_out(out: Path):
    manifest.append(out, edit(out.parent))
    manifest.append(out, edit(out.parent, "b_side_by_side"))
    manifest.take_out(out, {"a_side_by_side.png"})
    assert [one.edit.name for one in read_manifest(out)] == ["b_side_by_side.png"]


def test_a_file_without_lines_to_take_out_stays(out: Path):
    """Another run may be adding to it."""
    manifest.append(out, edit(out.parent))
    before = (out / "edits.jsonl").stat()
    manifest.take_out(out, {"b.png"})
    assert (out / "edits.jsonl").stat() == before


@pytest.mark.parametrize("end", [b"", b"\r\n", b"\n\n"])
def test_lines_stay_apart_and_as_they_were(out: Path, end: bytes):
    for name in ("a", "b"):
        manifest.append(out, edit(out.parent, name))
    whole = (out / "edits.jsonl").read_bytes()
    (out / "edits.jsonl").write_bytes(whole.strip().replace(b"\n", end or b"\n") + end)
    for name in ("c", "b", "c"):
        manifest.take_out(out, {f"{name}.png"})
        manifest.append(out, edit(out.parent, name))
    assert [one.edit.name for one in read_manifest(out)] == ["a.png", "b.png", "c.png"]
    assert (out / "edits.jsonl").read_bytes().startswith(whole)


def test_a_disk_that_fills_up_leaves_whole_lines(out: Path, monkeypatch: pytest.MonkeyPatch):
    manifest.append(out, edit(out.parent))
    whole = (out / "edits.jsonl").read_bytes()
    opened = Path.open

    class Full:
        """Takes seven bytes."""

        def __init__(self, file: Any):
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            return int(self.file.write(data[:7]))

    monkeypatch.setattr(Path, "open", lambda *args, **options: Full(opened(*args, **options)))
    with pytest.raises(OSError, match="No space left"):
        manifest.append(out, edit(out.parent, "b"))
    monkeypatch.undo()
    assert (out / "edits.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": None}, "seed = 'None' is damaged"),
        ({"seed": True}, "seed = 'True' is damaged"),
        ({"source": ...}, "source is missing"),
        ({"size": [64]}, r"size = \[64\] is not a width and a height"),
        ({"size": [64, 0]}, r"size = \[64, 0\] is not a width"),
        ({"card": {"byg.rank": 4}}, "card has values that are no texts"),
        ({"card": {"byg.rank": "x"}}, "its metadata are damaged: byg.rank = 'x'"),
        ({"id": 7}, "id = '7' is damaged"),
    ],
)
def test_a_damaged_line_is_named(out: Path, change: dict[str, Any], says: str):
    manifest.append(out, edit(out.parent))
    line = (out / "edits.jsonl").read_text(encoding="utf-8")
    damaged = {key: value for key, value in (json.loads(line) | change).items() if value is not ...}
    (out / "edits.jsonl").write_text(f"{line}\n{json.dumps(damaged)}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"edits\.jsonl, line 3: {says}.*; no whole line of edit.py's"):
        read_manifest(out)


@pytest.mark.parametrize("line", ["{", "[1]", '{"seed": 1, "seed": 2}', "\x00", "null"])
def test_what_is_no_line_of_ours_is_named(out: Path, line: str):
    (out / "edits.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"edits\.jsonl, line 1: "):
        read_manifest(out)


def test_a_folder_without_one_says_who_writes_it(out: Path):
    with pytest.raises(ValueError, match=r"edits\.jsonl: no such file; byg_plugin/edit\.py writes it"):
        read_manifest(out)


def test_keys_of_later_versions_are_passed_over(out: Path):
    manifest.append(out, edit(out.parent))
    line = json.loads((out / "edits.jsonl").read_text(encoding="utf-8"))
    (out / "edits.jsonl").write_text(json.dumps(line | {"later": 1}), encoding="utf-8")
    assert read_manifest(out) == [edit(out.parent)]


# --- by the command ---


def test_a_line_says_what_was_edited_by_what(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tuples = workspace() / "tuples.jsonl"
    command(monkeypatch, lora, "--tuples", tuples, "--out", tmp_path, "--steps", 1, "--seed", 4, "--strength", 0.5, "--batch-size", 2)
    edits = {one.edit.name: one for one in read_manifest(tmp_path)}
    records = [json.loads(line) for line in tuples.read_text(encoding="utf-8").splitlines()]
    assert sorted(edits) == [f"{index:05d}_{Path(record['source']).stem}.png" for index, record in enumerate(records)]
    for index, (record, one) in enumerate(zip(records, (edits[name] for name in sorted(edits)), strict=True)):
        assert one.source == workspace().resolve() / record["source"] and one.source.is_file() and one.id
        assert {name: getattr(one, name) for name in ROLES} == {name: record[name] for name in ROLES}
        assert one.seed == 4 + index and (one.frames, one.fps) == (None, None)
        with Image.open(one.edit) as image, Image.open(one.side_by_side) as both:
            assert image.size == one.size and both.width == 2 * one.size[0] + 4
    assert one.card == LoraCard.from_metadata(read_lora(lora)[1])
    assert one.settings | {"base": "", "version": ""} == {
        "method": "lora",
        "lora": lora.name,
        "steps": 1,
        "schedule": "shifted",
        "guidance": 3.5,
        "strength": 0.5,
        "cfg_high_noise": None,
        "cfg_low_noise": None,
        "negative": None,
        "solver": "auto",
        "base": "",
        "dtype": "float32",
        "quantization": "none",
        "version": "",
    }
    again = pipeline(lora, strength=0.5)(one.source, one.instruction, steps=1, seed=one.seed)
    with Image.open(one.edit) as image:
        assert difference(image, again) <= 1, "the line makes the file"


def test_a_second_run_replaces_its_lines_and_keeps_the_others(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for index, seed in ((0, 1), (1, 1), (0, 2)):
        command(monkeypatch, lora, "--source", photo(index), "--instruction", "add", "--out", tmp_path, "--steps", 1, "--seed", seed)
    assert [(one.edit.name, one.seed) for one in read_manifest(tmp_path)] == [("photo1.png", 1), ("photo0.png", 2)]


def test_an_edit_that_overwrites_a_side_by_side_takes_its_line(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = ["--instruction", "add", "--out", tmp_path / "out", "--steps", 1]
    sources = [tmp_path / "a_side_by_side.png", tmp_path / "a.png"]
    for source in [*sources, sources[0]]:
        source.write_bytes(photo().read_bytes())
        command(monkeypatch, lora, "--source", source, *given)
        assert [one.source for one in read_manifest(tmp_path / "out")] == [source.resolve()]


def test_an_interrupted_run_leaves_whole_lines_of_whole_files(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = ["--source", workspace(), "--instruction", "add", "--out", tmp_path, "--steps", 1]
    command(monkeypatch, lora, *given)
    saved = Image.Image.save
    calls: list[Path] = []

    def save(image: Image.Image, file: Any, *args: Any, **options: Any) -> None:
        calls.append(file)
        if len(calls) == 4:  # the side-by-side of the second edit
            raise KeyboardInterrupt
        saved(image, file, *args, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, lora, *given, "--seed", 9)
    monkeypatch.undo()
    (one,) = read_manifest(tmp_path)
    with Image.open(one.edit) as image:
        assert json.loads(image.text["byg"])["seed"] == one.seed >= 9
    command(monkeypatch, lora, *given)
    assert len(read_manifest(tmp_path)) == 4


def test_a_file_of_that_name_that_is_none_of_ours_stops_before_the_work(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = tmp_path / "edits.jsonl"
    own.write_bytes((workspace() / "tuples.jsonl").read_bytes())
    before = own.read_bytes()
    monkeypatch.setattr(EditPipeline, "from_lora", lambda *args, **options: pytest.fail("the work has begun"))
    with pytest.raises(ValueError, match=r"edits\.jsonl, line 1: .* is missing"):
        command(monkeypatch, lora, "--source", photo(), "--instruction", "add", "--out", tmp_path)
    assert own.read_bytes() == before and list(tmp_path.iterdir()) == [own]


def test_a_stopped_run_goes_on_with_what_is_not_done(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = tmp_path / "own.safetensors"
    own.write_bytes(lora.read_bytes())
    given = ["--source", workspace(), "--instruction", "add", "--out", tmp_path / "out", "--steps", 1]

    def made_by(*more: Any) -> set[str]:
        """Names of the edits that a run wrote."""
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
        command(monkeypatch, own, *given, *more)
        written = {path for path in (tmp_path / "out").glob("*.png") if path.stat().st_mtime_ns != before.get(path)}
        assert len(read_manifest(tmp_path / "out")) == 4
        return {path.name for path in written if "side" not in path.name}

    every = {f"photo{index}.png" for index in range(4)}
    assert made_by("--skip-done") == every
    seeds = {one.edit.name: one.seed for one in read_manifest(tmp_path / "out")}
    assert made_by("--skip-done") == set()
    manifest.take_out(tmp_path / "out", {"photo1.png"})  # as a stopped run leaves it
    (tmp_path / "out" / "photo2_side_by_side.png").unlink()
    assert made_by("--skip-done") == {"photo1.png", "photo2.png"}
    assert {one.edit.name: one.seed for one in read_manifest(tmp_path / "out")} == seeds
    assert made_by("--skip-done", "--seed", 1) == every
    assert made_by("--skip-done", "--seed", 1, "--steps", 2) == every
    os.utime(own, (later := time.time() + 60, later))  # trained anew
    assert made_by("--skip-done", "--seed", 1, "--steps", 2) == every


def test_edits_of_a_source_that_is_newer_are_made_again(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "a.png"
    source.write_bytes(photo().read_bytes())
    given = ["--source", source, "--instruction", "add", "--out", tmp_path / "out", "--steps", 1, "--skip-done"]
    written = []
    for wait in (0.0, 0.0, 60.0):
        if wait:
            os.utime(source, (later := time.time() + wait, later))
        command(monkeypatch, lora, *given)
        written.append((tmp_path / "out" / "a.png").stat().st_mtime_ns)
    assert written[0] == written[1] != written[2]


def test_what_is_done_cannot_show_another_column(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="--skip-done cannot tell whether .* --show-unguided"):
        command(monkeypatch, lora, "--source", photo(), "--instruction", "add", "--out", tmp_path, "--skip-done", "--show-unguided")


def test_frames_that_are_asked_for_count(out: Path, tmp_path: Path):
    """A clip that was cut shorter is another edit."""
    job = Job(source=tmp_path / "a.mp4", instruction="add", name="a")
    job.source.touch()
    pipe = SimpleNamespace(settings=lambda steps, schedule: ({}, {}), card=LoraCard())
    results = Results(out, pipe, steps=1, schedule=None)  # type: ignore[arg-type]
    for file in job.files(out):
        file.touch()
    manifest.append(out, results._line(job, seed=3, size=(64, 64), frames=9, fps=8.0))
    jobs = [((64, 64), 0, job)]
    left = [results.without_done(jobs, first_seed=3, frames=lambda _, n=n: n, since=0.0) for n in (9, 5)]
    assert left == [[], jobs]
