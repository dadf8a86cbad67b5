"""The objective against Algorithm 1 written by hand: losses, gradients, accumulation, two processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from byg_plugin.objectives.base import Backward, Batch, Metrics
from byg_plugin.training.engines.processes import average_gradients
from tests.support.objective_runs import EXACT, GRAPHS, VARIANTS, Loop, edit_calls, objective, transcription
from tests.support.toy_fields import ToyFields, numbers, relative_difference, toy_batch, toy_network


def run(options: dict[str, Any], batch: Batch, fields: ToyFields | None = None, factor: float = 1.0) -> tuple[Metrics, dict[str, Tensor]]:
    """Metrics and the LoRA gradients of one step, the loop's factor divided out."""
    fields = fields or ToyFields()
    metrics = objective(**options).step(fields, batch, Loop(fields, factor))
    return metrics, {name: value / factor for name, value in fields.gradients().items()}


# --- the toy is able to show a difference ---


def test_the_toy_is_able_to_show_a_difference(fields, batch):
    """Fresh LoRAs, equal t or dead inputs would let most tests below pass for the wrong reason."""
    assert all(fields.lora[name].abs().min() > 0 for name in fields.lora)
    assert len(batch.t.unique()) == len(batch.t)
    y_t = numbers(*batch.source.shape, seed="some y_t")

    def edit(noisy: Tensor = y_t, t: Tensor = batch.t, text: Any = batch.instruction, source: Tensor = batch.source) -> Tensor:
        return toy_network(fields.weights, fields.lora, noisy, t, text, source)

    reference_value = edit()
    others = {
        "noisy": edit(noisy=batch.noise),
        "t": edit(t=batch.t.roll(1)),
        "text": edit(text=batch.reverse_instruction),
        "source": edit(source=batch.noise),
        "ema": toy_network(fields.weights, fields.ema_lora, y_t, batch.t, batch.instruction, batch.source),
        "base": toy_network(fields.weights, None, y_t, batch.t, batch.instruction, batch.source),
    }
    for name, value in others.items():
        assert ((value - reference_value).flatten(1).norm(dim=1) > 1e-2).all(), f"the toy does not depend on {name}"
    base = [toy_network(fields.weights, None, y_t, batch.t, text, None) for text in (batch.src_caption, batch.tgt_caption)]
    assert ((base[1] - base[0]).flatten(1).norm(dim=1) > 1e-2).all()


def test_y_0_differs_from_the_one_step_prediction(fields, batch):
    objective(routing=True).step(fields, batch, Loop())
    forward, reverse = edit_calls(fields, batch)["forward"], edit_calls(fields, batch)["reverse"]
    y_hat = forward.noisy - batch.t.view(-1, 1, 1, 1, 1) * forward.value
    assert ((y_hat - reverse.source).flatten(1).norm(dim=1) > 1e-2).all()


# --- Algorithm 1 ---


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("current", [False, True], ids=["ema", "ema_decay 0"])
def test_losses_and_gradients_are_those_of_algorithm_1(variant, graph, current, batch):
    options, weights = VARIANTS[variant]
    fields = ToyFields(current=current)
    expected, expected_gradients = transcription(fields, batch, **weights)
    metrics, gradients = run(options | GRAPHS[graph], batch, fields)
    assert relative_difference(gradients, expected_gradients) <= EXACT
    for name in metrics.keys() & expected.keys():
        torch.testing.assert_close(metrics[name], expected[name], rtol=EXACT, atol=EXACT, msg=lambda m, name=name: f"{name}: {m}")
    assert {"loss"} <= metrics.keys() & expected.keys()


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("t", [(0.0, 0.01, 0.5), (0.99, 1.0, 0.2), (0.31,)], ids=str)
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_algorithm_1_holds_at_the_ends_of_t_and_for_every_rollout(t, steps, graph):
    batch, fields = toy_batch(t, steps=steps), ToyFields()
    expected, expected_gradients = transcription(fields, batch)
    metrics, gradients = run(GRAPHS[graph], batch, fields)
    assert relative_difference(gradients, expected_gradients) <= EXACT
    torch.testing.assert_close(metrics["loss"], expected["loss"], rtol=EXACT, atol=0)


def test_every_ablation_changes_the_gradient(batch):
    _, paper = run({}, batch)
    for variant, (_, weights) in VARIANTS.items():
        if weights:
            _, gradients = run(VARIANTS[variant][0], batch)
            assert relative_difference(gradients, paper) > 1e-3, variant


