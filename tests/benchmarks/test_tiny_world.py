"""The tiny-world study: its rows, stages and options."""

from __future__ import annotations

import json

import pytest

from benchmarks import demo_musubi
from benchmarks import tiny_world as study
from benchmarks import tiny_world_run as runs
from byg_plugin.config.loading import load_config
from byg_plugin.demo import world
from byg_plugin.objectives.np_edit import NpEdit
from tests.support import ROOT
from tests.support.tiny_world_study import small

pytestmark = pytest.mark.usefixtures("little_data")


@pytest.fixture
def whole(tmp_path) -> study.Study:
    return study.Study(study.parse(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]))


def differences(whole: study.Study, name: str, beside: str = "full") -> dict[str, object]:
    one, other = (runs.settings(whole.plan(run, 0)) for run in (beside, name))
    return {f"{s}.{k}": v for s, values in other.items() for k, v in values.items() if one[s].get(k) != v}


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


FLOAT32 = {"lora.forward": "merged", "train.mixed_precision": "no", "sample.steps": 4}
CRITIC = {"critic.dtype": "float32", "critic.gradient_checkpointing": False, "critic.image_size": 64, "critic.scale_steps": 200}


CHEAPER = {
    "lora.forward": "merged", "train.mixed_precision": "no", "train.steps": 4400, "train.save_every": 440, "train.batch_size": 2,
    "train.global_batch_size": 2, "train.lr": 4e-3, "objective.ema_decay": 0.99, "objective.identity_warmup_steps": 150,
    "objective.identity_rate": 0.25, "objective.merge_identity": True, "objective.rollout_schedule": "shifted",
    "objective.rollout_solver": "ab2",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "beside", "changed"),
    [
        ("fast_full", "full", CHEAPER),
        ("fast_no_routing", "fast_full", {"objective.routing": False}),
        ("fast_no_cycle", "fast_full", {"objective.cycle": False}),
        ("fast_no_directional", "fast_full", {"objective.directional": False}),
        ("fast_no_bootstrap", "fast_full", {"objective.bootstrap": False}),
        ("fast_no_prior", "fast_full", {"objective.prior": False}),
        ("fast_no_identity", "fast_full", {"objective.identity_probability": 0.0}),
        ("fast_paired_steps", "fast_full", {"objective.name": "paired"}),
        ("four_full", "full", FLOAT32),
        ("four_paired_steps", "four_full", {"objective.name": "paired"}),
        ("four_no_vlm", "four_np_edit", {key: runs.default_of(*key.split(".")) for key in CRITIC} | {"objective.vlm": False}),
        ("four_no_question", "four_np_edit", {"objective.identity_question": False}),
        ("three_full", "four_full", {}),
        ("three_guided", "three_full", {"objective.prior_guidance": {"remove": 3.0}}),
        ("three_critic", "three_full", CRITIC | {"objective.critique_types": ["remove"]}),
    ],
)
def test_a_row_of_a_group_changes_what_its_name_says_and_nothing_else(whole, name, beside, changed):
    assert differences(whole, name, beside) == changed


def test_without_matching_the_editor_makes_as_many_steps(whole):
    """All steps are the editor's then."""
    one, other = (whole.plan(name, 0).config for name in ("four_np_edit", "four_no_dmd"))
    assert differences(whole, "four_no_dmd", "four_np_edit").keys() <= {
        "objective.dmd",
        "train.steps",
        "train.save_every",
        "train.log_every",
    }
    of_editor = [
        sum(NpEdit(config.objective).plan(step, 0).adapters == ("edit",) for step in range(config.train.steps)) for config in (one, other)
    ]
    assert of_editor[0] == of_editor[1]


def test_a_rows_own_lengths_are_scaled_with_the_stage_and_given_ones_are_not(tmp_path):
    def steps(name: str, *words: str) -> tuple[int, int]:
        config = study.Study(study.parse(["--out", str(tmp_path), *words])).plan(name, 0).config
        return config.train.steps, config.objective.identity_warmup_steps

    whole, look = steps("four_np_edit"), steps("four_np_edit", "--steps", "0.02")
    assert whole == (study.COPIES + 3 * study.UPDATES, study.COPIES) and look == (round(0.02 * whole[0]), round(0.02 * whole[1]))
    assert steps("four_np_edit", "--stage", "screen")[0] == round(0.4 * whole[0])
    given = ("--only", "four_np_edit", "--try", "a", "--set", "train.steps=77", "--steps", "0.02")
    assert steps("four_np_edit", *given) == (77, look[1])


