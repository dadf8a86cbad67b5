"""The objective's passes: their order, the graphs they keep, and where gradients flow."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin.objectives.base import Batch
from tests.support.objective_runs import EXACT, GRAPHS, VARIANTS, Loop, edit_calls, objective
from tests.support.toy_fields import ToyFields, relative_difference, toy_batch, toy_network


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


@pytest.mark.parametrize(
    "variant, calls", [("paper", 4), ("frozen one by one", 4), ("frozen all at once", 4), ("no reverse prior", 2), ("no prior", 0)]
)
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
