"""The objective against Algorithm 1 written by hand, and the contract it keeps with hosts and loops.

Set BYG_REGENERATE_GOLDEN=1 to write tests/golden/objective_curve.json anew (only after a change that is meant).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_algorithm1 as reference
import torch
from byg_plugin.training.distributed import average_gradients
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_fields import RecordedFields, ToyFields, numbers, relative_difference, toy_batch, toy_network

from byg_plugin.config.sections import ObjectiveConfig
from byg_plugin.objectives import Paired, UnpairedCycle, make_objective
from byg_plugin.objectives.base import Backward, Batch, Metrics, cat_text

EXACT = 1e-12
GOLDEN = Path(__file__).parent / "golden" / "objective_curve.json"

# What differs from the defaults: the package's switches, and the same in the transcription's terms.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {}),
    "weights": (
        {"lambda_cycle": 0.7, "lambda_prior": 1.9, "lambda_id": 0.4, "alpha": 0.3},
        {"lambda_cycle": 0.7, "lambda_prior": 1.9, "lambda_id": 0.4, "alpha": 0.3},
    ),
    "no routing": ({"routing": False}, {"routing": False}),
    "no bootstrap": ({"bootstrap": False}, {"bootstrap": False}),
    "no routing, no bootstrap": ({"routing": False, "bootstrap": False}, {"routing": False, "bootstrap": False}),
    "no cycle": ({"cycle": False}, {"lambda_cycle": 0.0}),
    "no direction": ({"directional": False}, {"directional": False}),
    "no prior": ({"prior": False}, {"lambda_prior": 0.0}),
    "direction alone": ({"alpha": 0.0}, {"alpha": 0.0}),
    "no identity": ({"lambda_id": 0.0}, {"lambda_id": 0.0}),
    "identity alone": ({"cycle": False, "prior": False}, {"lambda_cycle": 0.0, "lambda_prior": 0.0}),
    "frozen one by one": ({"frozen_batch": 1}, {}),
    "frozen all at once": ({"frozen_batch": 4}, {}),
}
GRAPHS: dict[str, dict[str, Any]] = {
    "sequential": {"graph": "sequential"},
    "merged": {"graph": "sequential", "merge_identity": True},
    "joint": {"graph": "joint"},
}


def objective(**options: Any) -> UnpairedCycle:
    return UnpairedCycle(ObjectiveConfig(**options))


class Loop:
    """The loop's `backward`: `factor(loss)` is differentiated. Keeps what it was called with."""

    def __init__(self, fields: RecordedFields | None = None, factor: float = 1.0):
        self.fields, self.factor = fields, factor
        self.last: list[bool] = []

    def __call__(self, loss: Tensor, *, last: bool) -> float:
        assert self.fields is None or self.fields.active == "edit", "a backward outside the edit context"
        assert loss.ndim == 0 and loss.requires_grad
        self.last.append(last)
        (loss * self.factor).backward()
        return self.factor


def transcription(fields: ToyFields, batch: Batch, **weights: Any) -> tuple[Metrics, dict[str, Tensor]]:
    """Terms and LoRA gradients of the hand-written Algorithm 1; calls the network, not the recorded fields."""

    def one(text: Any, i: int) -> dict[str, Tensor]:
        return {name: value[i : i + 1] for name, value in text.items()}

    items = [
        reference.Tuple(
            x=batch.source[i : i + 1],
            p_src=one(batch.src_caption, i),
            p_tgt=one(batch.tgt_caption, i),
            c=one(batch.instruction, i),
            c_bar=one(batch.reverse_instruction, i),
            t=batch.t[i].item(),
            eps=batch.noise[i : i + 1],
        )
        for i in range(len(batch.t))
    ]
    terms = reference.batch_mean(
        lambda *inputs: toy_network(fields.weights, fields.lora, *inputs),
        lambda *inputs: toy_network(fields.weights, fields.ema_lora, *inputs),
        lambda *inputs: toy_network(fields.weights, None, *inputs),
        items,
        batch.nodes.tolist(),
        reference.Weights(**weights),
    )
    gradients = torch.autograd.grad(terms["loss"], list(fields.lora.values()))
    return {name: value.detach() for name, value in terms.items()}, dict(zip(fields.lora, gradients, strict=True))


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