def test_gradients_are_finite_differences_of_the_loss_without_routing(batch):
    """Without routing the loss is an ordinary function of the live weights: no autograd is needed to know its slope."""
    fields = ToyFields()
    step = objective(routing=False)
    step.step(fields, batch, Loop())
    gradients = fields.gradients()
    direction = {name: numbers(*value.shape, seed=f"direction/{name}") for name, value in fields.lora.items()}
    h, losses = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            for name, value in fields.lora.items():
                value += sign * h * direction[name]
        losses.append(step.step(fields, batch, None)["loss"].item())
        with torch.no_grad():
            for name, value in fields.lora.items():
                value -= sign * h * direction[name]
    slope = sum((gradients[name] * direction[name]).sum().item() for name in gradients)
    assert abs(slope) > 1e-2
    assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(slope, rel=1e-7)


# --- sequential equals joint, however the loop scales ---


def accumulated(graph: dict[str, Any], backward_of: Callable[[ToyFields], Backward], fields: ToyFields) -> dict[str, Tensor]:
    for micro in range(3):
        backward = backward_of(fields)
        objective(**graph).step(fields, toy_batch((0.2 + 0.1 * micro, 0.9 - 0.2 * micro), seed=f"micro {micro}"), backward)
    return fields.gradients()


def accumulated_transcription(fields: ToyFields) -> dict[str, Tensor]:
    parts = [transcription(fields, toy_batch((0.2 + 0.1 * micro, 0.9 - 0.2 * micro), seed=f"micro {micro}"))[1] for micro in range(3)]
    return {name: (parts[0][name] + parts[1][name] + parts[2][name]) / 3 for name in parts[0]}


@pytest.mark.parametrize("graph", GRAPHS)
def test_accumulation_over_three_micro_steps(graph):
    fields = ToyFields()
    expected = accumulated_transcription(fields)
    found = accumulated(GRAPHS[graph], lambda fields: Loop(fields, factor=1 / 3), fields)
    assert relative_difference(found, expected) <= EXACT


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("exponent", [16, -7])
def test_accumulation_under_a_gradient_scaler(graph, exponent):
    fields = ToyFields()
    expected = accumulated_transcription(fields)
    optimizer = torch.optim.SGD(fields.lora.values(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent)

    def backward_of(fields: ToyFields) -> Backward:
        def backward(loss: Tensor, *, last: bool) -> float:
            scaler.scale(loss / 3).backward()
            return scaler.get_scale() / 3

        return backward

    accumulated(GRAPHS[graph], backward_of, fields)
    assert relative_difference(fields.gradients(), expected) > 0.5, "the gradients must be scaled until here"
    scaler.unscale_(optimizer)
    assert relative_difference(fields.gradients(), expected) <= EXACT


def two_process_worker(rank: int, folder: str) -> None:
    """Two micro-steps on this rank's samples, then one mean of the gradients over ranks."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for graph, options in GRAPHS.items():
        fields = ToyFields()
        for micro in range(2):
            objective(**options).step(fields, rank_batch(rank, micro), Loop(fields, factor=1 / 2))
        own = fields.gradients()
        average_gradients(list(fields.lora.values()))
        save_file(own, f"{folder}/own-{graph}-{rank}.safetensors")
        save_file(fields.gradients(), f"{folder}/mean-{graph}-{rank}.safetensors")
    torch.distributed.destroy_process_group()


def rank_batch(rank: int, micro: int) -> Batch:
    return toy_batch((0.1 + 0.2 * rank + 0.3 * micro, 0.95 - 0.3 * rank - 0.1 * micro), seed=f"rank {rank} micro {micro}")


def test_two_data_parallel_processes(tmp_path):
    torch.multiprocessing.spawn(two_process_worker, (str(tmp_path),), nprocs=2)
    parts = [transcription(ToyFields(), rank_batch(rank, micro))[1] for rank in range(2) for micro in range(2)]
    expected = {name: sum(part[name] for part in parts) / 4 for name in parts[0]}
    for graph in GRAPHS:
        own = load_file(tmp_path / f"own-{graph}-0.safetensors")
        assert relative_difference(own, expected) > 0.05, "the ranks' own gradients must differ from the mean"
        for rank in range(2):
            assert relative_difference(load_file(tmp_path / f"mean-{graph}-{rank}.safetensors"), expected) <= EXACT
