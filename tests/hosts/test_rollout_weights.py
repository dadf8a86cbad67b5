"""`objective.rollout_weights = "merged"`: the same step with the rollout's LoRA multiplied into linears of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin.config.sections import Config
from byg_plugin.hosts.diffusers import DiffusersHost, _is_lora_layer
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Metrics
from byg_plugin.training.memory import memory_sum
from tests.support.diffusers_host import (
    backward,
    base_of,
    batch_of,
    ema_of,
    gradients,
    host_config,
    live_of,
    relative_difference,
    without_lora,
)
from tests.support.tiny import curve, make_host, make_trainer, run_config, tiny_flux, wake

PLAIN: dict[str, Any] = {"rollout_weights": "swap", "frozen_batch": 1, "merge_identity": False}


def lora_layers_in_place(host: DiffusersHost) -> int:
    return sum(_is_lora_layer(module) for network in host.networks.values() for module in network.modules())


def merged_host(tmp_path: Path, **objective: Any) -> DiffusersHost:
    return make_host(host_config(tmp_path, objective={"rollout_weights": "merged"} | objective))


def step(host: DiffusersHost) -> tuple[Metrics, dict[str, Tensor]]:
    metrics = make_objective(host.config.objective).step(host, batch_of(), backward)
    return metrics, gradients(host)


def expected_weights(host: DiffusersHost, ema: bool) -> list[Tensor]:
    """W + scale B A in float64, from the frozen weights and the host's own LoRA."""
    lora = host.ema_weights.state() if ema else host.parameters
    found = []
    for name, layer in ((n, m) for n, m in host.networks["transformer"].named_modules() if _is_lora_layer(m)):
        a, b = (lora[f"transformer.{name}.lora_{side}.weight"].detach().double() for side in "AB")
        found.append(layer.base_layer.weight.double() + layer.scaling["byg"] * b @ a)
    return found


# --- what is computed ---


@pytest.mark.parametrize("decay", [0.9, 0.0])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"rollout_weights": "merged"},
        {"frozen_batch": 4},
        {"merge_identity": True},
        {"rollout_weights": "merged", "frozen_batch": 4, "merge_identity": True},
    ],
    ids=["merged", "frozen at once", "identity beside", "all"],
)
def test_every_cheaper_way_gives_the_same_losses_and_gradients(tmp_path: Path, options: dict[str, Any], decay: float, checkpointing: bool):
    def of(objective: dict[str, Any]) -> tuple[Metrics, dict[str, Tensor]]:
        sections = {"model": {"gradient_checkpointing": checkpointing}, "objective": {"ema_decay": decay} | objective}
        return step(make_host(host_config(tmp_path, **sections)))

    (metrics, found), (wanted_metrics, wanted) = of(PLAIN | options), of(PLAIN)
    assert relative_difference(found, wanted) <= 1e-5
    assert metrics.keys() == wanted_metrics.keys()
    for name in metrics:
        torch.testing.assert_close(metrics[name], wanted_metrics[name], rtol=1e-5, atol=1e-7)


def test_the_comparison_would_see_another_rollout(tmp_path: Path):
    """Weights of the rollout that are off by a thousandth fail the test above."""
    host = merged_host(tmp_path)
    wanted = step(host)[1]
    host.ema_weights.load({name: value * 1.001 for name, value in host.ema_weights.state().items()})
    assert relative_difference(step(host)[1], wanted) > 1e-4


def test_16_bit_rollouts_differ_by_no_more_than_16_bit_itself(tmp_path: Path):
    batch = batch_of()
    exact = ema_of(make_host(host_config(tmp_path)), batch)
    half = {"model": {"dtype": "bfloat16"}, "train": {"mixed_precision": "bf16"}}

    def error(kind: str) -> float:
        velocity = ema_of(make_host(host_config(tmp_path, objective={"rollout_weights": kind}, **half)), batch)
        return ((velocity - exact).norm() / exact.norm()).item()

    assert 0 < error("merged") < 1.5 * error("swap")


# --- inference mode ---


@pytest.mark.parametrize("options", [{}, {"graph": "joint"}, {"routing": False}, {"bootstrap": False}, {"merge_identity": True}], ids=str)
def test_nothing_made_in_inference_mode_reaches_autograd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]):
    """A network whose first layer saves its input for the backward, as one with a LoRA there does, would raise."""
    host, batch = make_host(host_config(tmp_path, objective=options)), batch_of()
    original, seen = host._velocity, []

    def watched(noisy: Tensor, *inputs: Any) -> Tensor:
        seen.append((torch.is_inference_mode_enabled(), noisy.is_inference()))
        return original(noisy, *inputs)

    monkeypatch.setattr(host, "_velocity", watched)
    make_objective(host.config.objective).step(host, batch, backward)
    assert (True, True) in seen, "the rollout runs in inference mode"
    assert {made for inside, made in seen if not inside} == {False}
    monkeypatch.undo()
    inference = gradients(host)
    monkeypatch.setattr(host, "_without_gradient", torch.no_grad)
    make_objective(host.config.objective).step(host, batch, backward)
    plain = gradients(host)
    assert all(torch.equal(inference[name], plain[name]) for name in plain)


