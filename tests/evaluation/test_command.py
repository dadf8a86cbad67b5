"""The command: tables, plots and the page; what is scored stays scored; bad input is told before anything is scored."""

from __future__ import annotations

import json
import multiprocessing
import random
import re
import shutil
import time
import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from byg_plugin import evaluate
from byg_plugin.evaluation import frames, scores
from byg_plugin.evaluation.metrics import METRICS, READ_BY
from tests.support.evaluation import noise, save, tiny_clip, tiny_dino, write_edits, write_tuples_of


def run(*words: Any) -> None:
    evaluate.main([str(word) for word in words])


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]


def refused(*words: Any) -> str:
    with pytest.raises(ValueError) as caught:
        run(*words)
    return str(caught.value)


def test_a_manifest_becomes_tables_a_plot_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    edits, out = write_edits(tmp_path, 3, level=51), tmp_path / "out"
    run("--edits", edits, "--metrics", "error", "flicker", "--out", out)
    said = capsys.readouterr().out
    rows = {(line["id"], line["metric"]): line["scores"] for line in lines(out)}
    assert set(rows) == {(f"t{number}", metric) for number in range(3) for metric in ("error", "flicker")}
    assert [rows[f"t{number}", "error"]["error_source"] for number in range(3)] == pytest.approx([51 / 255, 52 / 255, 53 / 255])
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert list(summary) == ["add", "remove", "all"] and set(summary["all"]) == {"error_source"}
    assert summary["all"]["error_source"] == pytest.approx({"n": 3, "mean": 52 / 255, "sem": 1 / 255 / 3**0.5})
    assert summary["remove"]["error_source"]["sem"] is None
    assert "| all | 3 | 0.2039 +- 0.0023 |" in said and said.startswith((out / "summary.md").read_text(encoding="utf-8"))
    assert Image.open(out / "scores.png").size[0] > 500
    page = (out / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<td class="words">(t\d)</td>', page) == ["t2", "t1", "t0"], "the worst first"
    assert page.count("data:image/jpeg;base64,") == 3 and "http" not in page.replace("http-equiv", "")


def test_what_is_scored_stays_scored_until_its_files_texts_or_settings_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    edits, out = write_edits(tmp_path, 2), tmp_path / "out"
    command = ("--edits", edits, "--metrics", "error", "--out", out)
    run(*command)
    run(*command)
    assert "2 edits, 0 of them scored now" in capsys.readouterr().out and len(lines(out)) == 2
    run(*command[:3], "error", "psnr", *command[4:])
    assert len(lines(out)) == 4
    save(edits / "00001_s1.png", noise(7))
    run(*command)
    assert [line["id"] for line in lines(out)[4:]] == ["t1"] and lines(out)[-1]["scores"] != lines(out)[1]["scores"]
    assert scores.read(out)[1].scores["error_source"] == lines(out)[-1]["scores"]["error_source"], "the later counts"
    manifest = (edits / "edits.jsonl").read_text(encoding="utf-8").replace("instruction 0", "something else")
    (edits / "edits.jsonl").write_text(manifest, encoding="utf-8")
    run(*command)
    assert len(lines(out)) == 6


@pytest.mark.parametrize("metric", ["clip", "dino"])
def test_a_model_is_known_by_its_files_not_by_its_name(tmp_path: Path, metric: str):
    edits, out = write_edits(tmp_path, 1, level=90), tmp_path / "out"
    made = tiny_clip(tmp_path / "one") if metric == "clip" else tiny_dino(tmp_path / "one")
    moved = shutil.copytree(made, tmp_path / "other")
    for folder in (made, moved):
        run("--edits", edits, "--metrics", metric, f"--{metric}", folder, "--out", out)
    assert len(lines(out)) == 1
    tensors = load_file(made / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    changed = {name: one + torch.randn(one.shape, generator=generator) if one.is_floating_point() else one for name, one in tensors.items()}
    save_file(changed, made / "model.safetensors", {"format": "pt"})
    run("--edits", edits, "--metrics", metric, f"--{metric}", made, "--out", out)
    first, second = (line["scores"] for line in lines(out))
    assert first != second


def test_clips_with_clip_and_dino_by_one_command(tmp_path: Path):
    edits, out = write_edits(tmp_path, 2, suffix=".mkv", level=9), tmp_path / "out"
    models = ("--clip", tiny_clip(tmp_path / "clip"), "--dino", tiny_dino(tmp_path / "dino"))
    run("--edits", edits, "--metrics", "clip", "dino", "flicker", "error", *models, "--out", out)
    row = scores.read(out)[0].scores
    assert row["error_source"] == pytest.approx(9 / 255) and 0 < row["flicker"] < 1 and -1 <= row["clip_directional"] <= 1
    assert (out / "report.html").read_text(encoding="utf-8").count("data:image/jpeg") == 6, "three frames a clip"


def test_targets_of_tuples_and_masks_are_used(tmp_path: Path):
    edits, out = write_edits(tmp_path, 2, level=51), tmp_path / "out"
    save(tmp_path / "truth.png", noise(0) // 2 + np.uint8(51))
    tuples = write_tuples_of(tmp_path, 1, target="truth.png")
    mask = np.full((1, 16, 20, 3), 255, dtype=np.uint8)  # of another size; everything may change
    save(tmp_path / "masks" / "t1.png", mask)
    run("--edits", edits, "--tuples", tuples, "--masks", tmp_path / "masks", "--metrics", "error", "--out", out)
    first, second = (line["scores"] for line in lines(out))
    assert first["error_truth"] == 0 and second["error_truth"] is None
    assert first["error_outside"] is None and second["error_outside"] is None
    save(tmp_path / "masks" / "t1.png", mask * 0)
    run("--edits", edits, "--masks", tmp_path / "masks", "--metrics", "error", "--out", out)
    assert lines(out)[-1]["scores"]["error_outside"] == pytest.approx(52 / 255)


def test_tuples_that_give_no_edit_a_ground_truth_are_refused(tmp_path: Path):
    words = ("--edits", write_edits(tmp_path, 2), "--out", tmp_path / "out", "--tuples")
    save(tmp_path / "truth.png", noise(0))
    assert "no tuple in it has a target, and beside --edits it is read for these alone" in refused(*words, write_tuples_of(tmp_path, 2))
    others = write_tuples_of(tmp_path, 2, target="truth.png")
    others.write_text(others.read_text(encoding="utf-8").replace('"id": "t', '"id": "other'), encoding="utf-8")
    said = refused(*words, others)
    assert "none of its targets is of one of these edits (their ids are such as other0, the edits' such as t0): give the tuples" in said
    assert not (tmp_path / "out").exists()


def test_results_by_the_tuples_ids_and_two_folders_by_stem(tmp_path: Path):
    write_edits(tmp_path, 2)
    tuples, results = write_tuples_of(tmp_path, 2), tmp_path / "results"
    save(results / "t0.png", noise(0))
    assert "1 tuple(s) of" in refused("--tuples", tuples, "--results", results, "--out", tmp_path / "o") and not (tmp_path / "o").exists()
    save(results / "00001_s1.png", noise(1))
    run("--tuples", tuples, "--results", results, "--out", tmp_path / "out")
    assert [row.id for row in scores.read(tmp_path / "out")] == ["t0", "t1"]
    stems = tmp_path / "stems"
    save(stems / "s1.png", noise(1))
    run("--sources", tmp_path / "sources", "--results", stems, "--out", tmp_path / "two")
    (row,) = scores.read(tmp_path / "two")
    assert row.id == "s1" and row.edit_type is None
    said = refused("--sources", tmp_path / "sources", "--results", stems, "--metrics", "clip", "--out", tmp_path / "two")
    assert "s1: clip needs src_caption and tgt_caption; give tuples, or leave clip out" in said


def test_two_runs_are_compared_on_the_same_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    better, worse = write_edits(tmp_path, 3, level=10), write_edits(tmp_path, 3, level=61)
    run("--edits", worse, "--out", tmp_path / "worse")
    run("--edits", better, "--out", tmp_path / "better", "--compare", tmp_path / "worse")
    found = json.loads((tmp_path / "better" / "comparison.json").read_text(encoding="utf-8"))["worse"]["error_source"]
    assert found == pytest.approx({"n": 3, "mean": -0.2, "low": -0.2, "high": -0.2})
    assert "| error_source | 3 | -0.2 | -0.2 to -0.2 |" in capsys.readouterr().out
    assert (tmp_path / "better" / "comparison.png").is_file()
    assert "no such file; byg_plugin/evaluate.py --out" in refused("--edits", better, "--compare", tmp_path / "nothing")


def test_several_methods_stand_in_one_table_over_the_same_items(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for level, name, count in ((51, "lora", 3), (102, "base", 2), (0, "copy", 3)):
        run("--edits", write_edits(tmp_path, count, level=level), "--metrics", "error", "--out", tmp_path / name)
    capsys.readouterr()
    others = (tmp_path / "base", tmp_path / "copy")
    run("--edits", tmp_path / "edits51", "--metrics", "error", "--out", tmp_path / "lora", "--compare", *others)
    said = capsys.readouterr().out
    table = said[said.index("| run, same items | n | error_source |") :].splitlines()[2:5]
    assert [row.split(" | ")[:2] for row in table] == [["| lora", "2"], ["| base", "2"], ["| copy", "2"]], "what all have scored"
    assert [float(row.split(" | ")[2].split(" ")[0]) for row in table] == pytest.approx([51.5 / 255, 102.5 / 255, 0.5 / 255], rel=1e-3)
    found = json.loads((tmp_path / "lora" / "comparison.json").read_text(encoding="utf-8"))
    assert {name: round(each["error_source"]["mean"], 6) for name, each in found.items()} == {"base": -0.2, "copy": 0.2}
    assert "| this run - base |" in said and "| this run - copy |" in said and (tmp_path / "lora" / "comparison.png").is_file()
    twice = refused(
        "--edits", tmp_path / "edits51", "--out", tmp_path / "lora", "--compare", tmp_path / "base", tmp_path / "other" / "base"
    )
    assert "--compare: base is the name of two runs' folders" in twice


@pytest.mark.parametrize("words", [(), ("--edits", "a", "--sources", "b"), ("--results", "a"), ("--tuples", "a")])
def test_too_little_and_too_much_is_refused(words: tuple[str, ...]):
    assert refused(*words) == "give --edits DIR, or --tuples FILE --results DIR, or --sources DIR --results DIR"


def test_files_that_are_gone_are_named_before_anything_is_scored(tmp_path: Path):
    edits, out = write_edits(tmp_path, 3), tmp_path / "out"
    (edits / "00001_s1.png").unlink()
    (tmp_path / "sources" / "s2.png").unlink()
    said = refused("--edits", edits, "--out", out)
    assert "files: 2 problem(s), nothing was scored" in said and not out.exists()
    assert "t1: edit: no such file" in said and "t2: source: no such file" in said


def test_shapes_that_differ_are_refused_but_what_edit_py_cropped_is_cropped(tmp_path: Path):
    source = save(tmp_path / "sources" / "a.png", noise(1, 64, 40))
    save(tmp_path / "results" / "a.png", noise(1, 32, 40))
    said = refused("--sources", tmp_path / "sources", "--results", tmp_path / "results", "--out", tmp_path / "out")
    assert "a: the source a.png has 40 x 64 pixels and the edit 40 x 32: other shapes; crop one as the other" in said
    edits = write_edits(tmp_path / "other", 1)
    save(tmp_path / "other" / "sources" / "s0.png", noise(1, 64, 40))
    run("--edits", edits, "--metrics", "error", "--out", tmp_path / "out")
    wanted = np.abs(noise(1, 64, 40)[0, 16:48] / 255 - noise(0)[0] // 2 / 255).mean()
    assert lines(tmp_path / "out")[0]["scores"]["error_source"] == pytest.approx(wanted)
    assert source.is_file()


def test_masks_are_cropped_as_their_sources_and_other_shapes_are_refused(tmp_path: Path):
    tall, mask = noise(1, 64, 40), np.zeros((1, 64, 40, 3), dtype=np.uint8)
    mask[:, 28:36] = 255  # rows 12 to 20 of the edit, which shows the source's rows 16 to 48
    edit = tall[:, 16:48].copy()
    edit[:, 12:20] = 0
    save(tmp_path / "masks" / "s0.png", mask)
    edits = write_edits(tmp_path, 1)
    save(tmp_path / "masks" / "t0.png", mask)
    save(tmp_path / "sources" / "s0.png", tall)
    save(edits / "00000_s0.png", edit)
    run("--edits", edits, "--masks", tmp_path / "masks", "--metrics", "error", "--out", tmp_path / "out")
    first = lines(tmp_path / "out")[0]["scores"]
    assert first["error_outside"] == 0 and first["error_source"] > 0
    save(tmp_path / "sources" / "s0.png", tall[:, 16:48])
    save(tmp_path / "results" / "s0.png", edit)
    words = ("--sources", tmp_path / "sources", "--results", tmp_path / "results", "--masks", tmp_path / "masks")
    assert "s0: the mask s0.png has 40 x 64 pixels and the edit 40 x 32: other shapes" in refused(*words, "--out", tmp_path / "o")


@pytest.mark.parametrize(
    ("made", "rate", "says"),
    [
        ((5, 8.0), 8.0, "the source a.mkv has 3 frames and the edit 5; cut the edit"),
        ((3, 16.0), 8.0, "the source a.mkv has 8 frames a second and the edit 16; give both one rate"),
        ((2, 8.0), 8.0, ""),
    ],
)
def test_clips_of_other_lengths_and_rates(tmp_path: Path, made: tuple[int, float], rate: float, says: str):
    save(tmp_path / "sources" / "a.mkv", noise(1, frames=3), rate)
    save(tmp_path / "results" / "a.mkv", noise(1, frames=made[0]), made[1])
    words = ("--sources", tmp_path / "sources", "--results", tmp_path / "results", "--out", tmp_path / "out")
    if says:
        assert says in refused(*words)
    else:
        run(*words)
        assert lines(tmp_path / "out")[0]["scores"]["error_source"] < 0.4


def test_a_clip_of_an_image_and_a_file_that_is_none_are_named(tmp_path: Path):
    save(tmp_path / "sources" / "a.png", noise(1))
    save(tmp_path / "results" / "a.mkv", noise(1, frames=2))
    save(tmp_path / "sources" / "b.png", noise(1))
    (tmp_path / "results" / "b.png").write_bytes(b"")
    said = refused("--sources", tmp_path / "sources", "--results", tmp_path / "results", "--out", tmp_path / "out")
    assert "a: the source a.png is an image and the edit a.mkv a clip" in said and "b.png: an empty file" in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--sort-by", "beauty"), "--sort-by beauty: not a column of these metrics, which are error_source"),
        (("--metrics", "flicker"), "no metric is defined for any of these edits"),
        (("--masks", "{edits}"), ""),
        (("--references", "{empty}"), "no image or clip in it"),
        (("--metrics", "dino", "--dino", "nobody/has-this"), "fetch it with: hf download nobody/has-this"),
    ],
)
def test_other_bad_input(tmp_path: Path, words: tuple[str, ...], says: str):
    edits = write_edits(tmp_path, 1)
    (tmp_path / "empty").mkdir()
    words = tuple(word.format(edits=edits, empty=tmp_path / "empty") for word in words)
    if says:
        assert says in refused("--edits", edits, "--out", tmp_path / "out", *words)
        assert not (tmp_path / "out" / "summary.json").exists()
    else:
        run("--edits", edits, "--out", tmp_path / "out", *words)


def test_cuda_where_there_is_none_is_told_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused("--edits", tmp_path / "nothing", "--metrics", "clip", "--device", "cuda")
    assert said == "--device cuda: torch finds no CUDA device; give --device cpu"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--clip", "none"), "--clip is read by --metrics clip, aesthetic alone: add one, or leave it out"),
        (("--metrics", "dino", "--aesthetic", "none"), "--aesthetic is read by --metrics aesthetic alone"),
        (("--metrics", "imgedit", "--vie-reading", "paper"), "--vie-reading is read by --metrics viescore alone"),
        (("--judged", "none"), "--judged is read by --metrics viescore, imgedit alone"),
        (("--device", "cpu"), "--device is read by --metrics clip, dino, lpips, dynamic, aesthetic, motion alone"),
        (("--metrics", "clip", "--masks", "none"), "--masks is read by --metrics error, psnr, ssim, lpips alone"),
    ],
)
def test_options_that_no_metric_reads_are_refused(words: tuple[str, ...], says: str):
    assert says in refused("--edits", "nothing", *words)


def test_the_options_of_metrics_are_those_that_they_read():
    """In each metric's file; of frames that are compared the masks are the shared class's."""
    for name in METRICS:
        text = Path(str(import_module(f"byg_plugin.evaluation.metrics.{name}").__file__)).read_text(encoding="utf-8")
        read = {*re.findall(r"options\.(\w+)", text)} | ({"masks"} if "Compared" in text else set())
        read |= {"judged"} if "JudgedMetric" in text else set()
        assert {option for option, metrics in READ_BY.items() if name in metrics} == read, name


def test_an_empty_manifest_and_a_damaged_file_of_scores_are_named(tmp_path: Path):
    edits, out = write_edits(tmp_path, 1), tmp_path / "out"
    run("--edits", edits, "--out", out)
    with (out / "scores.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": 3}\n')
    assert "line 4 has not the scores of an item; remove it" in refused("--edits", edits, "--out", out)
    (edits / "edits.jsonl").write_text("", encoding="utf-8")
    assert "no edits in it" in refused("--edits", edits, "--out", out)


def test_captions_are_words_on_the_page_not_markup(tmp_path: Path):
    edits = write_edits(tmp_path, 1, instruction="<script>alert(1)</script>", edit_type="<b>")
    run("--edits", edits, "--out", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page and "<b>" not in page


def test_of_pictures_one_item_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    alive: list[weakref.ref[Any]] = []
    most, original = 0, frames.look

    def counted(item: Any) -> Any:
        nonlocal most
        found = original(item)
        alive.append(weakref.ref(found.edit))
        most = max(most, sum(one() is not None for one in alive))
        return found

    monkeypatch.setattr(frames, "look", counted)
    run("--edits", write_edits(tmp_path, 6), "--out", tmp_path / "out")
    assert len(alive) == 6 and most <= 2


def test_killed_at_ten_moments_it_goes_on_and_loses_what_was_in_flight_alone(tmp_path: Path):
    edits, out = write_edits(tmp_path, 40), tmp_path / "out"
    words = ("--edits", edits, "--metrics", "error", "--out", out)
    before, draw = 0, random.Random(0)
    for kill in range(10):
        process = multiprocessing.get_context("fork").Process(target=run, args=words)
        process.start()
        while count_whole(out) < 4 * kill + 1 and process.is_alive():
            time.sleep(0.001)
        time.sleep(draw.random() * 0.01)
        process.kill()  # SIGKILL
        process.join()
        assert before <= count_whole(out) <= 40
        before = count_whole(out)
    run(*words)
    assert [line["id"] for line in lines(out)] == [f"t{number}" for number in range(40)], "each once: nothing was lost or done twice"


def count_whole(out: Path) -> int:
    path = out / "scores.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0