# --- the contract of backward, order and memory ---


def edit_calls(fields: RecordedFields, batch: Batch) -> dict[str, Any]:
    """The edit calls by role; the identity pass is the one conditioned on the source with the reverse instruction."""
    roles = {}
    for call in fields.of("edit"):
        if torch.equal(call.text["tokens"], batch.instruction["tokens"]):
            role = "forward"
        else:
            role = "identity" if torch.equal(call.source, batch.source) else "reverse"
        assert role not in roles or not call.grad_enabled or not roles[role].grad_enabled, f"{role} was differentiated twice"
        if call.grad_enabled or role not in roles:
            roles[role] = call
    return roles


@pytest.mark.parametrize("identity_step", [False, True])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_is_last_exactly_once_and_finally(variant, graph, identity_step):
    fields, batch = ToyFields(), toy_batch(identity_step=identity_step)
    loop = Loop(fields)
    moved: list[bool] = []

    def backward(loss: Tensor, *, last: bool) -> float:
        before = [None if p.grad is None else p.grad.clone() for p in fields.lora.values()]
        factor = loop(loss, last=last)
        moved.append(any(b is None or not torch.equal(b, p.grad) for b, p in zip(before, fields.lora.values(), strict=True)))
        return factor

    objective(**(VARIANTS[variant][0] | GRAPHS[graph])).step(fields, batch, backward)
    assert loop.last == [False] * (len(loop.last) - 1) + [True]
    assert all(moved), "a backward without gradient work"


def test_the_sequential_graph_is_differentiated_in_three_parts_and_the_joint_in_one(batch):
    counts = {}
    for graph, options in GRAPHS.items():
        loop = Loop()
        objective(**options).step(ToyFields(), batch, loop)
        counts[graph] = len(loop.last)
    assert counts == {"sequential": 3, "merged": 2, "joint": 1}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_without_gradient_comes_before_the_first_edit_call(variant, graph, batch):
    fields = ToyFields()
    objective(**(VARIANTS[variant][0] | GRAPHS[graph])).step(fields, batch, Loop(fields))
    states = [call.state for call in fields.calls]
    first_edit = states.index("edit")
    assert set(states[first_edit:]) == {"edit"}
    grad_enabled = [call.grad_enabled for call in fields.calls]
    assert not any(grad_enabled[:first_edit])
    assert grad_enabled == sorted(grad_enabled), "an edit call without gradient comes before those with"
    assert fields.opened.count("edit") == 1, "one edit context a step"


def saved_activations(graph: str, batch: Batch) -> tuple[list[int], int]:
    """Activations alive when each edit call begins, and the most that were alive at once."""

    class Saved:
        def __init__(self, value: Tensor):
            self.value = value

    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    at_entry: list[int] = []
    peak = 0

    def pack(value: Tensor) -> Saved:
        nonlocal peak
        saved = Saved(value)
        alive.add(saved)
        peak = max(peak, len(alive))
        return saved

    fields = ToyFields()
    fields.before_call = lambda state: at_entry.append(len(alive)) if state == "edit" else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.value):
        objective(**GRAPHS[graph]).step(fields, batch, Loop())
    return at_entry, peak


def test_one_graph_is_alive_at_a_time(batch):
    sequential, peak = saved_activations("sequential", batch)
    joint, joint_peak = saved_activations("joint", batch)
    assert sequential == [0, 0, 0]
    assert joint[0] == 0 and 0 < joint[1] < joint[2]
    assert peak < 0.45 * joint_peak


