"""The tiny-world study: what it runs, how it reads curves, and that an interrupted run loses nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import in_child, wake

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are no part of the package

from benchmarks import demo_musubi  # noqa: E402
from benchmarks import tiny_world as study  # noqa: E402
from benchmarks import tiny_world_report as report  # noqa: E402
from benchmarks import tiny_world_run as runs  # noqa: E402
from byg_plugin.config.loading import load_config  # noqa: E402
from byg_plugin.config.sections import Config  # noqa: E402
from byg_plugin.demo import metrics, world  # noqa: E402
from byg_plugin.edit import EditPipeline  # noqa: E402
from byg_plugin.hosts import make_host  # noqa: E402
from byg_plugin.lora.card import LoraCard  # noqa: E402
from byg_plugin.models import make_family  # noqa: E402
from byg_plugin.training.checkpoint import save_file  # noqa: E402
from byg_plugin.training.loop import Interrupted  # noqa: E402

EVAL_EDITS = max(stage.eval_edits for stage in study.STAGES.values())  # before `little_data`
FEW = [
    'train.mixed_precision="no"',  # bfloat16 rounds merged weights otherwise than a LoRA, visibly
    "train.steps=20",
    "train.lr_warmup_steps=2",
    "train.global_batch_size=2",
    "train.batch_size=2",
    "objective.identity_warmup_steps=6",
    "objective.rollout_steps=2",
    "sample.steps=2",
]


def small(folder: Path, *words: str, **changes: object) -> study.Study:
    """A study of few steps and few edits."""
    options = study.parse(["--out", f"{folder}/out", "--work", f"{folder}/work", *words])
    options.set = [*FEW, *options.set]
    for name, value in changes.items():
        setattr(options, name, value)
    return study.Study(options)


@pytest.fixture(autouse=True)
def little_data(monkeypatch):
    monkeypatch.setattr(study, "TRAIN_EDITS_PER_TYPE", 4)
    stages = {name: dataclasses.replace(stage, eval_edits=4, curve_edits=2) for name, stage in study.STAGES.items()}
    monkeypatch.setattr(study, "STAGES", stages)


# --- what is run ---


@pytest.fixture
def whole(tmp_path) -> study.Study:
    return study.Study(study.parse(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]))


def differences(whole: study.Study, name: str) -> dict[str, object]:
    one, other = (runs.settings(whole.plan(run, 0)) for run in ("full", name))
    return {f"{s}.{k}": v for s, values in other.items() for k, v in values.items() if one[s][k] != v}


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
        ("six_paired_steps", {"objective.name": "paired"}),
    ],
)
def test_a_row_changes_what_its_name_says_and_nothing_else(whole, name, changed):
    assert differences(whole, name) == changed


def test_every_row_has_a_valid_configuration_in_every_stage(tmp_path):
    for stage in study.STAGES:
        each = study.Study(study.parse(["--stage", stage, "--out", str(tmp_path)]))
        for name, seed in each.tasks():
            if not study.RUNS[name].as_long_as:
                plan = each.plan(name, seed)
                assert plan.config.train.seed == seed == plan.seed
                assert plan.config.train.steps > plan.config.objective.identity_warmup_steps > 0


@pytest.mark.parametrize("name", ["full", "no_cycle", "paired_steps", "six_full"])
def test_the_committed_rows_have_the_settings_that_the_study_has_now(whole, name):
    """Or the documents' figures are of another recipe: make the study again (`--list` names what is stale)."""
    for seed in (0, 1, 2):
        record = runs.read_json(ROOT / f"benchmarks/results/tiny_world/report/{name}-{seed}.json")
        assert [found for found in runs.changes(record, whole.plan(name, seed)) if found != "another data"] == []  # `little_data`


def test_the_demo_inside_musubi_tuner_has_the_objective_of_its_committed_figures(tmp_path):
    places = [f'{key}="{tmp_path.as_posix()}"' for key in ("dataset.tuples", "dataset.cache_dir", "output.dir")]
    demo = load_config(ROOT / "configs/demo.toml", places)
    now = demo_musubi.recipe(demo, tmp_path, None).objective.model_dump(mode="json")
    assert now == runs.read_json(demo_musubi.RESULT)["objective"]