def test_a_row_names_the_critic_it_asked(whole, tmp_path):
    """Another one makes it stale; one that asks none has none."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name, encoding="utf-8")
    found = []
    for name in ("one", "two"):
        whole.options.set = [f'critic.path="{(tmp_path / name).as_posix()}"']
        plan = whole.plan("four_np_edit", 0)
        record = {"identity": runs.identity(plan), "config": runs.settings(plan)}
        found.append((record, plan))
    (first, plan), (second, other) = found
    assert runs.changes(first, plan) == [] and runs.changes(first, other) == ["another critic"]
    whole.options.set = []
    assert "critic" not in runs.identity(whole.plan("four_no_vlm", 0))
    whole.options.set = [f'critic.path="{(tmp_path / "none").as_posix()}"']
    with pytest.raises(ValueError, match=r"critic.path = .*none: no such critic; make one with python -m benchmarks.bases.critic"):
        runs.identity(whole.plan("four_np_edit", 0))


def test_every_row_has_a_valid_configuration_in_every_stage(tmp_path):
    for stage in study.STAGES:
        each = study.Study(study.parse(["--stage", stage, "--out", str(tmp_path)]))
        for name, seed in each.tasks():
            if not study.RUNS[name].as_long_as:
                plan = each.plan(name, seed)
                assert plan.config.train.seed == seed == plan.seed
                assert plan.config.train.steps > getattr(plan.config.objective, "identity_warmup_steps", 1) > 0


@pytest.mark.parametrize("name", ["full", "no_cycle", "paired_steps", "six_full"])
def test_the_committed_rows_have_the_settings_that_the_study_has_now(whole, name):
    """Or the documents' figures are of another recipe: make the study again (`--list` names what is stale)."""
    for seed in (0, 1, 2):
        record = runs.read_json(ROOT / f"benchmarks/results/tiny_world/report/{name}-{seed}.json")
        assert [found for found in runs.changes(record, whole.plan(name, seed)) if found != "another data"] == []  # `little_data`


def test_the_demo_of_np_edit_is_the_studys_row(whole, tmp_path):
    paths = [f'{key}="{tmp_path.as_posix()}"' for key in ("dataset.tuples", "dataset.cache_dir", "output.dir", "model.path")]
    demo = load_config(ROOT / "configs/demo_np_edit.toml", [*paths, f"critic.path={json.dumps(str(study.CRITIC))}"])
    row = whole.plan("four_np_edit", 0).config
    for section in ("conditioning", "objective", "critic", "lora"):
        assert getattr(demo, section) == getattr(row, section), section
    assert demo.model.model_copy(update={"path": row.model.path}) == row.model
    # A study previews nothing, holds nothing out and saves seldom; float32 is what the demo takes where bfloat16 is slow.
    other = {key: getattr(row.train, key) for key in ("mixed_precision", "save_every", "keep_last", "validate_every", "seed")}
    assert demo.train.model_copy(update=other) == row.train
    assert demo.sample.model_copy(update={"every": row.sample.every}) == row.sample
    other = {key: getattr(row.dataset, key) for key in ("tuples", "cache_dir", "validation_items")}
    assert demo.dataset.model_copy(update=other) == row.dataset


def test_the_demo_inside_musubi_tuner_has_the_objective_of_its_committed_figures(tmp_path):
    paths = [f'{key}="{tmp_path.as_posix()}"' for key in ("dataset.tuples", "dataset.cache_dir", "output.dir")]
    demo = load_config(ROOT / "configs/demo.toml", paths)
    now = demo_musubi.recipe(demo, tmp_path, None).objective.model_dump(mode="json")
    recorded = runs.read_json(demo_musubi.RESULT)["objective"]
    later = {key: value for key, value in now.items() if key not in recorded}  # options that there were not yet are off
    assert now == recorded | later and later == {key: runs.default_of("objective", key) for key in later}


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
