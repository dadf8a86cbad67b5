"""Scores while training: they change nothing, choose the best checkpoint, go on with a resumed run, and end no run."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from byg_plugin import evaluate, train_network
from byg_plugin.config.sections import Config
from byg_plugin.data.tuples import EditTuple
from byg_plugin.evaluation.metrics.error import Error
from byg_plugin.evaluation.metrics.psnr import Psnr
from byg_plugin.evaluation.scores import Row
from byg_plugin.evaluation.while_training import TrainingScores, joint
from byg_plugin.models.flux import FluxFamily
from byg_plugin.training import checkpoint, logs, preview
from byg_plugin.training.loop import Trainer
from tests.support.evaluation import tiny_clip, tiny_dino
from tests.support.tiny import curve, in_child, run_config
from tests.support.training_runs import assert_same_run, kill, train

ERROR = {"every": 2, "items": 2, "metrics": ["error"], "select": ["error_source"]}


def config(out: Path, *, train: dict[str, Any] | None = None, **evaluated: Any) -> Config:
    """Six steps with a checkpoint every second; two held-out items."""
    return run_config(
        out,
        dataset={"validation_items": 2},
        sample={"steps": 2},
        train=train or {},
        evaluate={**ERROR, **evaluated},
    )


def scored(out: Path) -> dict[int, float]:
    return {line["step"]: line["evaluate/error_source"] for line in logs.records(out / "evaluation.jsonl")}


def best(out: Path) -> dict[str, Any]:
    return json.loads((out / "best.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(config(out))
    return out


def test_steps_are_scored_and_the_best_checkpoint_is_named(whole: Path):
    values = scored(whole)
    assert list(values) == [2, 4, 6] and len({*values.values()}) == 3
    lowest = min(values, key=lambda step: values[step])
    found = best(whole)
    assert (found["step"], found["score"], found["select"], found["of"]) == (lowest, values[lowest], ["error_source"], 3)
    assert found["weights"] == "ema" and (whole / found["checkpoint"] / "byg_lora-ema.safetensors").is_file()
    folder = whole / "evaluations" / "step-000004"
    assert sorted(path.name for path in folder.iterdir()) == ["000.png", "001.png", "report.html", "scores.jsonl"]
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert np.mean([row["scores"]["error_source"] for row in rows]) == pytest.approx(values[4])


def test_what_is_scored_are_the_edits_of_that_checkpoint(whole: Path):
    """The previews' edits, of the same weights and seeds."""
    from tests.support.tiny import make_trainer

    trainer = make_trainer(config(whole.parent / "other"))
    state, _ = checkpoint_state(trainer, whole / "checkpoints" / "step-000004")
    trainer._restore(state)
    latents = preview.edited(trainer.config, trainer.family, trainer.host, trainer.validation, "it", items=2)
    pictures = preview.decoded("float32", trainer.family, trainer.host, latents)
    for index, (_, edit) in enumerate(pictures):
        saved = Image.open(whole / "evaluations" / "step-000004" / f"{index:03d}.png")
        assert np.abs(np.asarray(saved).astype(int) - np.asarray(edit[0]).astype(int)).max() <= 1


def checkpoint_state(trainer: Any, path: Path) -> Any:
    from byg_plugin.training.resume import load_start

    return load_start(path, trainer.config, trainer.family, trainer.objective, trainer.data.digest(), torch.device("cpu"))


def test_scores_change_nothing(whole: Path, tmp_path: Path):
    train(config(tmp_path / "out", every=0))
    assert_same_run(tmp_path / "out", whole)
    assert not (tmp_path / "out" / "best.json").exists() and not (tmp_path / "out" / "evaluation.jsonl").exists()


def test_the_best_checkpoint_is_kept_however_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = iter([0.5, 0.1, 0.1, 0.3])
    monkeypatch.setattr(Error, "__call__", lambda self, seen: {"error_source": value_of(seen)})
    current: dict[str, float] = {}

    def value_of(seen: Any) -> float:
        step = seen.item.edit.parent.name
        current.setdefault(step, next(values) if step not in current else 0.0)
        return current[step]

    train(config(tmp_path / "out", train={"steps": 8, "keep_last": 1}))
    assert scored(tmp_path / "out") == {2: 0.5, 4: 0.1, 6: 0.1, 8: 0.3}
    kept = [path.name for path in checkpoint.checkpoints(tmp_path / "out" / "checkpoints")]
    assert best(tmp_path / "out")["step"] == 4, "of equals the earliest"
    assert kept == ["step-000004", "step-000008"]


