"""The demo from end to end, a few steps of it: plumbing, not learning."""

import json

import pytest
import torch

from byg_plugin.demo import commands
from byg_plugin.demo.__main__ import BASE, run_demo
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.files import read_metadata
from tests.support.demo_runs import commands_here
from tests.support.tiny import FEW_STEPS


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(out, FEW_STEPS, train_tuples=12, eval_tuples=4)


def test_every_method_is_in_the_table(demo):
    out, tables = demo
    assert json.loads((out / "figures.json").read_text(encoding="utf-8")) == tables
    assert tables["ground truth"]["all"]["joint"] == 1.0
    assert tables["copy the source"]["all"]["edit"] == 0.0
    assert tables["edited without pairs"]["all"]["n"] == 4


def test_pictures_and_lora_are_there(demo):
    out, _ = demo
    assert (out / "contact_sheet.png").stat().st_size > 5000
    assert (out / "training" / "demo-ema.safetensors").is_file()
    assert len(list((out / "edits").glob("*.png"))) == 8
    steps = [json.loads(line)["step"] for line in (out / "training" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert steps == [1, 2, 3]


def test_it_ends_with_the_page_of_every_edit(demo):
    out, _ = demo
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 4 and all(f">{column}<" in page for column in ("read_directional", "error_outside"))
    rows = [json.loads(line) for line in (out / "scores" / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    known = {row["metric"]: row["scores"] for row in rows if row["id"] == rows[0]["id"]}
    assert set(known) == {"read", "error"} and None not in {*known["read"].values(), *known["error"].values()}


def test_a_second_run_trains_nothing(demo):
    out, tables = demo
    before = (out / "training" / "demo-ema.safetensors").stat().st_mtime_ns
    with commands_here():
        again = run_demo(out, FEW_STEPS, train_tuples=12, eval_tuples=4)
    assert again.keys() == tables.keys()
    for method, table in again.items():
        assert table["all"] == pytest.approx(tables[method]["all"], abs=2e-3)  # another process may round otherwise
    assert (out / "training" / "demo-ema.safetensors").stat().st_mtime_ns == before


def test_other_settings_are_not_shown_as_these(demo):
    out, _ = demo
    with pytest.raises(ValueError, match="was trained with other settings"):
        run_demo(out, [*FEW_STEPS, "train.lr=0.01"], train_tuples=12, eval_tuples=4)


def test_the_other_objective_edits_in_four_steps(tmp_path):
    """One step of copying, one of the fake score, one of the editor; its critic is the one beside the base."""
    few = ["train.steps=3", "train.log_every=1", "train.save_every=3", "objective.identity_warmup_steps=1", "objective.fake_updates=1"]
    few += ["dataset.validation_items=2", "sample.every=0", "train.global_batch_size=2", "train.batch_size=2"]
    with commands_here():
        tables = run_demo(tmp_path, few, train_tuples=6, eval_tuples=2, objective="np_edit")
    assert tables["edited without pairs"]["all"]["n"] == 2
    lines = [json.loads(line) for line in (tmp_path / "training" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{"copy", "fake", "dmd", "vlm"} & set(line) for line in lines] == [{"copy"}, {"fake"}, {"dmd", "vlm"}]
    card = LoraCard.from_metadata(read_metadata(tmp_path / "training" / "demo-ema.safetensors"))
    assert (card.sampler, card.steps) == ("stochastic", 4)
    used = json.loads((tmp_path / "training" / "config.json").read_text(encoding="utf-8"))
    assert used["critic"]["path"] == str(BASE.parent / "critic")


@pytest.mark.parametrize(("overrides", "said"), [([], "asks a critic: set critic.path"), (['critic.path="/none"'], "/none")])
def test_a_critic_that_is_not_there_is_told_before_anything_is_made(tmp_path, overrides, said):
    with pytest.raises(ValueError, match=said):
        run_demo(tmp_path / "out", overrides, base=tmp_path / "base", objective="np_edit")
    assert not (tmp_path / "out").exists()


def test_the_critic_beside_the_base_is_taken_where_none_is_named():
    assert commands.with_critic(BASE, ["train.steps=3"]) == [f"critic.path={json.dumps(str(BASE.parent / 'critic'))}", "train.steps=3"]
    assert commands.with_critic(BASE, ['critic.path="mine"']) == ['critic.path="mine"']


@pytest.mark.parametrize(("decay", "name"), [(0.0, "other.safetensors"), (0.99, "other-ema.safetensors")])
def test_no_ema_is_edited_with_the_live_weights(tmp_path, monkeypatch, decay, name):
    ran = []
    monkeypatch.setattr(commands, "run", lambda *words: ran.append(words))
    overrides = [*FEW_STEPS, f"objective.ema_decay={decay}", "output.name=other"]
    commands.cache_train_edit(tmp_path, "demo.toml", BASE, overrides, [])
    assert [words[1] for words in ran] == [
        f"byg_plugin.{one}" for one in ("cache_latents", "cache_text_encoder_outputs", "train_network", "edit")
    ]
    assert ran[-1][ran[-1].index("--lora") + 1] == tmp_path / "training" / name


@pytest.mark.parametrize(
    ("bfloat16", "options"), [(0.2, []), (1.1, ['train.mixed_precision="no"']), (30.0, ['train.mixed_precision="no"'])]
)
def test_a_cpu_without_bfloat16_trains_in_float32(tmp_path, monkeypatch, capsys, bfloat16, options):
    monkeypatch.setattr(commands, "_seconds_of_product", {torch.bfloat16: bfloat16, torch.float32: 1.0}.__getitem__)
    assert commands._precision([], tmp_path / "none.json") == options
    assert ("float32" in capsys.readouterr().out) == bool(options)
    assert commands._precision(['train.mixed_precision="bf16"'], tmp_path / "none.json") == []