@pytest.mark.parametrize("variant, calls", [("paper", 4), ("frozen one by one", 4), ("frozen all at once", 4), ("no prior", 0)])
def test_the_base_answers_four_questions_in_the_batches_asked_for(variant, calls, fields, batch):
    options = VARIANTS[variant][0]
    objective(**options).step(fields, batch, Loop())
    sizes = [len(call.noisy) // len(batch.t) for call in fields.of("base")]
    assert sum(sizes) == calls
    assert set(sizes) <= {options.get("frozen_batch", 2)}


def test_base_sees_both_captions_at_both_states(fields, batch):
    objective(frozen_batch=1).step(fields, batch, Loop())
    roles = edit_calls(fields, batch)
    y_t, x_t = roles["forward"].noisy, roles["reverse"].noisy
    asked = [
        (state, caption)
        for call in fields.of("base")
        for state, noisy in (("y_t", y_t), ("x_t", x_t))
        for caption, text in (("src", batch.src_caption), ("tgt", batch.tgt_caption))
        if torch.equal(call.noisy, noisy) and torch.equal(call.text["tokens"], text["tokens"]) and torch.equal(call.t, batch.t)
    ]
    assert sorted(asked) == [("x_t", "src"), ("x_t", "tgt"), ("y_t", "src"), ("y_t", "tgt")]


@pytest.mark.parametrize("failing", ["ema", "base", "edit"])
def test_an_exception_leaves_no_context_open_and_gradients_enabled(failing, fields, batch):
    def fail(state: str) -> None:
        if state == failing:
            raise RuntimeError(f"out of memory in {state}")

    fields.before_call = fail
    for backward in (Loop(), None):
        with pytest.raises(RuntimeError, match=failing):
            objective().step(fields, batch, backward)
        assert fields.active is None and torch.is_grad_enabled()


# --- the rollout ---

EDGE_T = (0.0, 0.01, 0.13, 0.5, 0.99, 1.0)


def rolled_out(ema: Callable[[Tensor, Tensor], Tensor], batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
    """y_t and y_0 as the forward and the reverse pass see them."""
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    fields = RecordedFields(
        lambda noisy, t, text, source: weight * noisy + source,
        lambda noisy, t, text, source: ema(noisy, t),
        lambda noisy, t, text, source: torch.zeros_like(noisy),
    )
    objective(**options).step(fields, batch, Loop(fields))
    roles = edit_calls(fields, batch)
    return roles["forward"].noisy, roles["reverse"].source.detach()


@pytest.mark.parametrize("steps", [2, 7, 10])
def test_y_t_is_exact_on_a_straight_path_for_every_samples_t(steps):
    """A constant velocity is integrated exactly by Euler: y_t must be the path's point at that sample's own t."""
    batch = toy_batch(EDGE_T, steps=steps)
    target = numbers(*batch.source.shape, seed="target")
    y_t, y_0 = rolled_out(lambda noisy, t: batch.noise - target, batch)
    t = batch.t.view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(y_t, (1 - t) * target + t * batch.noise, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(y_0, target, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("steps", [2, 7, 10])
def test_the_rollout_asks_the_velocity_at_the_nodes_times(steps):
    """v = s: each Euler step moves by s (s - s_next), so the sums tell at which times the field was asked."""
    batch = toy_batch(EDGE_T, steps=steps)
    y_t, y_0 = rolled_out(lambda noisy, t: t.view(-1, 1, 1, 1, 1).expand(noisy.shape), batch)
    for i, t in enumerate(EDGE_T):
        times = [1 - k / steps for k in range(steps + 1)]
        at = min(range(1, steps), key=lambda k: abs(times[k] - t))
        times[at] = t
        moves = [times[k] * (times[k] - times[k + 1]) for k in range(steps)]
        torch.testing.assert_close(y_t[i], batch.noise[i] - sum(moves[:at]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y_0[i], batch.noise[i] - sum(moves), rtol=1e-12, atol=1e-12)


def test_many_steps_reach_the_known_integral():
    """v = y s has the solution y(t) = noise exp((t^2 - 1) / 2); Euler's error falls with the step."""
    errors = []
    for steps in (50, 400):
        batch = toy_batch((0.01, 0.4, 0.99), steps=steps)
        y_t, y_0 = rolled_out(lambda noisy, t: noisy * t.view(-1, 1, 1, 1, 1), batch)
        t = batch.t.view(-1, 1, 1, 1, 1)
        at_t = (y_t - batch.noise * torch.exp((t**2 - 1) / 2)).abs().max().item()
        at_0 = (y_0 - batch.noise * math.exp(-0.5)).abs().max().item()
        errors.append(max(at_t, at_0))
    assert errors[1] < 0.2 * errors[0] and errors[1] < 5e-3


def test_the_rollout_costs_one_call_a_step_and_starts_at_the_noise(fields, batch):
    objective().step(fields, batch, Loop())
    calls = fields.of("ema")
    assert len(calls) == len(batch.nodes) - 1
    assert torch.equal(calls[0].noisy, batch.noise)
    for call in calls:
        assert torch.equal(call.text["tokens"], batch.instruction["tokens"]) and torch.equal(call.source, batch.source)


def test_without_routing_the_rollout_stops_where_the_last_sample_is(fields):
    batch = toy_batch((0.85, 0.6, 0.7), steps=10)
    objective(routing=False).step(fields, batch, Loop())
    assert len(fields.of("ema")) == 4


def test_the_same_noise_makes_x_t_and_starts_the_rollout(fields, batch):
    objective().step(fields, batch, Loop())
    t = batch.t.view(-1, 1, 1, 1, 1)
    x_t = (1 - t) * batch.source + t * batch.noise
    roles = edit_calls(fields, batch)
    for role in ("reverse", "identity"):
        torch.testing.assert_close(roles[role].noisy, x_t, rtol=1e-14, atol=1e-14)
    assert (roles["forward"].noisy - x_t).norm() > 1e-2


def test_without_bootstrap_the_forward_pass_sees_x_t_and_the_reverse_pass_still_y_0(batch):
    paper, ablated = ToyFields(), ToyFields()
    objective().step(paper, batch, Loop())
    objective(bootstrap=False).step(ablated, batch, Loop())
    with_it, without = edit_calls(paper, batch), edit_calls(ablated, batch)
    assert torch.equal(without["forward"].noisy, with_it["reverse"].noisy)
    assert torch.equal(without["reverse"].source, with_it["reverse"].source)


# --- who gets gradient and who must not ---


def output_gradients(options: dict[str, Any], batch: Batch) -> dict[str, Tensor]:
    """d loss / d v of every edit call by role; 0 where none arrives."""
    fields = ToyFields()
    found: dict[int, Tensor] = {}
    plain = fields.functions["edit"]

    def edit(*inputs: Any) -> Tensor:
        value = plain(*inputs)
        if value.requires_grad:
            value.register_hook(lambda gradient: found.__setitem__(id(value), gradient.clone()))
        return value

    fields.functions["edit"] = edit
    objective(**options).step(fields, batch, Loop(fields))
    return {role: found.get(id(call.value), torch.zeros_like(call.value)) for role, call in edit_calls(fields, batch).items()}


ISOLATED = {
    "cycle": ({"lambda_id": 0.0, "prior": False}, {"forward", "reverse"}),
    "prior": ({"lambda_id": 0.0, "cycle": False}, {"forward", "reverse"}),
    "identity": ({"cycle": False, "prior": False}, {"identity"}),
}


@pytest.mark.parametrize("routing", [True, False])
@pytest.mark.parametrize("graph", ["sequential", "joint"])
@pytest.mark.parametrize("term", ISOLATED)
def test_each_term_reaches_exactly_its_passes(term, graph, routing, batch):
    options, receivers = ISOLATED[term]
    gradients = output_gradients(options | {"graph": graph, "routing": routing}, batch)
    assert {role for role, gradient in gradients.items() if gradient.flatten(1).norm(dim=1).min() > 1e-6} == receivers
    assert {role for role, gradient in gradients.items() if gradient.any()} == receivers


@pytest.mark.parametrize("graph", ["sequential", "joint"])
def test_the_cycle_reaches_the_forward_pass_through_y_hat_alone(graph, batch):
    """y_hat = y_t - t v_fwd: the forward velocity's gradient is -t times that of the reverse pass's condition, taken at y_0."""
    options = {"graph": graph, "lambda_id": 0.0, "prior": False}
    gradient = output_gradients(options, batch)["forward"]
    fields = ToyFields()
    objective(**options).step(fields, batch, Loop())
    reverse = edit_calls(fields, batch)["reverse"]
    condition = reverse.source.detach().clone().requires_grad_()
    v_rev = toy_network(fields.weights, fields.lora, reverse.noisy, batch.t, batch.reverse_instruction, condition)
    loss = ((v_rev - (batch.noise - batch.source)) ** 2).mean()
    (at_condition,) = torch.autograd.grad(loss, condition)
    expected = -batch.t.view(-1, 1, 1, 1, 1) * at_condition
    assert relative_difference({"v_fwd": gradient}, {"v_fwd": expected}) <= EXACT


@pytest.mark.parametrize("graph", ["sequential", "joint"])
@pytest.mark.parametrize("routing", [True, False])
def test_routing_changes_what_the_reverse_pass_sees(graph, routing):
    fields, batch = ToyFields(), toy_batch((0.35, 0.52, 0.87))  # none nearest to the last interior node: it stays where it is
    objective(graph=graph, routing=routing).step(fields, batch, Loop())
    roles = edit_calls(fields, batch)
    y_hat = (roles["forward"].noisy - batch.t.view(-1, 1, 1, 1, 1) * roles["forward"].value).detach()
    last = fields.of("ema")[-1]
    y_0 = (last.noisy - batch.nodes[-2] * last.value).detach()
    seen = roles["reverse"].source.detach()
    if routing:
        torch.testing.assert_close(seen, y_0, rtol=1e-13, atol=1e-13)
        assert (seen - y_hat).norm() > 1e-2
    else:
        torch.testing.assert_close(seen, y_hat, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_flows_into_the_rollout_the_base_or_the_data(variant, graph, fields, batch):
    batch = dataclasses.replace(batch, source=batch.source.clone(), noise=batch.noise.clone())
    objective(**(VARIANTS[variant][0] | GRAPHS[graph])).step(fields, batch, Loop(fields))
    assert all(value.requires_grad and value.grad is None for value in fields.ema_lora.values())
    assert all(value.requires_grad and value.grad is None for value in fields.base_weights.values())
    assert not any(call.value.requires_grad for call in fields.calls if call.state != "edit")
    assert batch.source.grad is None and not batch.source.requires_grad


def test_the_leak_detector_detects_a_leak(fields, batch):
    """Control of the test above: with gradients enabled, EMA and base do build a graph."""
    with fields.ema() as velocity:
        velocity(batch.noise, batch.t, batch.instruction, batch.source).sum().backward()
    with fields.base() as velocity:
        velocity(batch.noise, batch.t, batch.src_caption, None).sum().backward()
    assert all(value.grad is not None for value in fields.ema_lora.values())
    assert fields.base_weights["head"].grad is not None


# --- closed forms ---


def constant_fields(batch: Batch, forward: Tensor, reverse: Tensor, src: Tensor, tgt: Tensor) -> tuple[RecordedFields, dict[str, Tensor]]:
    """Fields that answer with given velocities, by text; the trained leaves are the two edit velocities."""
    leaves = {"forward": forward.clone().requires_grad_(), "reverse": reverse.clone().requires_grad_()}
    link = torch.zeros((), dtype=forward.dtype)

    def by_text(first: Tensor, of_first: Any, second: Tensor) -> Callable[..., Tensor]:
        def answer(noisy: Tensor, t: Tensor, text: Any, source: Tensor | None) -> Tensor:
            first_text = of_first["tokens"]
            parts = [(first if torch.equal(part, first_text) else second) for part in text["tokens"].split(len(first_text))]
            # The (zero) link to the condition: a network whose output has no path to it would not be one.
            return torch.cat(parts) + (0 if source is None else link * source)

        return answer

    edit = by_text(leaves["forward"], batch.instruction, leaves["reverse"])
    base = by_text(src, batch.src_caption, tgt)
    return RecordedFields(edit, lambda noisy, t, text, source: torch.zeros_like(noisy), base), leaves


@pytest.fixture
def velocities(batch) -> dict[str, Tensor]:
    return {name: numbers(*batch.source.shape, seed=f"velocity/{name}") for name in ("src", "tgt", "other")}


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_perfect_student_has_no_loss(graph, batch, velocities):
    """It leaves the source caption's velocity exactly for the target's, and its reverse rebuilds the source."""
    u, w = batch.noise - batch.source, velocities["tgt"]
    fields, leaves = constant_fields(batch, forward=w, reverse=u, src=u, tgt=w)
    metrics = objective(**GRAPHS[graph]).step(fields, batch, Loop(fields))
    for name in ("loss", "cycle", "identity", "prior_fwd", "prior_rev", "mse_fwd", "mse_rev"):
        assert abs(metrics[name].item()) < 1e-14, name
    assert metrics["cosine_fwd"].item() == pytest.approx(1) and metrics["cosine_rev"].item() == pytest.approx(1)
    assert all(leaf.grad.norm() < 1e-12 for leaf in leaves.values())


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("step", [1.0, 0.25, -1.0, -3.0])
def test_the_directional_term_is_0_when_aligned_and_2_when_opposed_at_any_length(graph, step, batch, velocities):
    src, tgt = velocities["src"], velocities["tgt"]
    v = src + step * (tgt - src)
    fields, leaves = constant_fields(batch, forward=v, reverse=tgt + step * (src - tgt), src=src, tgt=tgt)
    metrics = objective(alpha=0.0, cycle=False, lambda_id=0.0, **GRAPHS[graph]).step(fields, batch, Loop(fields))
    for direction in ("fwd", "rev"):
        assert metrics[f"prior_{direction}"].item() == pytest.approx(0.0 if step > 0 else 2.0, abs=1e-12)
        assert metrics[f"cosine_{direction}"].item() == pytest.approx(1.0 if step > 0 else -1.0)
        assert metrics[f"mse_{direction}"].item() == pytest.approx((1 - step) ** 2 * (tgt - src).square().mean().item())
    assert metrics["loss"].item() == pytest.approx(metrics["prior_fwd"].item() + metrics["prior_rev"].item(), abs=1e-12)


def test_a_descent_step_turns_the_velocity_towards_the_edit(batch, velocities):
    src, tgt = velocities["src"], velocities["tgt"]
    options = {"alpha": 0.0, "cycle": False, "lambda_id": 0.0}
    fields, leaves = constant_fields(batch, forward=velocities["other"], reverse=velocities["other"], src=src, tgt=tgt)
    before = objective(**options).step(fields, batch, Loop(fields))
    forward, reverse = (leaves[name] - 0.1 * leaves[name].grad for name in ("forward", "reverse"))
    assert ((forward - leaves["forward"]) * (tgt - src)).flatten(1).sum(dim=1).min() > 0
    assert ((reverse - leaves["reverse"]) * (src - tgt)).flatten(1).sum(dim=1).min() > 0
    after = objective(**options).step(constant_fields(batch, forward, reverse, src, tgt)[0], batch, None)
    assert after["cosine_fwd"] > before["cosine_fwd"] and after["cosine_rev"] > before["cosine_rev"]


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("zero", ["equal captions", "no edit"])
def test_a_zero_direction_counts_as_one_has_no_gradient_and_is_counted(graph, zero, batch, velocities):
    """Sample 1 alone has no direction: captions that say the same, or an edit velocity that is the source's."""
    src, tgt, v = velocities["src"], velocities["tgt"].clone(), velocities["other"].clone()
    if zero == "equal captions":
        tgt[1] = src[1]
    else:
        v[1] = src[1]
    fields, leaves = constant_fields(batch, forward=v, reverse=v, src=src, tgt=tgt)
    metrics = objective(alpha=0.0, cycle=False, lambda_id=0.0, **GRAPHS[graph]).step(fields, batch, Loop(fields))
    assert metrics["zero_directions_fwd"].item() == 1
    assert metrics["zero_directions_rev"].item() == (1 if zero == "equal captions" else 0)
    edit, direction = (v - src).flatten(1), (tgt - src).flatten(1)
    cosines = [torch.dot(edit[i], direction[i]) / (edit[i].norm() * direction[i].norm()) for i in (0, 2)]
    assert metrics["prior_fwd"].item() == pytest.approx((1 + sum(1 - c.item() for c in cosines)) / 3)
    assert metrics["cosine_fwd"].item() == pytest.approx(sum(c.item() for c in cosines) / 3)
    assert all(value.isfinite() for value in metrics.values())
    assert not leaves["forward"].grad[1].any()
    assert all(leaves["forward"].grad[i].any() for i in (0, 2))
    assert leaves["reverse"].grad.isfinite().all()


@pytest.mark.parametrize("graph", GRAPHS)
def test_terms_are_weighted_means_of_hand_made_errors(graph, batch, velocities):
    """Constant errors whose squares are known: cycle and identity 4, both MSE of the prior 9 and 16."""
    u, tgt = batch.noise - batch.source, velocities["tgt"]
    fields, _ = constant_fields(batch, forward=tgt + 3, reverse=u + 2, src=u + 6, tgt=tgt)
    options = {"lambda_cycle": 0.5, "lambda_prior": 3.0, "lambda_id": 0.25, "alpha": 0.1, "directional": False}
    metrics = objective(**options, **GRAPHS[graph]).step(fields, batch, Loop(fields))
    expected = {"cycle": 4.0, "identity": 4.0, "mse_fwd": 9.0, "mse_rev": 16.0, "prior_fwd": 0.9, "prior_rev": 1.6}
    expected["loss"] = 0.5 * 4 + 3 * (0.9 + 1.6) + 0.25 * 4
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value), name


# --- identity steps ---


@pytest.mark.parametrize("graph", GRAPHS)
def test_an_identity_step_trains_the_identity_term_alone(graph):
    batch, fields = toy_batch(identity_step=True), ToyFields()
    expected, gradients = transcription(fields, batch, lambda_cycle=0.0, lambda_prior=0.0, lambda_id=1.7)
    loop = Loop(fields)
    metrics = objective(identity_step_weight=1.7, lambda_id=0.3, **GRAPHS[graph]).step(fields, batch, loop)
    assert relative_difference(fields.gradients(), gradients) <= EXACT
    assert metrics.keys() == {"loss", "identity"}
    torch.testing.assert_close(metrics["identity"], expected["identity"], rtol=EXACT, atol=0)
    torch.testing.assert_close(metrics["loss"], 1.7 * expected["identity"], rtol=EXACT, atol=0)
    assert [call.state for call in fields.calls] == ["edit"], "no rollout, no base"
    assert torch.equal(fields.calls[0].text["tokens"], batch.reverse_instruction["tokens"])
    assert torch.equal(fields.calls[0].source, batch.source)
    assert loop.last == [True]


def test_an_identity_step_trains_even_where_the_full_loss_has_no_identity_term():
    fields = ToyFields()
    objective(lambda_id=0.0).step(fields, toy_batch(identity_step=True), Loop(fields))
    assert all(value.norm() > 0 for value in fields.gradients().values())


# --- metrics and validation ---

PRIOR_METRICS = {f"{name}_{way}" for name in ("prior", "cosine", "mse", "zero_directions") for way in ("fwd", "rev")}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    "options, keys",
    [
        ({}, {"loss", "cycle", "identity"} | PRIOR_METRICS),
        ({"prior": False}, {"loss", "cycle", "identity"}),
        ({"lambda_id": 0.0}, {"loss", "cycle"} | PRIOR_METRICS),
        ({"prior": False, "cycle": False}, {"loss", "identity"}),
    ],
)
def test_metrics_are_detached_scalars_by_name(options, keys, graph, fields, batch):
    metrics = objective(**options, **GRAPHS[graph]).step(fields, batch, Loop())
    assert metrics.keys() == keys
    assert all(value.ndim == 0 and not value.requires_grad and value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("identity_step", [False, True])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_validation_computes_the_same_values_without_a_graph(variant, graph, identity_step):
    batch, fields = toy_batch(identity_step=identity_step), ToyFields()
    step = objective(**(VARIANTS[variant][0] | GRAPHS[graph]))
    validation = step.step(fields, batch, None)
    assert not any(call.grad_enabled or call.value.requires_grad for call in fields.calls)
    assert all(value.grad is None for value in fields.lora.values())
    assert torch.is_grad_enabled()
    training = step.step(fields, batch, Loop())
    assert validation.keys() == training.keys()
    for name, value in training.items():
        torch.testing.assert_close(validation[name], value, rtol=EXACT, atol=EXACT)


# --- bad input, the registry, the supervised baseline ---


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing is left to train"):
        objective(cycle=False, prior=False, lambda_id=0.0)


def test_a_rollout_of_one_step_is_refused(fields, batch):
    with pytest.raises(ValueError, match="at least 2 steps"):
        objective().step(fields, dataclasses.replace(batch, nodes=batch.nodes[[0, -1]]), Loop())


def test_t_of_another_batch_is_refused(fields, batch):
    with pytest.raises(ValueError, match="one value a sample"):
        objective().step(fields, dataclasses.replace(batch, t=batch.t[:2]), Loop())


def test_objectives_by_name():
    assert isinstance(make_objective(ObjectiveConfig(name="unpaired_cycle")), UnpairedCycle)
    assert isinstance(make_objective(ObjectiveConfig(name="paired")), Paired)


def test_cat_text_keeps_the_order_and_every_name(batch):
    both = cat_text(batch.src_caption, batch.tgt_caption)
    for name, value in both.items():
        assert torch.equal(value, torch.cat([batch.src_caption[name], batch.tgt_caption[name]]))
    assert both.keys() == batch.src_caption.keys()


def test_paired_is_equation_1(fields, batch):
    t = batch.t.view(-1, 1, 1, 1, 1)
    y_t = (1 - t) * batch.target + t * batch.noise
    v = toy_network(fields.weights, fields.lora, y_t, batch.t, batch.instruction, batch.source)
    loss = torch.stack([((batch.noise[i] - batch.target[i] - v[i]) ** 2).mean() for i in range(3)]).mean()
    expected = dict(zip(fields.lora, torch.autograd.grad(loss, list(fields.lora.values())), strict=True))
    loop = Loop(fields)
    metrics = Paired().step(fields, batch, loop)
    assert relative_difference(fields.gradients(), expected) <= EXACT
    torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=EXACT, atol=0)
    assert loop.last == [True] and fields.opened == ["edit"]
    validation = ToyFields()
    torch.testing.assert_close(Paired().step(validation, batch, None)["loss"], loss.detach(), rtol=EXACT, atol=0)
    assert all(value.grad is None for value in validation.lora.values())


def test_paired_without_a_target_says_what_is_missing(fields, batch):
    with pytest.raises(ValueError, match='"paired" needs a `target`'):
        Paired().step(fields, dataclasses.replace(batch, target=None), Loop())


# --- a short training run, to full precision ---


def training_curve(graph: str) -> list[dict[str, float]]:
    """Forty steps of Adam with an EMA and some identity steps."""
    fields = ToyFields()
    optimizer = torch.optim.Adam(fields.lora.values(), lr=0.01, eps=1e-6)
    step, curve = objective(**GRAPHS[graph]), []
    for index in range(40):
        t = tuple(torch.sigmoid(numbers(2, seed=f"t {index}")).tolist())
        batch = toy_batch(t, seed=f"data {index % 4}", steps=4, identity_step=index < 3 or index % 7 == 0)
        metrics = step.step(fields, batch, Loop(fields))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, value in fields.ema_lora.items():
                value.lerp_(fields.lora[name], 0.1)
        curve.append({name: value.item() for name, value in metrics.items()})
    curve.append({"weights": sum(value.detach().square().sum().item() for value in fields.lora.values())})
    return curve


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_training_curve_is_the_recorded_one(graph):
    curve = training_curve(graph)
    if os.environ.get("BYG_REGENERATE_GOLDEN") and graph == "joint":
        GOLDEN.write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(curve) == len(golden)
    for index, (found, expected) in enumerate(zip(curve, golden, strict=True)):
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-9), f"step {index}, {name}"


def test_the_recorded_run_learns():
    golden = [step["loss"] for step in json.loads(GOLDEN.read_text(encoding="utf-8"))[:-1] if "cycle" in step]
    assert sum(golden[-8:]) < 0.8 * sum(golden[:8])
