"""Runs of NP-Edit: two adapters by turns, killed and resumed, on two processes; what is saved and what is refused."""

from __future__ import annotations

import logging
import shutil
import signal
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.files import read_lora
from byg_plugin.objectives.base import EDIT, FAKE
from byg_plugin.training import checkpoint, resume
from byg_plugin.training.diagnosis import MOST_LEFT_OUT
from byg_plugin.training.loop import VALIDATION_TIMES, Trainer
from tests.support.engine_runs import in_processes, sgd, use_optimizer, wake_up
from tests.support.np_edit_training import NP_EDIT, LatentCritic, np_config, np_trainer, np_workspace
from tests.support.tiny import curve, in_child, run_config
from tests.support.training_runs import assert_same_run, kill, killed_in_step

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("np-edit") / "out"
    np_trainer(np_config(out)).run()
    return out


def kinds(config: Any) -> list[str]:
    plan = np_trainer(config).objective.plan
    return [plan(step, config.train.seed).kind for step in range(config.train.steps)]


def weights(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name, adapter in trainer.host.adapters.items():
        found[name] = {key: value.detach().clone() for key, value in adapter.parameters.items()}
        if adapter.ema.decay:
            found[name] |= {f"ema/{key}": value.clone() for key, value in adapter.ema.state().items()}
    return found


def test_each_step_moves_its_adapter_alone_and_the_base_never(tmp_path: Path):
    critic = LatentCritic()
    trainer = np_trainer(np_config(tmp_path / "out"), critic=critic)
    wake_up(trainer, {"resume": None})
    base = {name: p.clone() for name, p in trainer.host.networks["transformer"].named_parameters() if ".lora_" not in name}
    seen = [weights(trainer)]
    trainer.on_step = lambda it: seen.append(weights(it))
    trainer.run()
    plans = [trainer.objective.plan(step, 0) for step in range(10)]
    assert {plan.kind.partition("-")[0] for plan in plans} == {"copy", "fake", "full", "identity"}, "every kind is in this run"
    for step, (one, other) in enumerate(zip(seen, seen[1:], strict=False)):
        moved = {name for name in one if any(not torch.equal(one[name][key], other[name][key]) for key in one[name])}
        assert moved == set(plans[step].adapters), f"step {step}, {plans[step].kind}"
        if moved == {EDIT}:
            assert all(not torch.equal(one[EDIT][key], other[EDIT][key]) for key in one[EDIT]), "the average follows"
    found = dict(trainer.host.networks["transformer"].named_parameters())
    assert all(torch.equal(value, found[name]) for name, value in base.items())
    lines = curve(tmp_path / "out")
    assert [bool(line["grad_norm/fake"]) for line in lines] == [FAKE in plan.adapters for plan in plans]
    assert [bool(line["grad_norm"]) for line in lines] == [EDIT in plan.adapters for plan in plans]
    assert [bool(line["identity_step"]) for line in lines] == [plan.kind.startswith("identity") for plan in plans]
    judged = [line for line, plan in zip(lines, plans, strict=True) if plan.kind.startswith("full")]
    assert judged and all({"vlm", "dmd", "yes"} <= line.keys() for line in judged)


def test_the_critic_hears_the_words_and_how_far_the_editor_is(tmp_path: Path):
    critic = LatentCritic()
    config = np_config(tmp_path / "out", objective={"identity_probability": 0.0}, train={"batch_size": 1, "global_batch_size": 2})
    np_trainer(config, critic=critic).run()
    # The copying step was the first update; two micro-steps each.
    assert critic.updates == [1, 1, 2, 2, 3, 3]
    assert all(words.startswith("add the ") for words in critic.words)


def test_the_student_alone_is_the_product(whole: Path):
    tensors, metadata = read_lora(whole / "byg_lora-ema.safetensors")
    assert not [name for name in tensors if FAKE in name]
    saved = load_file(whole / "checkpoints/step-000010" / checkpoint.TENSORS)
    groups = {"/".join(name.split("/")[:2]) for name in saved}
    assert groups == {"edit/lora", "edit/ema", "edit/optimizer", "fake/lora", "fake/optimizer"}
    assert saved["edit/optimizer/0/step"] == 4 and saved["fake/optimizer/0/step"] == 6
    card = LoraCard.from_metadata(metadata)
    assert (card.sampler, card.steps, card.schedule) == ("stochastic", 4, "shifted")


# --- kill -9 and resume ---


def killed_after_backward(trainer: Trainer, step: int) -> None:
    """Between the two calls of an unroll, or before the only one's optimizer."""
    original = trainer.engine.backward

    def hook(loss: Tensor, *, last: bool) -> float:
        scale = original(loss, last=last)
        if trainer.step == step:
            kill()
        return scale

    trainer.engine.backward = hook  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("moment", "step"), [(killed_in_step, 4), (killed_in_step, 6), (killed_after_backward, 3), (killed_after_backward, 9)]
)
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path: Path, whole: Path, moment: Any, step: int):
    config = np_config(tmp_path / "out")

    def work() -> None:
        trainer = np_trainer(config)
        moment(trainer, step)
        trainer.run()

    assert in_child(work) == -signal.SIGKILL
    np_trainer(config, "latest").run()
    assert_same_run(tmp_path / "out", whole)
    new, reference = (load_file(out / "checkpoints/step-000010" / checkpoint.TENSORS) for out in (tmp_path / "out", whole))
    assert new.keys() == reference.keys() and all(torch.equal(value, reference[name]) for name, value in new.items())