@pytest.mark.parametrize(("storage", "inference"), [("none", True), ("fp8", True), ("int8", False), ("nf4", False)])
def test_linears_that_keep_state_of_their_calls_run_without_inference_mode(tmp_path: Path, storage: str, inference: bool):
    host = make_host(host_config(tmp_path))
    host.config = host_config(tmp_path, model={"quantization": storage, "dtype": "bfloat16"})
    for field in (host.ema, host.base):
        with field():
            assert torch.is_inference_mode_enabled() == inference and not torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


# --- where the weights come from ---


def test_the_rollout_runs_without_a_lora_layer_and_edit_with_all(tmp_path: Path):
    host, batch = merged_host(tmp_path), batch_of()
    every = lora_layers_in_place(host)
    assert every == len(host.parameters) // 2 > 0
    seen = []
    with host.ema() as velocity:
        seen.append(lora_layers_in_place(host))
        velocity(batch.noise, batch.t, batch.instruction, batch.source)
    with host.base():
        seen.append(lora_layers_in_place(host))
    with host.edit():
        seen.append(lora_layers_in_place(host))
    assert seen == [0, 0, every]


def moved_live(host: DiffusersHost) -> None:
    rng = torch.Generator().manual_seed(91)
    for parameter in host.parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=rng)


def optimizer_step(host: DiffusersHost) -> None:
    make_objective(host.config.objective).step(host, batch_of(), backward)
    torch.optim.AdamW(host.parameters.values(), lr=0.1).step()
    gradients(host)
    host.ema_weights.update(1)


def reloaded(host: DiffusersHost) -> None:
    host.load_lora({name: value * 1.5 for name, value in host.export_lora(host.parameters).items()})
    if host.ema_weights.decay:
        host.ema_weights.load({name: value * 1.5 for name, value in host.ema_weights.state().items()})


EVENTS: dict[str, Callable[[DiffusersHost], None]] = {
    "optimizer step and EMA update": optimizer_step,
    "load": reloaded,
    "strength": lambda host: host.set_strength(0.25),
    "other weights": lambda host: wake(host, seed=77),
}


@pytest.mark.parametrize("decay", [0.9, 0.0])
@pytest.mark.parametrize("event", EVENTS)
def test_the_merged_weights_follow(tmp_path: Path, event: str, decay: float):
    host, batch = merged_host(tmp_path, ema_decay=decay), batch_of()
    before = ema_of(host, batch)
    EVENTS[event](host)
    after = ema_of(host, batch)
    assert not torch.allclose(after, before, rtol=1e-3), "the event changes nothing"
    for merged, wanted in zip(host.merged.linears, expected_weights(host, ema=bool(decay)), strict=True):
        torch.testing.assert_close(merged.weight, wanted.float(), rtol=1e-6, atol=1e-6)
    host.config = host_config(tmp_path, objective={"rollout_weights": "swap", "ema_decay": decay})
    torch.testing.assert_close(ema_of(host, batch), after, rtol=1e-4, atol=1e-5)


def test_the_rollout_is_the_ema_and_not_the_live_weights(tmp_path: Path):
    host, batch = merged_host(tmp_path), batch_of()
    before = ema_of(host, batch)
    moved_live(host)
    assert torch.equal(ema_of(host, batch), before)


def test_merging_is_no_running_sum(tmp_path: Path):
    """Away and back again is the same to the last bit: weights that were added and subtracted would have drifted."""
    host, batch = merged_host(tmp_path), batch_of()
    frozen = [layer.base_layer.weight.clone() for layer in host._lora_layers]
    first = ema_of(host, batch)
    for strength in (1000.0, 1e-3, 1.0):
        host.set_strength(strength)
        again = ema_of(host, batch)
    assert torch.equal(again, first)
    assert all(torch.equal(layer.base_layer.weight, weight) for layer, weight in zip(host._lora_layers, frozen, strict=True))


# --- what is left behind ---


