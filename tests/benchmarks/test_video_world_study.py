"""The study of the moving tiny world: the machinery of the image world's, on clips."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import tiny_world as study
from benchmarks import tiny_world_report as report
from benchmarks import tiny_world_run as runs
from benchmarks import video_world as clips
from byg_plugin import EditPipeline
from byg_plugin.demo import video_world
from byg_plugin.hosts import make_host
from byg_plugin.lora.card import LoraCard
from byg_plugin.models import make_family
from byg_plugin.training.checkpoint import save_file
from tests.support.tiny import SHORT_TRAINING, wake
from tests.support.video_base import write_video_base

LITTLE = dataclasses.replace(
    clips.SUBJECT,
    stages={name: dataclasses.replace(stage, eval_edits=4, curve_edits=2) for name, stage in clips.SUBJECT.stages.items()},
    edits_per_type=4,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_video_base(tmp_path_factory.mktemp("base"))


def small(folder: Path, base: Path, *words: str, subject: study.Subject = LITTLE) -> study.Study:
    options = study.parse(["--out", f"{folder}/out", "--work", f"{folder}/work", "--base", str(base), *words], subject)
    options.set = [*SHORT_TRAINING, *options.set]
    return study.Study(options, subject)


def test_every_row_of_clips_has_a_valid_configuration(tmp_path, base):
    every = study.Study(study.parse(["--out", f"{tmp_path}/out", "--work", f"{tmp_path}/work", "--base", str(base)], LITTLE), LITTLE)
    assert "six_full" in every.names() and not [name for name in every.names() if name.startswith(("four_", "three_"))]
    for name, seed in every.tasks():
        if not study.RUNS[name].as_long_as:
            assert every.plan(name, seed).config.train.seed == seed


def test_a_row_of_pictures_alone_is_no_row_of_clips(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.parse(["--only", "four_np_edit", "--out", str(tmp_path)], LITTLE)
    assert "four_np_edit: no such run; there are truth" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("no_routing", {"objective.routing": False}),
        ("no_cycle", {"objective.cycle": False}),
        ("no_directional", {"objective.directional": False}),
        ("no_bootstrap", {"objective.bootstrap": False}),
        ("no_prior", {"objective.prior": False}),
        ("no_identity", {"objective.identity_probability": 0.0}),
        ("paired_steps", {"objective.name": "paired"}),
        ("six_full", {}),
    ],
)
def test_every_switch_of_the_images_study_is_one_of_the_clips(tmp_path, base, name, changed):
    whole = small(tmp_path, base)
    one, other = (runs.settings(whole.plan(run, 0)) for run in ("full", name))
    assert {f"{s}.{k}": v for s, values in other.items() for k, v in values.items() if one[s][k] != v} == changed


def test_stages_and_the_demo_share_no_clips():
    seen: set[object] = set()
    for stage in clips.SUBJECT.stages.values():
        types = clips.SUBJECT.worlds["recolour"]
        train = video_world.sample_split(384, stage.data_seed, "train", types)
        evaluation = runs.eval_edits(128, stage.data_seed, stage.split, types, runs.CLIPS)
        scenes = {edit.before for edit in (*train, *evaluation)}
        assert len(scenes) == 512 and not scenes & seen
        seen |= scenes
    assert not seen & {edit.before for split in ("train", "eval") for edit in video_world.sample_split(384, 0, split)}


def test_edits_are_those_of_the_edit_pipeline(tmp_path, base):
    """With LoRAs that are awake in both experts, same noise: the same frames; merged weights round otherwise than a LoRA."""
    plan = small(tmp_path, base, "--try", "float32", "--set", "train.mixed_precision=no").plan("full", 0)
    host = make_host(plan.config, make_family(plan.config), runs.CPU)
    wake(host)
    with host.ema() as velocity:
        ours = runs.Evaluator(plan.config, plan.eval_edits, runs.CLIPS).edit(velocity, 2)
    for suffix, tensors in host.lora_files(host.ema_weights.state()).items():
        save_file(tensors, tmp_path / f"lora{suffix}.safetensors", LoraCard.of(plan.config, 1, "ema", host.family, suffix).to_metadata())
    pipe = EditPipeline.from_lora(tmp_path / "lora.safetensors", config=plan.config, resolution=64)
    for seed, edit in enumerate(plan.eval_edits[:2]):
        source = tmp_path / f"{seed}.mkv"
        video_world._write(source, video_world.render(edit.before, edit.motion))
        frames, theirs, fps = pipe.clip(source, edit.instruction, seed=seed)
        assert fps == pytest.approx(video_world.FPS, rel=0.01) and len(frames) == video_world.FRAMES
        apart = np.abs(ours[edit.id].astype(int) - np.stack([np.asarray(frame) for frame in theirs]))
        assert apart.max() <= 1 and apart.mean() < 0.01
    assert len({clip.tobytes() for clip in ours.values()}) == 2


def test_the_base_sees_captions_and_no_source(tmp_path, base):
    plan = small(tmp_path, base).plan("base", 0)
    seen = []

    def velocity(noisy, t, text, source):
        seen.append((noisy.shape, source))
        return torch.zeros_like(noisy)

    made = runs.Evaluator(plan.config, plan.eval_edits, runs.CLIPS).imagine(velocity, 0)
    assert all(source is None and shape == (4, 16, 2, 8, 8) for shape, source in seen)
    assert {clip.shape for clip in made.values()} == {(5, 64, 64, 3)}


def test_a_run_leaves_a_whole_record_and_its_page_has_the_clips_columns(tmp_path, base):
    whole = small(tmp_path, base)
    for name in ("truth", "copy", "full"):
        runs.run(whole.plan(name, 0))
    record = json.loads(whole.result("full", 0).read_text(encoding="utf-8"))
    assert record["steps"] == 3 and record["curve"][-1]["step"] == 3
    assert {"tracked", "trajectory_error", "flicker"} <= record["table"]["all"].keys()
    assert (tmp_path / "work/report/full-0/contact_sheet.png").is_file()
    assert whole.state(whole.plan("full", 0)) == "done"
    study.write_reports(whole, table=True, plot=True)
    page = (tmp_path / "out/table.md").read_text(encoding="utf-8")
    assert page.startswith("# The moving tiny world") and "python -m benchmarks.video_world" in page
    head, truth = (next(line for line in page.splitlines() if line.startswith(start)) for start in ("| run |", "| ground truth |"))
    column = head.split(" | ").index("trajectory error (px)")
    assert float(truth.split(" | ")[column]) < 0.4
    # Pictures have no such columns.
    assert "trajectory" not in report.table({"copy": {0: record | {"name": "copy", "kind": "copy"}}}, 5)


def test_targets_are_clips_and_only_the_baseline_has_them(tmp_path, base):
    whole = small(tmp_path, base)
    for name in ("full", "paired_steps"):
        plan = whole.plan(name, 0)
        runs.prepare(plan)
        line = json.loads(Path(plan.config.dataset.tuples).read_text(encoding="utf-8").splitlines()[0])
        assert ("target" in line) == (name == "paired_steps")