@pytest.mark.parametrize("when", ["saved", "scored"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(whole: Path, tmp_path: Path, when: str):
    out = tmp_path / "out"

    def killed(trainer: Any) -> None:
        if trainer.step == 4:
            kill()

    def work() -> None:
        scores = TrainingScores(config(out))
        measure = scores._evaluate

        def hook(trainer: Any, **options: Any) -> None:
            if when == "saved":
                killed(trainer)
            measure(trainer, **options)
            killed(trainer)

        scores._evaluate = hook  # type: ignore[method-assign]
        monkeypatch = pytest.MonkeyPatch()
        monkeypatch.setattr(train_network, "_evaluation", lambda config: scores)
        train(config(out))

    assert in_child(work) == -9
    assert list(scored(out)) == ([2] if when == "saved" else [2, 4])
    train(config(out), resume="latest")
    assert scored(out) == scored(whole) and best(out) == best(whole)
    assert_same_run(out, whole)


def test_going_back_forgets_what_came_later(whole: Path, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    with (out / "evaluation.jsonl").open("a", encoding="utf-8") as file:
        file.write("someone else's line\n")
    made = config(out)
    start = str(out / "checkpoints" / "step-000002")
    seen = []

    class Stopped(TrainingScores):
        def start(self, trainer: Any) -> None:
            super().start(trainer)
            seen.append((list(scored(out)), best(out)["step"]))

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train_network, "_evaluation", lambda config: Stopped(config))
        train_network.train(made, FluxFamily(made), torch.device("cpu"), start, discard_later=True)
    assert seen == [([2], 2)]
    names = sorted(path.name for path in (out / "evaluations").iterdir())
    assert names == ["discarded-step-000004", "discarded-step-000006", "step-000002", "step-000004", "step-000006"]
    assert scored(out) == scored(whole) and best(out) == best(whole)


def test_a_metric_that_fails_ends_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    def broken(self: Error, seen: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Error, "__call__", broken)
    with caplog.at_level(logging.WARNING):
        train(config(tmp_path / "out", metrics=["error", "psnr"]))
    assert "metric error failed and training goes on: RuntimeError: no memory" in caplog.text
    assert_same_run(tmp_path / "out", whole)
    assert all(
        "evaluate/psnr_source" in line and "evaluate/error_source" not in line for line in curve(tmp_path / "out", "evaluation.jsonl")
    )
    assert not (tmp_path / "out" / "best.json").exists()


def test_a_step_without_the_selected_column_is_told_and_shows_another_ones_worst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(self: Psnr, seen: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Psnr, "__call__", broken)
    with caplog.at_level(logging.WARNING):
        train(config(tmp_path / "out", train={"steps": 2}, metrics=["psnr", "error"], select=["psnr_source"]))
    assert "evaluate.select = ['psnr_source'] has no value at step 2: this checkpoint is no candidate" in caplog.text
    folder = tmp_path / "out" / "evaluations" / "step-000002"
    errors = [float(value) for value in re.findall(r'data-value="([^"]+)"', (folder / "report.html").read_text(encoding="utf-8"))]
    assert len({*errors}) == 2 and errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("frames", "clips", "targets"), [(1, False, False), (1, False, True), (5, True, True), (5, False, True)])
def test_ground_truths_select_where_an_image_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, clips: bool, targets: bool
):
    """Before a model is loaded, and before --discard-later discards."""
    texts = {"src_caption": "a", "tgt_caption": "b", "instruction": "add", "reverse_instruction": "remove"}
    source = Path("a.mp4" if clips else "a.png")
    items = [EditTuple(id="a", source=source, target=source if targets else None, **texts)]
    made = config(tmp_path / "out", select=["error_truth"])
    made = made.model_copy(update={"dataset": made.dataset.model_copy(update={"frames": frames})})
    monkeypatch.setattr("byg_plugin.evaluation.while_training.split_tuples", lambda tuples, count: ([], items))
    if targets and not clips:
        TrainingScores(made)
        return
    with pytest.raises(ValueError, match="error_truth needs an image with a target, and the 1 validation .* select error_source"):
        TrainingScores(made)


def test_the_watchdog_waits_for_the_edits_of_shards_and_for_no_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A long metric is the main process's own; the others wait at a barrier of their own."""
    waits: dict[str, list[str | None]] = {"edits": [], "metric": []}
    around: list[str | None] = [None]

    @contextmanager
    def together(self: Trainer, what: str) -> Iterator[None]:
        around[0] = what
        yield
        around[0] = None

    measure, edited = Error.__call__, preview.edited
    monkeypatch.setattr(Trainer, "together", together)
    monkeypatch.setattr(Error, "__call__", lambda self, seen: (waits["metric"].append(around[0]), measure(self, seen))[1])
    monkeypatch.setattr(preview, "edited", lambda *args, **more: (waits["edits"].append(around[0]), edited(*args, **more))[1])
    train(config(tmp_path / "out", train={"steps": 2}))
    assert waits == {"edits": ["the evaluation at step 2"], "metric": [None, None]}