@pytest.mark.parametrize("kind", ["swap", "merged"])
@pytest.mark.parametrize("phase", ["ema", "base", "edit"])
def test_an_exception_leaves_modules_weights_and_flags(tmp_path: Path, kind: str, phase: str):
    host, batch = make_host(host_config(tmp_path, objective={"rollout_weights": kind}, lora={"dropout": 0.3})), batch_of()
    fields = (base_of, live_of, ema_of)
    before = [f(host, batch) for f in fields]
    modules = dict(host.networks["transformer"].named_modules())
    weights = {name: (p.data_ptr(), p.detach().clone()) for name, p in host.parameters.items()}
    with pytest.raises(RuntimeError, match="inside"), getattr(host, phase)():
        raise RuntimeError("inside")
    after = dict(host.networks["transformer"].named_modules())
    assert after.keys() == modules.keys() and all(after[name] is modules[name] for name in modules)
    assert all(p.requires_grad and p.data_ptr() == weights[n][0] and torch.equal(p, weights[n][1]) for n, p in host.parameters.items())
    assert torch.is_grad_enabled() and not any(module.training for module in host._dropouts)
    for f, wanted in zip(fields, before, strict=True):
        assert torch.equal(f(host, batch), wanted)


def test_an_exception_while_merging_leaves_the_live_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    host, batch = merged_host(tmp_path), batch_of()
    before = live_of(host, batch)

    def out_of_memory(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("no room for a copy")

    monkeypatch.setattr(torch, "addmm", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError), host.ema():
        pass
    monkeypatch.undo()
    assert torch.equal(live_of(host, batch), before)


@pytest.mark.parametrize("kind", ["swap", "merged"])
def test_contexts_inside_each_other(tmp_path: Path, kind: str):
    host, batch = make_host(host_config(tmp_path, objective={"rollout_weights": kind})), batch_of()
    base, live, ema = without_lora(batch), live_of(host, batch), ema_of(host, batch)
    assert not torch.equal(base, live) and not torch.equal(ema, live)
    with host.edit(), host.ema():
        with host.base() as velocity:
            assert torch.equal(velocity(batch.noise, batch.t, batch.src_caption, None), base)
        with host.live() as velocity:
            assert torch.equal(velocity(batch.noise, batch.t, batch.src_caption, None), ema)
    assert torch.equal(live_of(host, batch), live)


def test_the_lora_file_and_the_trained_parameters_know_nothing_of_the_copy(tmp_path: Path):
    host = merged_host(tmp_path)
    names = list(host.parameters)
    step(host)
    assert list(host.parameters) == names == list(host._named_lora_parameters())
    copies = {id(linear.weight) for linear in host.merged.linears}
    assert copies and not copies & {id(p) for p in host.networks["transformer"].parameters()}
    assert not any(linear.weight.requires_grad for linear in host.merged.linears)


def test_a_run_that_only_edits_holds_no_copy(tmp_path: Path):
    host = merged_host(tmp_path)
    live_of(host, batch_of())
    assert not host.merged.linears


def test_resumed_is_the_uninterrupted_run(tmp_path: Path):
    def config(out: str, **objective: Any) -> Config:
        return run_config(tmp_path / out, objective={"rollout_weights": "merged"} | objective)

    make_trainer(config("whole")).run()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000006")
    make_trainer(config("cut"), "latest").run()
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    make_trainer(config("swap", rollout_weights="swap")).run()
    for merged, swap in zip(curve(tmp_path / "whole"), curve(tmp_path / "swap"), strict=True):
        assert merged == pytest.approx(swap, rel=1e-3, abs=1e-5)


# --- where it is refused, and its memory ---


@pytest.mark.parametrize("storage", ["fp8", "int8", "nf4"])
def test_stored_bases_are_refused_with_the_reason(tmp_path: Path, storage: str):
    with pytest.raises(ValueError, match=f"rollout_weights = 'merged'.*'{storage}' would round.*'swap'"):
        host_config(tmp_path, model={"quantization": storage, "dtype": "bfloat16"}, objective={"rollout_weights": "merged"})


def test_the_memory_sum_has_the_copy(tmp_path: Path):
    def bytes_of(objective: dict[str, Any], dtype: str = "float32") -> float:
        config = host_config(tmp_path, model={"dtype": dtype}, objective=objective)
        shapes = [(4, 32), (96, 4), (4, 16), (8, 4)]
        return sum(part.bytes for part in memory_sum(config, {"transformer": tiny_flux()}, shapes, tokens=100, width=32, blocks=4))

    merged = {"rollout_weights": "merged"}
    assert bytes_of(merged) - bytes_of({}) == 4 * (32 * 96 + 16 * 8)
    assert bytes_of(merged, "bfloat16") - bytes_of({}, "bfloat16") == 2 * (32 * 96 + 16 * 8)
