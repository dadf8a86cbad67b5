"""Runs of the tiny-world study: what is measured, and that an interrupted run loses nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import tiny_world as study
from benchmarks import tiny_world_run as runs
from byg_plugin import EditPipeline
from byg_plugin.config.sections import Config
from byg_plugin.demo import metrics, world
from byg_plugin.hosts import make_host
from byg_plugin.lora.card import LoraCard
from byg_plugin.models import make_family
from byg_plugin.training.checkpoint import save_file
from byg_plugin.training.loop import Interrupted
from tests.support import ROOT
from tests.support.tiny import in_child, wake
from tests.support.tiny_world_study import small

pytestmark = pytest.mark.usefixtures("little_data")

EVAL_EDITS = max(stage.eval_edits for stage in study.STAGES.values())  # before `little_data`


def test_edits_are_those_of_the_edit_pipeline(tmp_path):
    """With a LoRA that is awake, same noise, same batch: the same pictures; merged weights round otherwise than a LoRA."""
    plan = small(tmp_path).plan("full", 0)
    host = make_host(plan.config, make_family(plan.config), runs.CPU)
    wake(host)
    with host.ema() as velocity:
        ours = runs.Evaluator(plan.config, plan.eval_edits).edit(velocity, 4)
    metadata = LoraCard.of(plan.config, 1, "ema").to_metadata()
    save_file(host.export_lora(host.ema_weights.state()), tmp_path / "lora.safetensors", metadata=metadata)
    pipe = EditPipeline.from_lora(tmp_path / "lora.safetensors", config=plan.config)
    pictures = [Image.fromarray(world.render(edit.before)) for edit in plan.eval_edits]
    theirs = pipe.batch(pictures, [edit.instruction for edit in plan.eval_edits], seeds=range(4))
    for edit, (_, image) in zip(plan.eval_edits, theirs, strict=True):
        apart = np.abs(ours[edit.id].astype(int) - np.asarray(image))
        assert apart.max() <= 1 and apart.mean() < 0.01
    assert len({image.tobytes() for image in ours.values()}) == 4


def test_the_base_sees_captions_and_no_source(tmp_path):
    plan = small(tmp_path).plan("base", 0)
    evaluator = runs.Evaluator(plan.config, plan.eval_edits)
    seen = []

    def velocity(noisy, t, text, source):
        seen.append((text["t5"], source))
        return torch.zeros_like(noisy)

    evaluator.imagine(velocity, 0)
    family = make_family(plan.config)
    encoders = family.load_text_encoders(runs.CPU)
    wanted = torch.cat([family.encode_texts(encoders, [edit.tgt_caption])["t5"] for edit in plan.eval_edits])
    assert all(source is None and torch.equal(text, wanted) for text, source in seen)


def test_rows_without_training_are_of_the_exact_edit_and_of_the_source(tmp_path):
    truth, copy = (runs.run(small(tmp_path).plan(name, 0))["table"]["all"] for name in ("truth", "copy"))
    assert (truth["joint"], truth["edit"], truth["preserved"]) == (1, 1, 1)
    assert (copy["joint"], copy["edit"], copy["preserved"]) == (0, 0, 1)


def test_seeds_of_the_base_share_no_noise(tmp_path, monkeypatch):
    firsts = []

    def imagine(self, velocity, first_seed):
        firsts.append(first_seed)
        return {edit.id: world.render(edit.after) for edit in self.edits}

    monkeypatch.setattr(runs.Evaluator, "imagine", imagine)
    for seed in range(3):
        runs.run(small(tmp_path).plan("base", seed))
    assert all(b - a >= EVAL_EDITS for a, b in zip(firsts, firsts[1:], strict=False))


def timeless(record: dict) -> dict:
    """What does not hang on the clock."""
    kept = {key: value for key, value in record.items() if "seconds" not in key}
    kept["curve"] = [{key: value for key, value in point.items() if key != "cpu_seconds"} for point in record["curve"]]
    return kept


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> tuple[Path, dict]:
    """A small run from start to end: (folder, record)."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "TRAIN_EDITS_PER_TYPE", 4)
        stages = {name: dataclasses.replace(stage, eval_edits=4, curve_edits=2) for name, stage in study.STAGES.items()}
        patch.setattr(study, "STAGES", stages)
        return folder, runs.run(small(folder).plan("full", 0))


def test_a_run_leaves_a_whole_record(straight):
    folder, record = straight
    assert [point["step"] for point in record["curve"]] == [6, 8, 10, 12, 14, 16, 18, 20]
    assert record["curve"][0]["table"]["all"]["n"] == 2 and record["table"]["all"]["n"] == 4
    assert record["steps"] == 20 and 0 < record["cpu_seconds"] < 120
    assert record["seconds_per_later_step"] > record["seconds_per_warmup_step"]
    assert record["curve"][-1]["cpu_seconds"] == record["cpu_seconds"]
    assert [window["to"] for window in record["training"]] == [6, 8, 10, 12, 14, 16, 18, 20]
    assert "cosine_fwd" in record["training"][-1] and "cosine_fwd" not in record["training"][0]
    assert str(folder) not in json.dumps(record) and str(ROOT) not in json.dumps(record)
    assert (folder / "work/report/full-0/editor-ema.safetensors").is_file()
    assert not (folder / "work/report/full-0/checkpoints").exists()