def test_clip_and_dino_choose_together_and_draw_curves(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    models = {"clip": str(tiny_clip(tmp_path / "clip")), "dino": str(tiny_dino(tmp_path / "dino"))}
    made = config(out, train={"steps": 2, "tracker": "tensorboard"}, metrics=["clip", "dino"], select=["clip_text", "dino"], **models)
    train(made)
    (line,) = curve(out, "evaluation.jsonl")
    rows: dict[str, dict[str, float]] = {}
    for text in (out / "evaluations" / "step-000002" / "scores.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(text)
        rows.setdefault(record["id"], {}).update(record["scores"])
    each = [(max(0.0, row["clip_text"]) * max(0.0, row["dino"])) ** 0.5 for row in rows.values()]
    assert line["evaluate/clip_text_and_dino"] == pytest.approx(np.mean(each)) == pytest.approx(best(out)["score"])
    events = EventAccumulator(str(next(out.rglob("events.*")).parent)).Reload()
    assert events.Scalars("evaluate/dino")[0].value == pytest.approx(line["evaluate/dino"])


def test_what_it_writes_is_what_the_command_says_of_it(whole: Path, tmp_path: Path):
    tuples = config(whole).dataset.tuples
    folder = whole / "evaluations" / "step-000006"
    ids = list(dict.fromkeys(json.loads(line)["id"] for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()))
    lines = [json.loads(line) for line in Path(tuples).read_text(encoding="utf-8").splitlines()]
    (tmp_path / "sources").mkdir()
    (tmp_path / "results").mkdir()
    from byg_plugin.data.tuples import read_tuples_file

    for index, name in enumerate(ids):
        source = next(one.source for one in read_tuples_file(Path(tuples)) if one.id == name)
        size = Image.open(folder / f"{index:03d}.png").size
        from byg_plugin.data.buckets import cover

        cover(Image.open(source).convert("RGB"), size).save(tmp_path / "sources" / f"{index}.png")
        shutil.copy(folder / f"{index:03d}.png", tmp_path / "results" / f"{index}.png")
    assert len(lines) == 5
    words = ["--sources", tmp_path / "sources", "--results", tmp_path / "results", "--metrics", "error", "--out", tmp_path / "scores"]
    evaluate.main([str(word) for word in words])
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text(encoding="utf-8"))
    assert summary["all"]["error_source"]["mean"] == pytest.approx(scored(whole)[6])


@pytest.mark.parametrize(
    ("evaluated", "says"),
    [
        ({"metrics": ["beauty"], "select": ["beauty"]}, r"evaluate.metrics = \['beauty'\]: beauty is none of clip, dino"),
        ({"select": ["dino"]}, r"evaluate.select = \['dino'\]: dino is no column of evaluate.metrics, which have error_source"),
        ({"select": ["error_source", "error_truth"]}, "of error_source less is better, it goes into no geometric mean"),
        (
            {"metrics": ["dino"], "select": ["dino"], "dino": "nowhere/none"},
            "evaluate.metrics: dino: --dino nowhere/none: is not on this machine; fetch it with: hf download",
        ),
        ({"select": ["error_outside"]}, "error_outside needs masks, which there are none of while training; select error_source"),
        (
            {"metrics": ["flicker", "psnr"], "select": ["psnr_source", "flicker"]},
            "flicker is of clips alone, and with dataset.frames = 1 edits are images",
        ),
        ({"metrics": ["error", "viescore"]}, "viescore needs a judge: not while training"),
        ({"metrics": ["imgedit"], "select": ["imgedit"]}, "imgedit needs a judge: not while training"),
        (
            {"metrics": ["aesthetic"], "select": ["aesthetic"], "aesthetic": "nowhere/head.safetensors"},
            "evaluate.metrics: aesthetic: --aesthetic nowhere.head.safetensors: no such file",
        ),
        (
            {"metrics": ["error", "motion"], "cotracker": "nowhere/c.safetensors"},
            "motion: --cotracker nowhere.c.safetensors: no such file",
        ),
        ({"device": "cuda"}, 'evaluate.device = "cuda": torch finds no CUDA device'),
    ],
)
def test_what_cannot_be_scored_is_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: dict[str, Any], says: str
):
    monkeypatch.setattr(FluxFamily, "load_transformers", lambda *args: pytest.fail("loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=says):
        train(config(tmp_path / "out", **evaluated))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"dataset": {"validation_items": 0}, "evaluate": ERROR}, "evaluate.every needs held-out tuples: set dataset.validation_items"),
        (
            {"dataset": {"validation_items": 2}, "evaluate": {**ERROR, "every": 3}},
            "evaluate.every = 3 is not a multiple of train.save_every = 2",
        ),
        ({"dataset": {"validation_items": 2}, "evaluate": ERROR, "train": {"save_every": 0}}, "multiple of train.save_every = 0"),
        ({"dataset": {"validation_items": 2}, "evaluate": {**ERROR, "metrics": []}}, "evaluate.metrics"),
    ],
)
def test_wrong_keys(tmp_path: Path, sections: dict[str, dict[str, Any]], says: str):
    with pytest.raises(ValueError, match=says):
        run_config(tmp_path / "out", **sections)


@pytest.mark.parametrize(
    ("scores", "value"),
    [
        ({"a": 0.09, "b": 0.81}, 0.27),
        ({"a": 0.0, "b": 1.0}, 0.0),
        ({"a": -0.3, "b": -0.3}, 0.0),
        ({"a": 0.5, "b": None}, None),
        ({"a": 0.5}, None),
    ],
)
def test_the_joint_score_is_a_geometric_mean_of_what_is_positive(scores: dict[str, float | None], value: float | None):
    found = joint(Row(id="x", scores=scores), ("a", "b"))
    assert found == (None if value is None else pytest.approx(value))
