"""The training loop on a tiny cached dataset: what a step is made of, and what ends a run."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import IDENTITY
from byg_plugin.randomness import coin, generator
from byg_plugin.training import loop
from tests.support.tiny import curve, make_trainer, run_config, wake
from tests.support.training_runs import assert_same_run


def test_a_loader_process_gives_the_same_run(tmp_path: Path, reference: Path):
    make_trainer(run_config(tmp_path / "out", dataset={"workers": 1})).run()
    assert_same_run(tmp_path / "out", reference)


def test_what_a_loader_process_sends_is_copied(tmp_path: Path):
    """Each of its tensors holds a file open: some hundred micro-batches a step would have more than a process may."""

    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, dict):
            return [one for each in value.values() for one in tensors(each)]
        return [value] if isinstance(value, torch.Tensor) else []

    trainer = make_trainer(run_config(tmp_path / "out", dataset={"workers": 1}))
    found = tensors(next(trainer._loader())[0])
    assert len(found) >= 9 and not any(tensor.is_shared() for tensor in found)


def test_an_optimizer_step_is_the_mean_over_its_micro_steps(tmp_path: Path):
    """Also through the reverse pass, whose gradient at y_0 must not be scaled twice."""
    settings = {
        "train": {"global_batch_size": 3, "max_grad_norm": 0.0},
        "objective": {"identity_warmup_steps": 0, "identity_probability": 0.0},
    }
    trainer = make_trainer(run_config(tmp_path / "out", **settings))
    assert trainer.accumulation == 3
    wake(trainer.host)
    micro_batches = next(trainer._loader())
    total = {name: torch.zeros_like(p) for name, p in trainer.host.parameters.items()}

    def plain(loss: torch.Tensor, *, last: bool) -> float:
        loss.backward()
        return 1.0

    for index, examples in enumerate(micro_batches):
        batch = trainer._batch(examples, generator(trainer.config.train.seed, "noise", index))
        trainer.objective.step(trainer.host, batch, plain)
        for name, parameter in trainer.host.parameters.items():
            assert parameter.grad is not None
            total[name] += parameter.grad / 3
            parameter.grad = None
    taken: dict[str, torch.Tensor] = {}

    def take(*args: Any) -> None:
        taken.update({name: p.grad.clone() for name, p in trainer.host.parameters.items() if p.grad is not None})

    trainer.engine.optimizers["edit"].step = take  # type: ignore[method-assign]
    metrics = trainer._optimizer_step(micro_batches)
    for name, wanted in total.items():
        torch.testing.assert_close(taken[name], wanted, rtol=1e-4, atol=1e-6)
    norm = torch.stack([wanted.norm() for wanted in total.values()]).norm()
    assert metrics["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)


def test_an_epoch_shows_every_tuple(tmp_path: Path):
    trainer = make_trainer(run_config(tmp_path / "out", train={"global_batch_size": 5, "steps": 3}))
    for group in trainer._loader():
        assert sorted(i for micro in group for i in micro["index"]) == [0, 1, 2, 3, 4]


def test_unwritable_output(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"output.dir = .*file.* is not writable"):
        make_trainer(run_config(tmp_path / "file" / "out"))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path, where: str):
    trainer = make_trainer(run_config(tmp_path / "out"))
    original = trainer.objective.step
    moments: list[Any] = []

    def broken(fields: Any, batch: Any, backward: Any) -> Any:
        if trainer.step < 3:
            return original(fields, batch, backward)
        moments[:] = [
            {n: p.detach().clone() for n, p in trainer.host.parameters.items()},
            [v["exp_avg"].clone() for v in trainer.engine.optimizers["edit"].state.values()],
            {n: v.clone() for n, v in trainer.host.ema_weights.state().items()},
        ]
        if where == "loss":
            return original(fields, batch, backward) | {"cycle": torch.tensor(float("nan"))}

        def infinite(loss: torch.Tensor, *, last: bool) -> float:
            return backward(loss * 1e38 * 1e10, last=last)

        return {k: v for k, v in original(fields, batch, infinite).items() if k == "identity"}

    trainer.objective.step = broken  # type: ignore[method-assign]
    term = {"loss": "cycle", "gradient": "gradient norm"}[where]
    with pytest.raises(FloatingPointError, match=f"{term} is not finite at step 4; the weights were not changed.*step-000002"):
        trainer.run()
    weights, exp_avg, ema = moments
    assert all(torch.equal(p, weights[n]) for n, p in trainer.host.parameters.items())
    assert all(torch.equal(a["exp_avg"], b) for a, b in zip(trainer.engine.optimizers["edit"].state.values(), exp_avg, strict=True))
    assert all(torch.equal(v, ema[n]) for n, v in trainer.host.ema_weights.state().items())
    assert [line["step"] for line in curve(tmp_path / "out")] == [1, 2, 3]


def test_identity_steps_follow_warm_up_and_coin(tmp_path: Path):
    config = run_config(tmp_path / "out", objective={"identity_warmup_steps": 3, "identity_probability": 0.5})
    objective = make_objective(config.objective)
    kinds = [objective.plan(step, 0).kind == IDENTITY for step in range(200)]
    assert all(kinds[:3])
    assert kinds[3:] == [coin(0, step, 0.5) for step in range(3, 200)]
    assert 0.4 < sum(kinds[3:]) / 197 < 0.6
    assert [objective.plan(step, 1).kind == IDENTITY for step in range(3, 200)] == [coin(1, step, 0.5) for step in range(3, 200)]
    never = make_objective(run_config(tmp_path / "never", objective={"identity_warmup_steps": 0, "identity_probability": 0.0}).objective)
    assert not any(never.plan(step, 0).kind == IDENTITY for step in range(50))


def test_paired_needs_targets(tmp_path: Path):
    with pytest.raises(ValueError, match="needs a `target`"):
        make_trainer(run_config(tmp_path / "out", objective={"name": "paired"}))


def test_what_does_not_fit_the_network_is_told_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    earlier = make_trainer(run_config(tmp_path / "earlier", train={"steps": 1})).run()
    monkeypatch.setattr(loop, "make_host", None)
    for lora, message in (
        ({"targets": "nothing"}, "lora.targets = 'nothing' matches no module"),
        ({"init_from": str(earlier), "rank": 8}, rf"lora.init_from = {re.escape(str(earlier))}: .* has shape \(4, \d+\) in the LoRA"),
        ({"init_from": str(earlier), "targets": r"transformer_blocks\.0\.attn\.to_q"}, r"lora.init_from = .* does not fit .* lora.targets"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(run_config(tmp_path / "out", lora=lora))


def test_what_is_mostly_a_mistake_is_said_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = run_config(tmp_path / "out", objective={"identity_warmup_steps": 6}, train={"steps": 6, "lr_warmup_steps": 6})
    with caplog.at_level(logging.WARNING):
        make_trainer(config)
    assert "objective.identity_warmup_steps = 6 makes all of train.steps = 6 identity steps: copying is trained, and no edit" in caplog.text
    assert "train.lr_warmup_steps = 6: in train.steps = 6 the rate never reaches train.lr" in caplog.text
    caplog.clear()
    make_trainer(run_config(tmp_path / "other", objective={"identity_warmup_steps": 5}, train={"steps": 6, "lr_warmup_steps": 5}))
    assert "makes all of" not in caplog.text and "never reaches" not in caplog.text


def test_types_of_edits_that_no_tuple_has_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"objective.prior_guidance: no tuple has edit_type = 'removal', so it would never be used; name"):
        make_trainer(run_config(tmp_path / "out", objective={"prior_guidance": {"removal": 3.0}}))