def test_a_resumed_run_depends_on_the_fake_score(tmp_path: Path, whole: Path):
    """The comparison above would see a fake score that is lost."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    for step in (8, 10):
        shutil.rmtree(out / f"checkpoints/step-{step:06d}")
    path = out / "checkpoints/step-000006" / checkpoint.TENSORS
    tensors = load_file(path)
    save_file({name: torch.zeros_like(v) if name.startswith("fake/lora") else v for name, v in tensors.items()}, path)
    np_trainer(np_config(out), "latest").run()
    new, reference = (load_file(each / "checkpoints/step-000010" / checkpoint.TENSORS) for each in (out, whole))
    assert not all(torch.equal(new[name], reference[name]) for name in new if name.startswith("edit/lora"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("fake/lora")], r"fake/lora/.* is missing"),
        (lambda t: t["fake/optimizer/0/step"].fill_(4), "has counted other steps than the run's 6"),
        (lambda t: t.update({"fake/ema/x": torch.zeros(1)}), "fake/ema/x is not part of this run"),
    ],
)
def test_damage_of_the_fake_score_is_named(tmp_path: Path, whole: Path, change: Any, message: str):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    path = out / "checkpoints/step-000010" / checkpoint.TENSORS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        np_trainer(np_config(out), "latest")


def test_whose_turn_a_step_is_stays_as_it_was(tmp_path: Path, whole: Path):
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    for key, value in (("dmd", False), ("fake_updates", 3), ("identity_warmup_steps", 4)):
        with pytest.raises(ValueError, match=rf"10 steps trained what other values of objective.{key}: .* -> {value} would not have; set"):
            np_trainer(np_config(out, objective={key: value}), "latest")


def test_a_rhythm_that_changes_no_step_so_far_may_change(tmp_path: Path):
    """A longer warm-up within it, and keys that are without effect."""
    copied = np_config(tmp_path / "out", objective={"identity_warmup_steps": 4})
    saved = checkpoint.TrainingState(step=3, adapters={}, config=copied.model_dump(mode="json"), data="")
    resume._check_rhythm(np_config(tmp_path / "out", objective={"identity_warmup_steps": 5}), saved)
    with pytest.raises(ValueError, match="identity_warmup_steps: 4 -> 2 would not have"):
        resume._check_rhythm(np_config(tmp_path / "out", objective={"identity_warmup_steps": 2}), saved)
    alone = {"dmd": False, "fake_updates": 2}
    saved.config["objective"] |= alone
    saved = replace(saved, step=100)
    resume._check_rhythm(np_config(tmp_path / "out", objective=alone | {"identity_warmup_steps": 3, "fake_updates": 3}), saved)


def test_another_adapter_in_the_warm_up_is_no_damage(tmp_path: Path):
    copied = np_config(tmp_path / "out", objective={"identity_warmup_steps": 5})
    saved = checkpoint.TrainingState(step=3, adapters={}, config=copied.model_dump(mode="json"), data="")
    with pytest.raises(ValueError, match="3 steps trained what other values of objective.dmd: True -> False would not have; set"):
        resume._check_rhythm(np_config(tmp_path / "out", objective={"dmd": False, "identity_warmup_steps": 5}), saved)


@pytest.mark.parametrize(("then", "now"), [({}, {"dmd": False, "lambda_dmd": 0.0}), ({"dmd": False}, {"vlm": False})])
def test_a_rhythm_that_the_runs_other_keys_refuse_is_no_damage(tmp_path: Path, then: dict[str, Any], now: dict[str, Any]):
    copied = np_config(tmp_path / "out", objective=then)
    saved = checkpoint.TrainingState(step=30, adapters={}, config=copied.model_dump(mode="json"), data="")
    with pytest.raises(ValueError, match="30 steps trained what other values of objective.dmd: .* would not have; set"):
        resume._check_rhythm(np_config(tmp_path / "out", objective=now), saved)


@pytest.mark.parametrize(("key", "value"), [("fake_updates", "five"), ("fake_updates", -1), ("identity_warmup_steps", None), ("dmd", [1])])
def test_a_damaged_rhythm_is_told_in_a_line(key: str, value: Any, tmp_path: Path):
    saved = checkpoint.TrainingState(step=3, adapters={}, config=np_config(tmp_path / "out").model_dump(mode="json"), data="")
    saved.config["objective"][key] = value
    with pytest.raises(ValueError, match="the checkpoint is damaged: its objective has"):
        resume._check_rhythm(np_config(tmp_path / "out"), saved)


# --- processes ---


def run_here(folder: str, cases: dict[str, dict[str, Any]]) -> None:
    """In one of the processes: each case by SGD, which hides no factor."""
    from accelerate import Accelerator

    from byg_plugin.config.loading import parse_config
    from byg_plugin.hosts.sharding import Sharding
    from byg_plugin.models import make_family
    from byg_plugin.training.launch import Launch

    accelerator = Accelerator(cpu=True)
    use_optimizer(sgd)
    for engine, raw in cases.items():
        config = parse_config(raw)
        launch = Launch(sharding=Sharding(kind="fsdp2")) if engine == "fsdp2" else None
        trainer = Trainer(config, make_family(config), accelerator, launch=launch, critique=LatentCritic())
        wake_up(trainer, {"resume": None})
        trainer.run()


def test_two_processes_train_the_weights_of_one_also_over_shards(tmp_path: Path):
    def made(name: str, **model: Any) -> dict[str, Any]:
        train = {"steps": 7, "global_batch_size": 4, "batch_size": 1, "save_every": 0, "lr": 0.1, "weight_decay": 0.0}
        objective = {"identity_warmup_steps": 1, "fake_updates": 1}
        return np_config(tmp_path / name, train=train, objective=objective, model={"gradient_checkpointing": True}).model_dump(mode="json")

    np_workspace()
    in_processes(1, partial(run_here, str(tmp_path), {"plain": made("one")}), tmp_path / "logs")
    in_processes(2, partial(run_here, str(tmp_path), {"plain": made("two"), "fsdp2": made("shards")}), tmp_path / "logs")
    one, *others = (load_file(tmp_path / name / "checkpoints/step-000007" / checkpoint.TENSORS) for name in ("one", "two", "shards"))
    for other in others:
        assert one.keys() == other.keys()
        assert max(float((one[name].float() - other[name].float()).abs().max()) for name in one) < 5e-6
    losses = [[line["loss"] for line in curve(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- starts, options, refusals ---


def test_it_starts_from_a_lora_of_the_unpaired_cycle(tmp_path: Path, reference: Path):
    start = reference / "byg_lora.safetensors"
    trainer = np_trainer(np_config(tmp_path / "out", lora={"init_from": str(start)}))
    saved, _ = read_lora(start)
    assert all(
        torch.equal(saved[name], value.detach()) for name, value in trainer.host.adapters[EDIT].parameters.items() if "lora_A" in name
    )
    assert not any(value.any() for name, value in trainer.host.adapters[FAKE].parameters.items() if "lora_B" in name), (
        "the fake is the base"
    )


def test_without_a_critic_it_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from accelerate import Accelerator

    from byg_plugin.models import make_family

    monkeypatch.setattr(DiffusersHost, "__init__", lambda *a, **k: pytest.fail("a model was loaded"))
    config = np_config(tmp_path / "out")
    with pytest.raises(ValueError, match="asks a critic: set critic.path"):
        Trainer(config, make_family(config), Accelerator(cpu=True))


def test_the_texts_that_no_tuple_has_are_asked_of_the_cache(tmp_path: Path):
    config = run_config(tmp_path / "out", objective=NP_EDIT)
    with pytest.raises(ValueError, match=r"2 of \d+ texts are not cached .*do nothing\."):
        np_trainer(config)


def test_validation_and_previews_by_the_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = np_config(
        tmp_path / "out", train={"steps": 4, "validate_every": 4}, dataset={"validation_items": 1}, sample={"every": 4, "items": 1}
    )
    assert (config.sample.solver, config.sample.steps) == ("stochastic", 4)
    critic = LatentCritic()
    trainer = np_trainer(config, critic=critic)
    trainer.run()
    assert trainer.validation is not None
    assert critic.updates.count(None) == len(trainer.validation) * len(VALIDATION_TIMES), "how far the editor is makes no difference"
    (line,) = curve(tmp_path / "out", "validation.jsonl")
    assert {"validation/loss", "validation/dmd", "validation/vlm", "validation/yes"} <= line.keys()
    assert (tmp_path / "out/previews/step-000004/000.png").is_file()


def test_a_gradient_beyond_the_limit_is_left_out_and_counted(tmp_path: Path):
    train = {"steps": 4, "skip_grad_norm": 1e-6, "max_grad_norm": 0.0}
    trainer = np_trainer(np_config(tmp_path / "out", train=train))
    before = weights(trainer)
    trainer.run()
    after = weights(trainer)
    assert all(torch.equal(before[a][key], after[a][key]) for a in before for key in before[a] if not key.startswith("ema/"))
    np_trainer(np_config(tmp_path / "out", train=train | {"steps": 6}), "latest").run()
    lines = curve(tmp_path / "out")
    assert all(line["grad_norm"] + line["grad_norm/fake"] > 1e-6 and line["left_out"] == 1 for line in lines)


def spoiled(trainer: Trainer, steps: set[int], value: float) -> None:
    """Gradients of these steps hold a number that is none, as a critic in 16 bit makes them; the losses are finite."""
    original = trainer.engine.backward

    def backward(loss: Tensor, *, last: bool) -> float:
        scale = original(loss, last=last)
        if last and trainer.step in steps:
            (name,) = trainer.objective.plan(trainer.step, 0).adapters
            gradient = next(p.grad for p in trainer.host.adapters[name].parameters.values() if p.grad is not None)
            gradient.view(-1)[0] = value
        return scale

    trainer.engine.backward = backward  # type: ignore[method-assign]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_left_out_where_some_are(tmp_path: Path, value: float):
    train = {"steps": 6, "skip_grad_norm": 1e6, "log_every": 1}
    trainer = np_trainer(np_config(tmp_path / "out", train=train))
    spoiled(trainer, {2, 3}, value)
    seen = [weights(trainer)]
    trainer.on_step = lambda it: seen.append(weights(it))
    trainer.run()
    adapters = [trainer.objective.plan(step, 0).adapters for step in range(6)]
    assert adapters[2:4] == [(FAKE,), (EDIT,)], "one of each"
    still = [all(torch.equal(one[a][k], two[a][k]) for a in one for k in one[a] if k[:4] != "ema/") for one, two in pairwise(seen)]
    assert still == [False, False, True, True, False, False]
    lines = curve(tmp_path / "out")
    assert [line["left_out"] for line in lines] == [0, 0, 1, 1, 0, 0]
    assert ["grad_norm/fake" in line for line in lines] == [True, True, False, True, True, True]
    assert ["grad_norm" in line for line in lines] == [True, True, True, False, True, True]


def test_a_log_line_counts_what_was_left_out_since_the_last_one(tmp_path: Path):
    trainer = np_trainer(np_config(tmp_path / "out", train={"steps": 6, "skip_grad_norm": 1e6, "log_every": 3}))
    spoiled(trainer, {1, 2, 3}, float("nan"))
    trainer.run()
    assert [(line["step"], line["left_out"]) for line in curve(tmp_path / "out")] == [(3, 2), (6, 1)]


def test_without_a_limit_a_gradient_that_is_not_finite_ends_the_run(tmp_path: Path):
    trainer = np_trainer(np_config(tmp_path / "out"))
    spoiled(trainer, {2}, float("nan"))
    with pytest.raises(FloatingPointError, match="gradient norm/fake is not finite at step 3; the weights were not changed"):
        trainer.run()


def test_ten_updates_of_one_adapter_left_out_in_a_row_end_the_run(tmp_path: Path):
    """The other adapter's updates between them do not help."""
    trainer = np_trainer(np_config(tmp_path / "out", train={"steps": 20, "skip_grad_norm": 1e6, "save_every": 0}))
    fake = [step for step in range(20) if trainer.objective.plan(step, 0).adapters == (FAKE,)]
    spoiled(trainer, {*fake}, float("nan"))
    last = fake[MOST_LEFT_OUT - 1] + 1
    message = f"skip_grad_norm = 1000000.0 has left out 10 updates of the adapter fake in a row, .* norm of nan at step {last}; the weights"
    with pytest.raises(FloatingPointError, match=message):
        trainer.run()
    assert len(curve(tmp_path / "out")) == last - 1


def test_the_edit_types_that_tuples_lack_are_said_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        np_trainer(np_config(tmp_path / "out"))
    assert "no tuple has edit_type = 'remove' (edit_type in dataset.tuples is never set)" in caplog.text
    assert "objective.strong_types = ['remove'," in caplog.text


def test_the_texts_beside_are_those_of_the_configuration(tmp_path: Path):
    config = np_config(tmp_path / "out", objective={"negative": "low quality, artifacts", "guidance": 3.0})
    with pytest.raises(ValueError, match=r"1 of \d+ texts are not cached .*low quality, artifacts"):
        np_trainer(config)