def test_the_last_point_is_the_first_edits_of_the_end(straight):
    folder, record = straight
    plan = small(folder).plan("full", 0)
    evaluator = runs.Evaluator(plan.config, plan.eval_edits)
    pipe = EditPipeline.from_lora(folder / "work/report/full-0/editor-ema.safetensors", config=plan.config)
    pipe._load()
    with pipe._host.live() as velocity:
        images = evaluator.edit(velocity, 4)
    table = metrics.evaluate(images, plan.eval_edits)
    assert record["table"]["all"] == pytest.approx(table["all"], abs=2e-3)
    some = metrics.evaluate(images, plan.eval_edits[:2])
    assert record["curve"][-1]["table"]["all"] == pytest.approx(some["all"], abs=2e-3)


def killed_when(condition) -> None:
    """End this process as a power cut would, before the step's evaluation."""
    evaluate = runs._Watch._evaluate_if_due

    def die(self, trainer):
        if condition(trainer.step):
            os.kill(os.getpid(), signal.SIGKILL)
        evaluate(self, trainer)

    runs._Watch._evaluate_if_due = die


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(straight, tmp_path):
    def work(step: int):
        killed_when(lambda now: now == step)
        runs.run(small(tmp_path).plan("full", 0))

    folder = tmp_path / "work/report/full-0"
    assert in_child(lambda: work(10)) == -signal.SIGKILL  # saved, not evaluated
    assert [point["step"] for point in runs.read_json(folder / "curve.json")["points"]] == [6, 8]
    assert in_child(lambda: work(13)) == -signal.SIGKILL  # one step after the checkpoint
    assert [point["step"] for point in runs.read_json(folder / "curve.json")["points"]] == [6, 8, 10, 12]
    half = runs.read_lines(folder / "clock.jsonl")
    record = runs.run(small(tmp_path).plan("full", 0))
    assert timeless(record) == timeless(straight[1])
    clock = runs.read_lines(folder / "clock.jsonl")
    assert [line["step"] for line in clock] == list(range(1, 21))
    assert clock[:12] == half[:12]
    assert all(a["cpu"] <= b["cpu"] for a, b in zip(clock, clock[1:], strict=False))


def test_an_interrupted_run_counts_every_step_once(straight, tmp_path):
    plan = small(tmp_path).plan("full", 0)
    tick = runs._Watch.__call__

    def press(self, trainer):
        trainer._stop = trainer.step == 8  # what the handler of Ctrl-C does, in the middle of step 9
        tick(self, trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs._Watch, "__call__", press)
        with pytest.raises(Interrupted):
            runs.run(plan)
    assert not plan.result.exists()
    assert timeless(runs.run(plan)) == timeless(straight[1])
    assert [line["step"] for line in runs.read_lines(plan.folder / "clock.jsonl")] == list(range(1, 21))


def test_what_is_done_is_done_and_what_changed_is_stale(straight, tmp_path, monkeypatch):
    folder, _ = straight
    plan = small(folder).plan("full", 0)
    assert small(folder).state(plan) == "done"
    other = small(folder)
    other.options.set.append("train.lr=0.001")
    assert other.state(other.plan("full", 0)) == f"stale (train.lr: {plan.config.train.lr} -> 0.001)"
    base = tmp_path / "base"
    shutil.copytree(plan.config.model.path, base)
    assert small(folder, base=base).state(small(folder, base=base).plan("full", 0)) == "done"  # the same base elsewhere
    weights = base / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert small(folder, base=base).state(small(folder, base=base).plan("full", 0)) == "stale (another base)"
    monkeypatch.setattr(study, "TRAIN_EDITS_PER_TYPE", 5)
    assert small(folder).state(small(folder).plan("full", 0)) == "stale (another data)"


def test_an_option_that_is_new_leaves_results_valid_while_it_has_its_default(straight, tmp_path):
    folder, record = straight
    plan = small(folder).plan("full", 0)
    older = json.loads(json.dumps(record))
    del older["config"]["train"]["weight_decay"]
    assert runs.changes(older, plan) == []
    del older["config"]["train"]["lr"]
    default = Config.model_fields["train"].annotation.model_fields["lr"].default
    assert runs.changes(older, plan) == [f"train.lr: {default} -> {plan.config.train.lr}"]


def test_a_training_of_other_settings_is_not_gone_on_with(tmp_path):
    def work():
        killed_when(lambda now: now == 10)
        runs.run(small(tmp_path).plan("full", 0))

    assert in_child(work) == -signal.SIGKILL
    clock = tmp_path / "work/report/full-0/clock.jsonl"
    before = runs.read_lines(clock)
    other = small(tmp_path)
    other.options.set.append("train.steps=12")
    assert runs.run(other.plan("full", 0))["steps"] == 12
    after = runs.read_lines(clock)
    assert [line["step"] for line in after] == list(range(1, 13))
    assert after[0] != before[0]  # its first step was made again, not taken over


def test_the_command_makes_what_is_missing_and_nothing_twice(tmp_path, monkeypatch, capsys):
    words = ["--stage", "screen", "--only", "copy", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    monkeypatch.undo()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    study.main(words)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    made = tmp_path / "out/screen/copy-0.json"
    assert json.loads(made.read_text(encoding="utf-8"))["table"]["all"]["preserved"] == 1.0
    assert "| copy the source | **0** |" in (tmp_path / "out/screen_table.md").read_text(encoding="utf-8")
    before = made.stat().st_mtime_ns
    study.main(words)
    assert made.stat().st_mtime_ns == before
    study.main([*words, "--list"])
    assert "0: done" in capsys.readouterr().out


def test_a_run_that_fails_is_told_and_ends_the_command_with_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()
    options = study.parse(
        ["--stage", "screen", "--only", "base", "--seeds", "0", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "w")]
    )
    shutil.copytree(options.base, tmp_path / "base")
    (tmp_path / "base/transformer/diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    options.base = tmp_path / "base"
    failures = study.run_all(study.Study(options))
    assert len(failures) == 1 and "base seed 0 failed" in failures[0]
