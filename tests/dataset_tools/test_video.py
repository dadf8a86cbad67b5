"""Appendix D.2: sampling, cleaning and wrapping captions, rendering with a tiny Wan pipeline, tuples of clips, what is held out."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byg_plugin.data import clips
from byg_plugin.data.dataset import split_tuples
from byg_plugin.data.rules import ROLES, check_texts
from byg_plugin.data.tuples import read_tuples_file
from dataset_tools import hold_out as hold_out_command
from dataset_tools import prepare_captions, render_videos
from dataset_tools.pool import Results
from dataset_tools.prepare_captions import sampled_frames, table_inputs
from dataset_tools.settings import CaptionsSettings, RenderSettings
from dataset_tools.video import STYLES, hold_out, other_style, plain_style, style_hint, video_tuple, wrap
from tests.support.processes import patience_of
from tests.support.tiny_wan import tiny_wan, write_pipeline
from tests.support.tools_helpers import ENVIRONMENT, KEY, ROOT, full_disk, records, run, stub


def table(path: Path, count: int) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ID", "Brief Caption", "Detailed Caption"])
        writer.writerows([[f"v{k}", "x", f'An animated dog, number {k}, "runs"'] for k in range(count)])
    return path


def clip(path: Path, frames: int = 9, color: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(np.full((32, 48, 3), min(255, 20 * k + color), dtype=np.uint8)) for k in range(frames)]
    clips.write_clip(path, images, 8.0)
    return path


# --- words ---


def test_template_and_hints() -> None:
    assert wrap("A dog runs.", "cartoon") == "A dog runs. The video is in cartoon style."
    assert style_hint("a cartoon dog") == "cartoon" and style_hint("a 3D render of a dog") and style_hint("cinematic shot")
    assert style_hint("a dog carries a carton of milk along the river and draws a crowd") is None
    said = ("Photorealistic", "photo-realistic", "live action", "a cartoon", "Anime", "3D-CGI", "claymation style")
    assert [plain_style(text) for text in said] == ["photo-realistic"] * 3 + ["cartoon"] * 2 + ["3d-cgi", "claymation"]


def test_captions_of_a_tuple_share_one_text_with_the_styles_swapped() -> None:
    for style in (*STYLES, "3d-cgi"):
        made = [video_tuple(f"{k}.mp4", f"c{k}", "A dog runs on a beach", style, {}) for k in range(40)]
        for record in made:
            target = record["meta"]["target_style"]
            assert target in STYLES and target != style
            assert record["src_caption"].replace(style, target) == record["tgt_caption"] != record["src_caption"]
            assert target in record["instruction"] and style in record["reverse_instruction"]
            assert not list(check_texts({role: record[role] for role in ROLES}, source_style=style))
        assert "Turn the video to photo-realistic style" in {r["instruction"] for r in made} or style == "photo-realistic"
    assert {other_style("3d-cgi", f"c{k}") for k in range(40)} == set(STYLES)


# --- tables to prompts ---


def test_rows_are_drawn_at_random_and_the_same_at_each_run(tmp_path: Path) -> None:
    def drawn(seed: int) -> list[str]:
        settings = CaptionsSettings(table=str(table(tmp_path / "t.csv", 400)), out="x", count=100, seed=seed)
        return [row.name for row in table_inputs(settings)]

    first = drawn(0)
    assert len(set(first)) == 100 and first == drawn(0) != drawn(1)
    rows = [int(name[1:]) for name in first]
    # A quarter of the rows in each quarter of the table: 25 of 100 with a deviation of 4.
    assert all(7 < sum(100 * q <= row < 100 * (q + 1) for row in rows) < 43 for q in range(4))


def test_captions_are_cleaned_repaired_or_rejected_and_wrapped(tmp_path: Path) -> None:
    out = tmp_path / "prompts.jsonl"
    with stub(tmp_path / "s", "good") as server:
        arguments = ("--table", table(tmp_path / "t.csv", 60), "--out", out, "--count", 0, "--base-url", server.url)
        done = run("prepare_captions", *arguments, "--limit", 25)
        assert done.returncode == 0 and "25 done in this run" in done.stdout, done.stderr
        done = run("prepare_captions", *arguments)
        assert done.returncode == 0 and "35 done in this run" in done.stdout, done.stderr
        asked = server.requests
    assert all(entry["images"] == 0 for entry in asked) and "Keep\nevery" not in asked[0]["text"]
    assert {entry["options"]["model"] for entry in asked} == {"Qwen/Qwen3-VL-30B-A3B-Instruct"}
    rejects = records(tmp_path / "prompts.rejects.jsonl")
    assert sorted(record["id"] for record in rejects) == sorted(f"v{k}" for k in range(0, 60, 7))
    assert {record["reason"] for record in rejects} == {"style_hint"} and all(len(r["answers"]) == 2 for r in rejects)
    prompts = {record["id"]: record for record in records(out)}
    assert set(prompts) == {f"v{k}" for k in range(60) if k % 7}
    for name, record in prompts.items():
        number = int(name[1:])
        assert record["prompt"] == f"A dog number {number} runs on a beach. The video is in {record['style']} style."
        assert record["meta"].get("repaired", False) == (number % 5 == 0)
        assert "animated" in record["source_caption"]
    assert min(Counter(record["style"] for record in prompts.values()).values()) >= 12 and {r["style"] for r in prompts.values()} == set(
        STYLES
    )


def test_no_key_and_no_prompt_in_prompts_rejects_or_logs(tmp_path: Path) -> None:
    with stub(tmp_path / "s", "echo") as server:
        done = run(
            "prepare_captions",
            "--table",
            table(tmp_path / "t.csv", 12),
            "--out",
            tmp_path / "p.jsonl",
            "--count",
            0,
            "--base-url",
            server.url,
        )
    reasons = Counter(record["reason"] for record in records(tmp_path / "p.rejects.jsonl"))
    assert len(records(tmp_path / "p.jsonl")) == 3 and reasons == {"server": 3, "no_object": 3, "repeats_prompt": 3}, done.stderr
    said = done.stdout + done.stderr + "".join(path.read_text() for path in tmp_path.glob("p*"))
    assert KEY not in said and "Rewrite this caption of a video" not in said and "[key]" in said and "[prompt]" in said


def test_bad_tables(tmp_path: Path) -> None:
    done = run("prepare_captions", "--table", table(tmp_path / "t.csv", 3), "--out", tmp_path / "o.jsonl", "--caption-column", "Text")
    assert done.returncode == 2 and "no column 'Text'" in done.stderr and "Detailed Caption" in done.stderr
    done = run("prepare_captions", "--out", tmp_path / "o.jsonl")
    assert done.returncode == 2 and "one of the two" in done.stderr


# --- clips that exist ---


def test_rows_with_half_a_character_end_no_run(tmp_path: Path) -> None:
    rows = ['{"ID": "\\ud800", "Detailed Caption": "dog number 1"}', '{"ID": "b", "Detailed Caption": "dog \\ud800"}']
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    with stub(tmp_path, "good") as server:
        done = run("prepare_captions", "--table", tmp_path / "t.jsonl", "--out", tmp_path / "o.jsonl", "--base-url", server.url)
    assert done.returncode == 0, done.stderr
    assert [record["id"] for record in records(tmp_path / "o.jsonl")] == [r"\ud800"]
    (reject,) = records(tmp_path / "o.rejects.jsonl")
    assert (reject["id"], reject["message"]) == ("b", r"the caption holds a broken character: 'dog \ud800'")


def test_holding_out_takes_any_name(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"source": "\\ud800"}\n{"source": "b"}\n')
    assert sum(hold_out(tmp_path / "t.jsonl", 1).marked.values()) == 1


def test_frames_are_sampled_over_the_whole_clip(tmp_path: Path) -> None:
    path = clip(tmp_path / "c.mp4", 12)
    levels = [float(np.asarray(picture.image()).mean()) for picture in sampled_frames(path, 3, 1024)]
    assert levels == sorted(levels) and len(levels) == 3
    assert levels == pytest.approx([40, 120, 200], abs=25)  # frames 2, 6 and 10 of levels 20 k
    assert len(sampled_frames(path, 40, 1024)) == 12


def test_existing_clips_become_tuples_with_some_held_out(tmp_path: Path) -> None:
    for k in range(12):
        clip(tmp_path / "clips" / f"c{k:02d}.mp4", color=k)
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"no clip")
    out = tmp_path / "tuples.jsonl"
    with stub(tmp_path / "s", "good") as server:
        given = ("--clips", tmp_path / "clips", "--out", out, "--base-url", server.url, "--in-flight", 1)
        trial = run("prepare_captions", *given, "--limit", 3, "--frames", 4)
        assert trial.returncode == 0 and "held out for validation: none; passed over" in trial.stdout, trial.stderr
        done = run(
            "prepare_captions",
            "--clips",
            tmp_path / "clips",
            "--out",
            out,
            "--base-url",
            server.url,
            "--frames",
            4,
            "--hold-out",
            2,
            "--in-flight",
            1,
        )
        assert done.returncode == 0, done.stderr
        assert {entry["images"] for entry in server.requests} == {4}
    assert [record["source"] for record in records(tmp_path / "tuples.rejects.jsonl")] == ["clips/broken.mp4"]
    tuples = read_tuples_file(out)
    assert Counter(record["meta"]["source_style"] for record in records(out)) == {"cartoon": 4, "photo-realistic": 4, "3d-cgi": 4}
    train, validation = split_tuples(tuples, 0)
    assert (len(train), len(validation)) == (6, 6)


def test_a_folder_without_clips_and_a_table_without_rows_are_errors(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "notes.txt").touch()
    (tmp_path / "t.jsonl").touch()
    for given, says in (
        (["--clips", str(tmp_path / "clips")], r"clips = .*clips: no clip in it \(\.mp4, "),
        (["--table", str(tmp_path / "t.jsonl")], r"table = .*t.jsonl: no row in it"),
    ):
        with pytest.raises(ValueError, match=says):
            prepare_captions.main([*given, "--out", str(tmp_path / "o.jsonl")])
        prepare_captions.main([*given, "--out", str(tmp_path / "o.jsonl"), "--shard", "1/4"])  # others may have all
    (tmp_path / "clips" / "a.mp4").write_bytes(b"no clip")
    with pytest.raises(ValueError, match="no clip was described: all were rejected, o.rejects.jsonl beside .*o.jsonl says why"):
        prepare_captions.main(["--clips", str(tmp_path / "clips"), "--out", str(tmp_path / "o.jsonl")])


def test_holding_out_is_by_name_and_replaces_earlier_marks(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"

    def write(count: int) -> None:
        lines = [video_tuple(f"{k}.mp4", f"c{k}", "A dog runs on a beach", STYLES[k % 2], {}) for k in range(count)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def marked() -> set[str]:
        return {record["source"] for record in records(path) if record.get("split") == "validation"}

    write(20)
    path.write_text(path.read_text().rstrip("\n"))  # as editors leave it: the last line is one all the same
    assert hold_out(path, 4).marked == {"cartoon": 4, "photo-realistic": 4}
    first = marked()
    assert len(records(path)) == 20
    hold_out(path, 2)
    assert len(marked()) == 4 and marked() < first
    with pytest.raises(ValueError, match="10 sources of each style are to be held out, there are 10 cartoon, 10 photo-realistic"):
        hold_out(path, 10)
    assert len(marked()) == 4


def test_a_style_with_too_few_clips_is_passed_over_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "t.jsonl"
    styles = ["cartoon"] * 4 + ["stop motion"] * 2 + ["cartoon"]
    lines = [video_tuple(f"{k}.mp4", f"c{k}", "A dog runs on a beach", style, {}) for k, style in enumerate(styles)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    hold_out_command.main([str(path), "--per-style", "2"])
    assert capsys.readouterr().out == "held out for validation: 2 cartoon; passed over for too few sources: 2 stop motion\n"
    held = [record for record in records(path) if "split" in record]
    assert [record["meta"]["source_style"] for record in held] == ["cartoon"] * 2
    assert not hold_out(path, 9, required=False).marked and not [record for record in records(path) if "split" in record]


def test_what_another_process_writes_is_not_marked(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"source": "a"}\n{"source": "b"}\n')
    results = Results(path, name="source", label=str)
    with pytest.raises(ValueError, match=r"out = .*t.jsonl: another process is writing it; hold out when it has ended"):
        hold_out(path, 1)
    results.close()
    assert sum(hold_out(path, 1).marked.values()) == 1
    Results(path, name="source", label=str).close()  # the lock is given back


# --- rendering ---


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    write_pipeline(folder, transformer_2=tiny_wan(7), boundary_ratio=0.875)
    return folder


def prompts(path: Path, count: int) -> Path:
    words = ("a red dog", "the blue house", "snow in the mountain", "a cat in the sky", "a photo of the beach", "a red house")
    lines = [{"id": f"v {k}", "style": STYLES[k % 2], "caption": words[k], "prompt": wrap(words[k], STYLES[k % 2])} for k in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(tmp_path: Path, pipeline: Path, *more: str) -> list[str]:
    sizes = ["--width", "32", "--height", "32", "--frames", "5", "--steps", "2", "--dtype", "float32", "--device", "cpu", "--hold-out", "1"]
    return ["--captions", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out"), "--model", str(pipeline), *sizes, *more]


def test_rendering_writes_clips_settings_and_tuples_and_goes_on(tmp_path: Path, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts(tmp_path / "p.jsonl", 4)
    written: list[str] = []
    plain = clips.write_clip

    def interrupted(path: Path, *rest: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        plain(path, *rest)  # type: ignore[arg-type]
        written.append(path.name)

    monkeypatch.setattr(clips, "write_clip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_videos.main(arguments(tmp_path, pipeline))
    assert len(list((tmp_path / "out" / "clips").glob("*.mp4"))) == 2
    before = {path.name: path.read_bytes() for path in (tmp_path / "out" / "clips").glob("*.mp4")}
    monkeypatch.setattr(clips, "write_clip", plain)
    render_videos.main(arguments(tmp_path, pipeline))
    files = sorted((tmp_path / "out" / "clips").iterdir())
    assert len(files) == 4 and all(files[0].with_name(name).read_bytes() == data for name, data in before.items())
    for file in files:
        info = clips.clip_info(file)
        assert info.size == (32, 32) and info.frames == 5 and info.fps == pytest.approx(16, rel=0.05)
        settings = json.loads((tmp_path / "out" / "settings" / f"{file.stem}.json").read_text())
        assert settings["steps"] == 2 and settings["seed"] and settings["prompt"].endswith("style.")
    tuples = read_tuples_file(tmp_path / "out" / "tuples.jsonl")
    assert len(tuples) == 4 and Counter(item.split for item in tuples) == {None: 2, "validation": 2}
    frames = [np.asarray(next(clips.read_clip(file, 1)), dtype=float) for file in files]
    assert any(np.abs(frames[0] - other).mean() > 1 for other in frames[1:])


def test_other_settings_are_refused_and_tuples_alone_can_be_written(tmp_path: Path, pipeline: Path) -> None:
    prompts(tmp_path / "p.jsonl", 2)
    render_videos.main(arguments(tmp_path, pipeline, "--hold-out", "0"))
    with pytest.raises(ValueError, match=r"other settings \(steps 2 -> 3\)"):
        render_videos.main(arguments(tmp_path, pipeline, "--hold-out", "0", "--steps", "3"))
    next((tmp_path / "out" / "clips").iterdir()).unlink()
    render_videos.main(arguments(tmp_path, pipeline, "--hold-out", "0", "--tuples-only"))
    assert len(records(tmp_path / "out" / "tuples.jsonl")) == 1


def test_too_few_clips_for_validation_end_no_rendering(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts(tmp_path / "p.jsonl", 2)
    given = arguments(tmp_path, tmp_path / "no pipeline", "--tuples-only")
    for job in render_videos.jobs(RenderSettings(captions=str(tmp_path / "p.jsonl"), out=str(tmp_path / "out"))):
        clip(job.clip)
    render_videos.main(given)
    assert "held out for validation: none; passed over for too few sources: 1 cartoon, 1 photo-realistic" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--frames", "6"), "4n \\+ 1"),
        (("--width", "33"), "multiple of 16"),
        (("--model", "nowhere"), "cannot be loaded as a Wan pipeline"),
    ],
)
def test_bad_settings(tmp_path: Path, pipeline: Path, more: tuple[str, ...], said: str) -> None:
    prompts(tmp_path / "p.jsonl", 2)
    with pytest.raises(ValueError, match=said):
        render_videos.main(arguments(tmp_path, pipeline, *more))


def test_processes_wait_for_shares_that_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts(tmp_path / "p.jsonl", 2)
    assert patience_of(lambda: render_videos.main(arguments(tmp_path, tmp_path / "no pipeline")), monkeypatch) >= timedelta(hours=3)


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun on Windows needs libuv builds")
@pytest.mark.parametrize("room", [100, 1000])  # for the settings file alone neither, for the clip neither
def test_a_full_disk_is_named_and_leaves_no_clip(tmp_path: Path, room: int) -> None:
    settings = RenderSettings(captions="c.jsonl", out=str(tmp_path), model="m", width=64, height=64, frames=9)
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prompt": "p", "caption": "c", "style": "s"}\n')
    (job,) = render_videos.jobs(settings.model_copy(update={"captions": str(tmp_path / "p.jsonl")}))
    job.clip.parent.mkdir()
    job.settings_file.parent.mkdir()
    frames = np.random.default_rng(0).random((9, 64, 64, 3))
    with full_disk(room), pytest.raises(ValueError, match=r"a\.(json|mp4): cannot be written: .*make room"):
        render_videos._write(job, frames, settings)
    assert not list(job.clip.parent.iterdir()) and job.settings_file.is_file() == (room == 1000)
    render_videos._write(job, frames, settings)
    assert render_videos.missing([job], settings) == []


@pytest.mark.parametrize("contents", [b"[" * 100_000, b'{"id": ' + b"1" * 5000 + b"}", b"\xff", b"[]", b""])
def test_damaged_settings_beside_a_clip_are_other_settings(tmp_path: Path, contents: bytes) -> None:
    settings = RenderSettings(captions=str(tmp_path / "p.jsonl"), out=str(tmp_path))
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prompt": "p", "caption": "c", "style": "s"}\n')
    (job,) = render_videos.jobs(settings)
    for path, data in ((job.clip, b"x"), (job.settings_file, contents)):
        path.parent.mkdir()
        path.write_bytes(data)
    with pytest.raises(ValueError, match="was rendered with other settings"):
        render_videos.missing([job], settings)


def test_a_prompt_with_half_a_character_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prompt": "p \\ud800", "caption": "c", "style": "s"}\n')
    with pytest.raises(ValueError, match="line 1: prompt"):
        render_videos.jobs(RenderSettings(captions=str(tmp_path / "p.jsonl"), out=str(tmp_path)))


def test_two_processes_share_the_prompts(tmp_path: Path, pipeline: Path) -> None:
    prompts(tmp_path / "p.jsonl", 4)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "dataset_tools" / "render_videos.py"), *arguments(tmp_path, pipeline)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 of 4 clips to render, 2 at once") == 1 and done.stdout.count("4 clips, their tuples") == 1
    assert len(read_tuples_file(tmp_path / "out" / "tuples.jsonl")) == 4