def test_stages_and_the_demo_share_no_pictures():
    seen: set[world.Scene] = set()
    for stage in study.STAGES.values():
        types = study.WORLDS["recolour"]
        train = world.sample_split(512, stage.data_seed, "train", types)
        evaluation = runs.eval_edits(192, stage.data_seed, stage.split, types)
        scenes = {edit.before for edit in (*train, *evaluation)}
        assert len(scenes) == 704 and not scenes & seen
        seen |= scenes
    assert not seen & {edit.before for split in ("train", "eval") for edit in world.sample_split(512, 0, split)}


def test_any_first_few_edits_are_balanced():
    edits = runs.eval_edits(66, 0, "x", study.WORLDS["six"])
    assert len(edits) == 66 == len({edit.id for edit in edits})
    for few in (6, 30, 66):
        kinds = [edit.edit_type for edit in edits[:few]]
        assert {kinds.count(kind) for kind in study.WORLDS["six"]} == {few // 6}


def test_equal_time_is_the_full_methods_cpu_seconds_at_the_baselines_pace(whole):
    assert whole.lacks("paired_time", 1) == ["full", "paired_steps"]
    runs.write_json(whole.result("full", 1), {"cpu_seconds": 500.0})
    runs.write_json(whole.result("paired_steps", 1), {"seconds_per_step": 0.07})
    assert not whole.lacks("paired_time", 1)
    assert whole.plan("paired_time", 1).config.train.steps == 7143


def test_equal_time_on_all_edit_types_is_that_of_the_full_method_on_them(whole):
    runs.write_json(whole.result("six_full", 0), {"cpu_seconds": 600.0})
    runs.write_json(whole.result("six_paired_steps", 0), {"seconds_per_step": 0.2})
    plan = whole.plan("six_paired_time", 0)
    assert plan.config.train.steps == 3000 and plan.train_recipe["with_targets"]
    assert plan.eval_edits == whole.plan("six_full", 0).eval_edits


def test_only_the_baseline_has_targets(whole):
    for name in ("full", "paired_steps"):
        plan = whole.plan(name, 0)
        assert plan.train_recipe["with_targets"] == (name == "paired_steps")
    assert whole.plan("full", 0).config.dataset.tuples != whole.plan("paired_steps", 0).config.dataset.tuples
    assert whole.plan("full", 0).train_edits == whole.plan("paired_steps", 0).train_edits


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "fool"], "no such run"),
        (["--seeds", "0,x"], "whole numbers"),
        (["--steps", "0.1"], "give another --out"),
        (["--set", "train.lr=1e-3"], "belong together"),
        (["--try", "a/b", "--set", "train.lr=1e-3"], "letters, digits"),
        (["--try", "a", "--set", "train.lr=1e-3", "--only", "paired_time"], "given number of steps"),
        (["--base", "nowhere"], "no such file or folder"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        study.parse(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_curve_points_lie_between_the_warmup_and_the_end(tmp_path):
    plan = small(tmp_path).plan("full", 0)
    assert runs.curve_steps(plan.config) == [6, 8, 10, 12, 14, 16, 18, 20]
    assert runs.curve_steps(small(tmp_path).plan("paired_steps", 0).config) == [3, 6, 9, 11, 14, 17, 20]


# --- curves ---


def path(*points: tuple[float, float]) -> list[report.Point]:
    return [{"step": i, "edit": edit, "preserved": preserved} for i, (edit, preserved) in enumerate(points)]


def test_preservation_at_equal_edit_rate_by_closed_form():
    full, other = path((0, 1), (1, 0.8)), path((0, 1), (0.5, 0.7))
    assert report.matched(full, other, "preserved") == pytest.approx((0.5, 0.7 - 0.9))
    assert report.matched(other, full, "preserved") == pytest.approx((0.5, 0.9 - 0.7))
    # Straight lines 1 - 0.2 e and 1 - 0.6 e: the mean of -0.4 e over [0.05, 0.5].
    assert report.matched_over_range(full, other, "preserved") == pytest.approx((0.05, 0.5, -0.4 * 0.275))


def test_a_curve_is_read_where_it_last_passes_a_rate():
    winding = path((0, 1), (0.6, 0.9), (0.2, 0.5), (0.8, 0.3))
    assert report.at_rate(winding, 0.4, "preserved") == pytest.approx(0.5 - 0.2 / 3)
    assert report.at_rate(winding, 0.8, "preserved") == pytest.approx(0.3)
    assert report.at_rate(winding, 0.9, "preserved") is None
    assert report.at_rate(path((0.5, 0.9), (0.5, 0.4)), 0.5, "preserved") == 0.4


def test_curves_that_share_no_rate_are_not_compared():
    apart = path((0.0, 1), (0.3, 0.9)), path((0.4, 0.9), (0.9, 0.8))
    assert report.matched(*apart, "preserved") is None
    assert report.matched_over_range(*apart, "preserved") is None
    assert report.matched(path((0, 1), (0.9, 0.9)), path((0, 1), (0.01, 1)), "preserved") is None


def test_labels_keep_their_order_and_distance():
    heights = report.spread_out([0.9, 0.89, 0.5, 0.01, 0.0], 0.1)
    assert heights == sorted(heights, reverse=True)
    assert all(a - b >= 0.1 - 1e-9 for a, b in zip(heights, heights[1:], strict=False))
    assert heights[2] == 0.5 and min(heights) >= 0


# --- table and plot ---


def row(edit: float, preserved: float) -> dict[str, float]:
    return {
        "n": 8, "joint": edit * preserved, "edit": edit, "preserved": preserved, "pebble": 1.0, "outside_error": 1 - preserved, "iou": 0.5,
        "edit_share": edit,
    }  # fmt: skip


def result(name: str, seed: int, ends: tuple[float, float], base: str = "b") -> dict:
    run = study.RUNS[name.partition("+")[0]]
    kinds = {kind: row(*ends) for kind in ("all", report.OBJECT, report.BACKGROUND)}
    record = {
        "name": name, "title": run.title, "kind": run.kind, "stage": "report", "seed": seed, "overrides": list(run.overrides),
        "identity": {"base": base, "config": "c", "data": "d"}, "commit": "abc", "edits": 8, "table": kinds,
    }  # fmt: skip
    if run.kind == "train":
        points = [{"step": step, "cpu_seconds": step, "table": {"all": row(*at)}} for step, at in ((1, (0.0, 1.0)), (2, ends))]
        record |= {"curve": points, "steps": 2, "cpu_seconds": 60.0 * (seed + 1)}
        record["machine"] = {"torch": "2", "diffusers": "0", "threads": 1}
    return record


@pytest.fixture
def results(tmp_path) -> Path:
    folder = tmp_path / "report"
    for seed, shift in enumerate((0.0, 0.04, -0.04)):
        for name, (edit, preserved) in {
            "full": (0.92, 1.0), "no_cycle": (0.92, 0.4), "no_prior": (0.0, 1.0), "no_bootstrap": (0.9, 0.9), "six_full": (0.6, 0.6),
        }.items():  # fmt: skip
            runs.write_json(folder / f"{name}-{seed}.json", result(name, seed, (max(0.0, edit + shift), preserved)))
    runs.write_json(folder / "copy-0.json", result("copy", 0, (0.0, 1.0)))
    return folder


def cells(text: str, title: str, column: int) -> list[str]:
    """One column of every table row of this title, in whichever tables are wide enough."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {title} |")]
    return [row[column] for row in rows if column < len(row)]


def test_the_table_is_made_from_the_results_alone(results):
    text = report.table(report.read_results(results), limit=1.2)
    assert cells(text, "full method", 1)[0] == "**92 (88 to 96)**"
    assert cells(text, "w/o cycle", 5)[0] == "40"
    assert cells(text, "copy the source", 11)[0] == "-"
    # 1, 2 and 3 minutes of one core.
    assert cells(text, "full method", 11)[0] == "1.0 (0.5 to 1.5) **over**"
    assert "Rows are not comparable" not in text


def test_the_table_compares_at_equal_edit_rate_and_names_what_was_reached(results):
    text = report.table(report.read_results(results), limit=5)
    assert cells(text, "w/o cycle", 1)[1] == "up 8.98, down 7.23"
    assert cells(text, "w/o cycle", 2)[1] == "unclear: +0"
    assert cells(text, "w/o cycle", 3)[1] == "down: -60"
    assert cells(text, "w/o cycle", 4)[1] == "-60 at 92 (88 to 96) % edits"
    assert cells(text, "w/o prior", 4)[1] == "curves do not overlap"
    reached = [line for line in text.splitlines() if line.endswith(("| yes |", "| **no** |"))]
    assert [line.endswith("| yes |") for line in reached] == [True, True, True, True]
    runs.write_json(results / "no_cycle-2.json", result("no_cycle", 2, (0.88, 1.0)))
    text = report.table(report.read_results(results), limit=5)
    assert any("without cycle" in line and line.endswith("| **no** |") for line in text.splitlines())


def test_the_table_compares_backgrounds_by_themselves(results):
    """A run that makes fewer edits in all, and as many of backgrounds."""
    for seed in range(3):
        for name, kept in (("full", 0.9), ("no_cycle", 0.5 + seed / 10)):
            record = result(name, seed, (0.92, 1.0))
            record["table"][report.BACKGROUND] = row(1.0, kept)
            runs.write_json(results / f"{name}-{seed}.json", record)
    text = report.table(report.read_results(results), limit=5)
    assert cells(text, "w/o cycle", 7)[1] == "+0, -30 (-40 to -20)"


def verdict(folder: Path, target: str) -> str:
    """`yes` or `**no**` of the target that begins so."""
    text = report.table(report.read_results(folder), limit=5)
    lines = text.partition("## What was to be shown")[2].splitlines()
    return next(line for line in lines if line.startswith(f"| {target}")).strip("| ").split(" | ")[-1]


def test_the_targets_are_those_that_were_set(results):
    """Each a little beyond its threshold, on one seed where every seed has to reach it."""
    for seed in range(3):
        runs.write_json(results / f"full-{seed}.json", result("full", seed, (0.92, 0.95)))
        runs.write_json(results / f"no_identity-{seed}.json", result("no_identity", seed, (0.95, 0.9)))
    assert verdict(results, "full method") == "**no**"  # joint 87 %
    assert verdict(results, "without prior") == "yes"
    runs.write_json(results / "no_prior-1.json", result("no_prior", 1, (0.06, 1.0)))
    assert verdict(results, "without prior") == "**no**"
    assert verdict(results, "without identity steps") == "yes"
    runs.write_json(results / "no_identity-1.json", result("no_identity", 1, (0.9, 0.9)))
    assert verdict(results, "without identity steps") == "**no**"
    assert verdict(results, "without bootstrapping") == "**no**"  # one seed edits more
    runs.write_json(results / "no_bootstrap-1.json", result("no_bootstrap", 1, (0.9, 0.9)))
    assert verdict(results, "without bootstrapping") == "yes"


def test_a_row_of_fewer_seeds_than_the_study_says_so_wherever_it_stands(results):
    for seed in (1, 2):
        (results / f"no_cycle-{seed}.json").unlink()
    text = report.table(report.read_results(results), limit=5)
    assert len(cells(text, "w/o cycle (seed 0 alone)", 1)) == 2 and not cells(text, "w/o cycle", 1)
    assert verdict(results, "without cycle") == "so far (seed 0 alone)"
    (results / "full-2.json").unlink()  # the reference too may lack a seed that others have
    text = report.table(report.read_results(results), limit=5)
    assert len(cells(text, "full method (seed 0, 1 alone)", 1)) == 1
    assert cells(text, "copy the source", 1) == ["**0**"]  # not trained: the same for every seed


def test_a_base_is_named_by_what_it_computes_with(tmp_path):
    (tmp_path / "vae").mkdir()
    for name in ("figures.json", "history.json", "vae/config.json"):
        (tmp_path / name).write_text("{}")
    before = runs.base_digest(tmp_path)
    (tmp_path / "history.json").write_text('{"about": "other words"}')
    assert runs.base_digest(tmp_path) == before
    (tmp_path / "vae" / "config.json").write_text('{"scaling_factor": 2}')
    assert runs.base_digest(tmp_path) != before


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ([0.1, 0.2], "up"),
        ([-0.1, -0.2], "down"),
        ([-0.1, 0.2], "unclear"),
        ([0.0, 0.2], "unclear"),
        ([-0.1, 0.0], "unclear"),
        ([], "unclear"),
    ],
)
def test_a_direction_is_what_every_seed_says(changes, word):
    assert report.direction(changes) == word


def test_a_mean_over_the_shared_range_names_the_seeds_it_lacks(results):
    low = result("no_cycle", 2, (0.04, 1.0))
    runs.write_json(results / "no_cycle-2.json", low)
    text = report.table(report.read_results(results), limit=5)
    assert cells(text, "w/o cycle", 6)[1].endswith("; 1 of 3 seeds do not overlap")


def test_the_page_says_on_how_many_edits_curves_are_measured(results):
    record = result("full", 0, (0.9, 1.0))
    for point in record["curve"]:
        point["table"]["all"]["n"] = 4
    assert "measured on 4 of the held-out edits" in report.table({"full": {0: record}}, limit=5)


def test_all_runs_on_six_types_have_their_table_and_what_lacks_is_named(results):
    kept = report.read_results(results)
    assert "six_full" in kept and report.six_names(kept) == ["six_full"]
    lacking = "**Not measured yet: six_truth; copy the source; six_base; six_paired_steps; six_paired_time.**"
    assert lacking in report.table(kept, limit=5)
    tried = result("six_full+alpha2", 0, (0.7, 0.5)) | {"title": "full method, alpha2"}
    runs.write_json(results / "six_full+alpha2-0.json", tried)
    for name in ("six_truth", "six_base", "six_copy", "six_paired_steps", "six_paired_time"):
        runs.write_json(results / f"{name}-0.json", result(name, 0, (0.7, 0.5)))
    text = report.table(report.read_results(results), limit=5)
    assert cells(text, "full method, alpha2 (seed 0 alone)", 3) == ["70"] * 3  # all, and both kinds; in no other table
    lacking = (f"{title} (seed 1, 2)" for title in ("base, target caption", "paired, equal steps", "paired, equal time"))
    assert f"**Not measured yet: {'; '.join(lacking)}.**" in text


def test_every_row_of_the_study_has_a_look_of_its_own():
    assert (
        set(report.STYLES)
        == set(report.ORDER) - {"truth", "copy", "base"}
        == set(report.ORDER) & {name for name, run in study.RUNS.items() if run.kind == "train"}
    )
    assert len({style["marker"] for style in report.STYLES.values()}) == len(report.STYLES)


def test_every_run_that_has_a_curve_is_drawn(results):
    for name in ("full+lr2", "no_cycle+lr2"):
        runs.write_json(results / f"{name}-0.json", result(name, 0, (0.5, 0.5)))
    kept = report.read_results(results)
    kept["new_row"] = kept["full+lr2"]
    drawn = report.styles(kept)
    assert set(drawn) == {"full", "no_cycle", "no_prior", "no_bootstrap", "full+lr2", "no_cycle+lr2", "new_row"}
    assert len({style["marker"] for style in drawn.values()}) == len(drawn)
    assert len({style["color"] for style in drawn.values()}) == len(drawn)


def test_rows_of_another_base_are_not_passed_off_as_comparable(results):
    runs.write_json(results / "no_cycle-1.json", result("no_cycle", 1, (0.9, 0.4), base="other"))
    assert "differ in the base" in report.table(report.read_results(results), limit=5)


def test_the_plot_is_drawn_and_needs_a_curve(results, tmp_path):
    assert report.plot(report.read_results(results), tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").size[0] > 1000
    assert not report.plot({"copy": report.read_results(results)["copy"]}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# --- one run ---


def test_edits_are_those_of_the_edit_pipeline(tmp_path):
    """With a LoRA that is awake, same noise, same batch: the same pictures; merged weights round otherwise than a LoRA."""
    plan = small(tmp_path).plan("full", 0)
    host = make_host(plan.config, make_family(plan.config), runs.CPU)
    wake(host)
    with host.ema() as velocity:
        mine = runs.Evaluator(plan.config, plan.eval_edits).edit(velocity, 4)
    save_file(host.export_lora(host.ema_weights.state()), tmp_path / "lora.safetensors", LoraCard.of(plan.config, 1, "ema").to_metadata())
    pipe = EditPipeline.from_lora(tmp_path / "lora.safetensors", config=plan.config)
    pictures = [Image.fromarray(world.render(edit.before)) for edit in plan.eval_edits]
    theirs = pipe.batch(pictures, [edit.instruction for edit in plan.eval_edits], seeds=range(4))
    for edit, (_, image) in zip(plan.eval_edits, theirs, strict=True):
        apart = np.abs(mine[edit.id].astype(int) - np.asarray(image))
        assert apart.max() <= 1 and apart.mean() < 0.01
    assert len({image.tobytes() for image in mine.values()}) == 4


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
