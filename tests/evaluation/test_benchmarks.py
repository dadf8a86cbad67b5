"""Benchmarks: what each reads, the tuples it writes, its table; what is missing is told with where it is published."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from byg_plugin import evaluate
from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import read_tuples_file
from byg_plugin.editing.jobs import Job
from byg_plugin.evaluation import benchmarks
from byg_plugin.evaluation.benchmarks import gedit, imgedit, longtail, video
from byg_plugin.evaluation.scores import Row
from byg_plugin.evaluation.statistics import by_group
from tests.support import ROOT
from tests.support.evaluation import edit_tuples, noise, save
from tests.support.judged import Numbers, write_answers

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def run(*words: Any) -> None:
    evaluate.main([str(word) for word in words])


def refused(*words: Any) -> str:
    with pytest.raises(ValueError) as caught:
        run(*words)
    return str(caught.value)


def write_gedit(folder: Path, count: int = 12) -> Path:
    """`count` English tasks over the groups in turn, one Chinese one; every second is in the intersection."""
    rows = [
        {
            "key": f"k{number}",
            "task_type": gedit.GROUPS[number % 11],
            "instruction": f" make change number {number}\n",
            "instruction_language": "cn" if number == count else "en",
            "Intersection_exist": number % 2 == 0,
        }
        for number in range(count + 1)
    ]
    for row in rows:
        save(folder / "images" / f"{row['key']}.png", noise(int(row["key"][1:])))
    (folder / "gedit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def write_imgedit(folder: Path) -> Path:
    edits = {
        str(number): {"id": f"animal/{number}.jpg", "prompt": f"do {number}", "edit_type": group}
        for number, group in enumerate((*imgedit.GROUPS, "style"))
    }
    for number in edits:
        save(folder / "original_images" / "animal" / f"{number}.jpg", noise(int(number)))
    (folder / "basic_edit.json").write_text(json.dumps(edits), encoding="utf-8")
    return folder


def write_longtail(folder: Path) -> Path:
    for number in range(2):
        save(folder / "photos" / f"p{number}.png", noise(number))
    (folder / "photos" / "p1.txt").write_text("a dog\non a beach.\n", encoding="utf-8")
    for style in longtail.STYLES:
        save(folder / style / "00.png", noise(7))
    return folder


def write_clips(folder: Path, counts: dict[str, int], frames: int = 81) -> Path:
    for name, count in counts.items():
        for number in range(count):
            save(folder / name / f"c{number}.mp4", np.zeros((frames, 480, 832, 3), dtype=np.uint8))
    return folder


def test_gedit_writes_tuples_that_edit_py_takes_and_scores_by_its_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data, out, edits = write_gedit(tmp_path / "gedit"), tmp_path / "out", tmp_path / "edits"
    run("--benchmark", "gedit", "--data", data, "--out", out)
    assert "12 tasks of gedit (published: 606)" in capsys.readouterr().out
    tuples = read_tuples_file(out / "tuples.jsonl", rules="error")
    assert len(tuples) == 12 and {one.id for one in tuples} == {f"k{number}" for number in range(12)}, "the Chinese one is left out"
    assert all(one.source.is_file() and one.edit_type == gedit.GROUPS[int(one.id[1:]) % 11] for one in tuples)
    assert len(json.loads((out / "benchmark.json").read_text(encoding="utf-8"))["groups"]["background_change"]) == 2
    for number in range(12):
        save(edits / f"k{number}.png", np.clip(noise(number).astype(int) + number, 0, 255).astype(np.uint8))
    run("--benchmark", "gedit", "--data", data, "--results", edits, "--metrics", "error", "--out", out)
    table = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert list(table) == [*gedit.GROUPS, "mean of groups", "mean of groups (intersection)", "all"]
    of_group = [table[group]["error_source"]["mean"] for group in gedit.GROUPS]
    assert table["mean of groups"]["error_source"] == {"n": 11, "mean": pytest.approx(np.mean(of_group)), "sem": None}
    assert table["all"]["error_source"]["mean"] != pytest.approx(np.mean(of_group)), "one group has two tasks"
    scored = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    shared = [line["scores"]["error_source"] for line in scored if int(line["id"][1:]) % 2 == 0]
    wanted = {"n": 6, "mean": pytest.approx(np.mean(shared)), "sem": None}
    assert table["mean of groups (intersection)"]["error_source"] == wanted and len(shared) == 6, "one task a group"
    assert "| mean of groups | 11 |" in (out / "summary.md").read_text(encoding="utf-8")


def test_gedit_from_its_tuples_over_edits_and_a_judge_to_its_table(tmp_path: Path):
    words = ("--benchmark", "gedit", "--data", write_gedit(tmp_path / "gedit"), "--out", tmp_path / "out")
    run(*words)
    edits = edit_tuples(tmp_path / "out" / "tuples.jsonl", tmp_path / "edits")
    numbers: Numbers = [([4, 9], [9, 9]), ([6, 6], None), *[([1, 1], [4, 4])] * 10]
    judged = write_answers(tmp_path / "judged.jsonl", edits, numbers)
    run(*words, "--edits", edits, "--metrics", "viescore", "--judged", judged)
    table = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert table["background_change"]["vie_overall"] == {"n": 1, "mean": 6, "sem": None}, "of two, one could not be read"
    assert table["background_change"]["vie_semantic"]["mean"] == 5 and table["background_change"]["vie_unread"]["mean"] == 0.5
    assert table["mean of groups"]["vie_overall"]["mean"] == pytest.approx((6 + 10 * 2) / 11)
    assert table["mean of groups"]["vie_root_of_means"]["mean"] == pytest.approx((15 / 11 * (9 + 40) / 11) ** 0.5)


def test_means_of_groups_are_of_groups_and_of_their_parts():
    rows = [Row(id=name, scores={"x": value}) for name, value in {"a": 1.0, "b": 3.0, "c": 10.0, "d": None}.items()]
    groups = {"one": {"a", "b"}, "two": {"c"}, "three": {"d"}}
    table = by_group(rows, groups, {"m": list(groups.values()), "part": [{"b"}, {"c"}]})
    assert table["m"]["x"].mean == (2 + 10) / 2 and table["m"]["x"].n == 2 and table["part"]["x"].mean == 6.5
    assert table["all"]["x"].mean == pytest.approx(14 / 3)


def test_every_task_needs_its_edit_and_every_edit_its_task(tmp_path: Path):
    data, edits = write_gedit(tmp_path / "gedit", 3), tmp_path / "edits"
    words = ("--benchmark", "gedit", "--data", data, "--out", tmp_path / "out")
    for number in range(2):
        save(edits / f"k{number}.png", noise(number))
    assert "1 tuple(s) of" in refused(*words, "--results", edits)
    benchmark = benchmarks.read("gedit", data)
    items = benchmark.items(_items(benchmark))
    assert [item.id for item in items] == [task.id for task in benchmark.tasks] and items[0].src_caption is None
    edited = read_tuples_file(benchmark.write(tmp_path / "out"))
    assert [item.instruction for item in items] == [one.instruction for one in edited], "what is judged is what was edited by"
    with pytest.raises(ValueError, match="k1: no edit of this task"):
        benchmark.items([one for one in _items(benchmark) if one.id != "k1"])
    with pytest.raises(ValueError, match="stranger: an edit of no task"):
        benchmark.items([*_items(benchmark), _items(benchmark, "stranger")[0]])


def _items(benchmark: Any, name: str | None = None) -> list[Any]:
    from byg_plugin.evaluation.items import Item

    return [Item(id=name or task.id, source=task.source, edit=task.source, src_caption="filled in") for task in benchmark.tasks]


def test_captions_of_a_file_are_the_tasks_and_without_them_clip_refuses(tmp_path: Path):
    data, edits, captions = write_gedit(tmp_path / "gedit", 2), tmp_path / "edits", tmp_path / "captions.jsonl"
    for number in range(2):
        save(edits / f"k{number}.png", noise(number))
    words = ("--benchmark", "gedit", "--data", data, "--results", edits, "--out", tmp_path / "out")
    assert "k0: clip needs src_caption and tgt_caption" in refused(*words, "--metrics", "clip")
    alone = ("--tuples", tmp_path / "out" / "tuples.jsonl", "--results", edits, "--out", tmp_path / "alone")
    assert "k0: clip needs src_caption and tgt_caption" in refused(*alone, "--metrics", "clip"), "what fills the tuples is no caption"
    job = Job(source=edits, instruction="x", name="00000_k0", item=read_tuples_file(tmp_path / "out" / "tuples.jsonl")[0])
    assert job.words(("instruction",)) == "x"
    with pytest.raises(ValueError, match="00000_k0: its tuple has no tgt_caption, which this method reads"):
        job.words(("tgt_caption",))
    captions.write_text(json.dumps({"id": "k1", "src_caption": "a cat", "tgt_caption": "a dog"}) + "\n", encoding="utf-8")
    run(*words, "--metrics", "error", "--captions", captions)
    assert [one.tgt_caption for one in read_tuples_file(tmp_path / "out" / "tuples.jsonl")][1] == "a dog"
    captions.write_text('{"id": "nobody", "src_caption": "a", "tgt_caption": "b"}\n', encoding="utf-8")
    assert "none of its ids is a task's, such as k0" in refused(*words, "--captions", captions)
    captions.write_text('{"id": "k1", "src_caption": "a"}\n', encoding="utf-8")
    assert "line 1 needs the texts id, src_caption and tgt_caption" in refused(*words, "--captions", captions)


def test_imgedit_has_nine_groups(tmp_path: Path):
    benchmark = benchmarks.read("imgedit", write_imgedit(tmp_path))
    assert list(benchmark.groups()) == list(imgedit.GROUPS) and len(benchmark.tasks) == 10
    assert len(benchmark.groups()["style"]) == 2 and benchmark.published == 737
    table = by_group([Row(id=task.id, scores={"x": float(task.group == "style")}) for task in benchmark.tasks], {}, benchmark.means)
    assert table["mean of groups"]["x"].mean == pytest.approx(1 / 9) and table["all"]["x"].mean == pytest.approx(0.2)


def test_longtail_goes_both_ways_in_six_styles_and_its_tuples_are_whole(tmp_path: Path):
    benchmark = benchmarks.read("longtail", write_longtail(tmp_path / "data"))
    groups = benchmark.groups()
    assert len(benchmark.tasks) == 2 * 6 + 6 and len(groups["photo to style"]) == 12 and len(groups["style to photo"]) == 6
    assert len(groups) == 6 + 6 + 2
    task = next(task for task in benchmark.tasks if task.id == "lego_from_p1")
    assert task.instruction == "Turn this photo into Lego style" and task.tgt_caption == "a dog on a beach, an image in Lego style"
    assert task.src_caption == "a dog on a beach, a photorealistic photo"
    back = next(task for task in benchmark.tasks if task.id == "photo_from_gta_v_00")
    assert back.tgt_caption == "a photorealistic photo" and back.src_caption == "an image in GTA V style"
    read = read_tuples_file(benchmark.write(tmp_path / "out"), rules="error")
    assert all(getattr(one, role) == getattr(task, role) for one, task in zip(read, benchmark.tasks, strict=True) for role in ROLES)


def test_the_recipe_of_stylised_sources_has_thirty_scenes_a_style():
    lines = list(longtail.recipe())
    assert len(lines) == 180 and len({line["file"] for line in lines}) == 180 and len({line["prompt"] for line in lines}) == 180
    assert {line["style"] for line in lines} == longtail.STYLES.keys() and len(set(longtail.SCENES)) == 30
    assert "prints 180 prompts, 30 scenes in each style" in PAGE


def test_video_pairs_the_styles_as_the_paper_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    counts = {"real/cartoon": 25, "real/photo-realistic": 25, "real/3D-CGI": 10, "generated/cartoon": 24, "generated/photo-realistic": 25}
    for name, count in counts.items():
        (tmp_path / name).mkdir(parents=True)
        for number in range(count):
            (tmp_path / name / f"c{number}.mp4").write_bytes(b"x")
    monkeypatch.setattr(video, "_problems", lambda path: [])
    benchmark = benchmarks.read("video", tmp_path)
    assert {name: len(ids) for name, ids in benchmark.groups().items()} == {
        **{"cartoon to photo-realistic": 49, "photo-realistic to cartoon": 50, "3D-CGI to cartoon": 10, "3D-CGI to photo-realistic": 10},
        **{"3D-CGI to either": 20, "real clips": 70, "generated clips": 49},
    }
    assert len(benchmark.tasks) == benchmark.published == 119
    assert benchmark.tasks[0].tgt_caption == "A video. The video is in photo-realistic style."


def test_clips_of_another_size_or_length_are_named_with_the_line_that_mends_them(tmp_path: Path):
    write_clips(tmp_path, {"real/cartoon": 1})
    save(tmp_path / "real" / "cartoon" / "short.mp4", np.zeros((9, 480, 640, 3), dtype=np.uint8))
    said = refused("--benchmark", "video", "--data", tmp_path, "--out", tmp_path / "out")
    assert "1 problem(s)" in said and "short.mp4: 640 x 480 pixels and 9 frames, not 832 x 480 and 81" in said
    assert "-vf scale=832:480:force_original_aspect_ratio=increase,crop=832:480 -frames:v 81" in said
    (tmp_path / "real" / "cartoon" / "short.mp4").unlink()
    run("--benchmark", "video", "--data", tmp_path, "--out", tmp_path / "out")
    assert len(read_tuples_file(tmp_path / "out" / "tuples.jsonl", rules="error")) == 1


@pytest.mark.parametrize("name", benchmarks.NAMES)
def test_missing_data_are_told_with_where_they_are_published(tmp_path: Path, name: str):
    for words in ((), ("--data", tmp_path / "none"), ("--data", tmp_path)):
        said = refused("--benchmark", name, *words, "--out", tmp_path / "out")
        assert "https://huggingface.co/datasets/" in said and "Expected: DIR/" in said, said
    assert not (tmp_path / "out").exists()


def test_other_bad_input(tmp_path: Path):
    data, words = write_gedit(tmp_path / "gedit", 2), ("--benchmark", "gedit", "--data", tmp_path / "gedit", "--out", tmp_path / "out")
    assert "give --benchmark" in refused("--data", data)
    own = "--benchmark has its own sources and tuples, and no references: leave --sources, --references out"
    assert own in refused(*words, "--sources", tmp_path, "--references", tmp_path, "--results", tmp_path)
    unread = "writes tuples and scores nothing: leave --masks, --metrics, --compare, --judged out"
    idle = ("--compare", "nowhere", "--judged", "nofile", "--metrics", "viescore", "--masks", tmp_path)
    assert unread in refused(*words, *idle) and not (tmp_path / "out").exists()
    (data / "images" / "k1.png").unlink()
    assert "k1: no such file" in refused(*words)
    lines = (data / "gedit.jsonl").read_text(encoding="utf-8")
    (data / "gedit.jsonl").write_text(lines + lines, encoding="utf-8")
    assert "k0: two tasks have this id" in refused(*words)
    (data / "gedit.jsonl").write_text(lines.replace("color_alter", "haircut"), encoding="utf-8")
    assert "line 2: task_type = 'haircut' is missing or wrong" in refused(*words)
    (data / "gedit.jsonl").write_text("", encoding="utf-8")
    assert "no task in its data" in refused(*words)


def test_tuples_that_are_no_benchmarks_are_not_overwritten(tmp_path: Path):
    data = write_imgedit(tmp_path / "data")
    words = ("--benchmark", "imgedit", "--data", data, "--out", data)
    (data / "tuples.jsonl").write_text("of training\n", encoding="utf-8")
    assert "its tuples.jsonl, with no benchmark.json beside it, is not ours to overwrite; choose another folder" in refused(*words)
    assert (data / "tuples.jsonl").read_text(encoding="utf-8") == "of training\n" and not (data / "benchmark.json").exists()
    (data / "tuples.jsonl").unlink()
    for _ in range(2):
        run(*words)
    assert len(read_tuples_file(data / "tuples.jsonl")) == 10, "its own are written anew"


def test_the_pages_export_of_gedit_is_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from PIL import Image

    rows = [
        {"key": "k", "task_type": "ps_human", "instruction": "smile", "instruction_language": language, "Intersection_exist": True}
        | {"input_image": Image.new("RGBA", (8, 8)), "input_image_raw": Image.new("RGB", (9, 9))}
        for language in ("en", "cn")
    ]
    asked: list[Any] = []
    fake = types.SimpleNamespace(load_dataset=lambda *words, **more: asked.append((words, more)) or rows)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    monkeypatch.chdir(tmp_path)
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", PAGE, re.S) if "GEdit-Bench" in text]
    exec(block, {})
    assert asked == [(("stepfun-ai/GEdit-Bench",), {"split": "train"})]
    assert [task.id for task in benchmarks.read("gedit", tmp_path / "gedit").tasks] == ["k"]
