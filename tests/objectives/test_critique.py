"""A critic beside the unpaired cycle: its gradient is that of one graph, and reaches the samples of the named edit types alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin.config.loading import parse_config
from byg_plugin.objectives.base import Batch
from tests.support.np_edit_runs import ToyCritic, fields_with_critic
from tests.support.objective_runs import EXACT, GRAPHS, Loop, edit_calls, objective
from tests.support.toy_fields import ToyFields, relative_difference, toy_batch, toy_network

REMOVALS: dict[str, Any] = {"critique_types": ["remove"], "critique_weight": 0.7}


def gradients(options: dict[str, Any], batch: Batch, fields: ToyFields | None = None) -> dict[str, Tensor]:
    fields = fields or fields_with_critic()
    objective(**options).step(fields, batch, Loop(fields))
    return fields.gradients()


def by_hand(batch: Batch, routing: bool) -> dict[str, Tensor]:
    """The critic's part alone: y_hyb of the removals, in one graph."""
    fields = fields_with_critic()
    objective(routing=routing).step(fields, batch, Loop())
    roles = edit_calls(fields, batch)
    last = fields.of("ema")[-1]
    y_0 = (last.noisy - batch.nodes[-2] * last.value).detach()
    y_t = roles["forward"].noisy
    t = batch.t.view(-1, 1, 1, 1, 1)
    y_hat = y_t - t * toy_network(fields.weights, fields.lora, y_t, batch.t, batch.instruction, batch.source)
    y_hyb = y_0 + (y_hat - y_hat.detach()) if routing else y_hat
    removals = [i for i, words in enumerate(batch.words) if words.edit_type == "remove"]
    assert 0 < len(removals) < len(batch.words)
    judged = [ToyCritic().one(y_hyb[i : i + 1], batch.source[i : i + 1], True) for i in removals]
    loss = 0.7 * torch.stack(judged).sum() / len(batch.words)
    return dict(zip(fields.lora, torch.autograd.grad(loss, list(fields.lora.values())), strict=True))


@pytest.mark.parametrize("routing", [True, False])
@pytest.mark.parametrize("graph", GRAPHS)
def test_the_critic_s_gradient_is_added_as_in_one_graph(graph: str, routing: bool):
    batch = toy_batch((0.35, 0.52, 0.6, 0.4))
    options = GRAPHS[graph] | {"routing": routing}
    plain, critic = gradients(options, batch), by_hand(batch, routing)
    found = gradients(options | REMOVALS, batch)
    assert relative_difference({n: found[n] - plain[n] for n in found}, critic) <= 1e-10


def test_it_counts_by_the_chance_of_the_reverse_pass():
    """The mean over the coins is the whole gradient: where the pass stays, all of it counts 1 / rate."""
    batch = toy_batch((0.35, 0.52, 0.6, 0.4))
    plain, with_critic = (gradients({"reverse_rate": 0.5} | more, batch) for more in ({}, REMOVALS))
    critic = by_hand(batch, True)
    assert relative_difference({n: (with_critic[n] - plain[n]) / 2 for n in plain}, critic) <= 1e-10


@pytest.mark.parametrize("graph", GRAPHS)
def test_who_is_not_named_is_not_judged(graph: str):
    fields, batch = fields_with_critic(), toy_batch((0.35, 0.52, 0.6, 0.4))
    options = GRAPHS[graph] | {"critique_types": ["replace"]}
    metrics = objective(**options).step(fields, batch, Loop(fields))
    assert not fields.critique.asked and metrics["critique"] == 0
    assert relative_difference(fields.gradients(), gradients(GRAPHS[graph], batch)) <= EXACT
    objective(**(GRAPHS[graph] | REMOVALS)).step(fields, batch, Loop(fields))
    assert [len(x0) for x0, _ in fields.critique.asked] == [2], "the two removals, in one call"


def test_the_critic_s_graph_is_gone_before_the_next_pass():
    alive: list[int] = []
    fields = fields_with_critic()
    plain = fields.critique

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            alive.append(1)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            alive.pop()
            return gradient

    def critique(x0: Tensor, batch: Batch, *, identity_question: bool) -> Any:
        return plain(Kept.apply(x0), batch, identity_question=identity_question)

    fields.critique = critique
    seen: list[int] = []
    fields.before_call = lambda state: seen.append(len(alive)) if state == "edit" else None
    objective(**REMOVALS).step(fields, toy_batch((0.35, 0.52, 0.6, 0.4)), Loop(fields))
    assert seen == [0, 0, 0] and not alive


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"critique_weight": 0.1},
            "objective.critique_weight = 0.1 weighs a critic that .* does not ask: leave it out",
        ),
        ({"critique_types": ["remove"], "critique_weight": 0}, "leave objective.critique_types out"),
        ({"critique_types": ["remove"], "cycle": False, "prior": False}, "without cycle and prior there is none"),
    ],
)
def test_refused(section: dict[str, Any], message: str):
    raw = {"model": {"path": "m"}, "dataset": {"tuples": "t", "cache_dir": "c"}, "train": {"steps": 300}, "output": {"dir": "o"}}
    with pytest.raises(ValueError, match=message):
        parse_config({**raw, "objective": section})
    musubi = {"model": {"host": "musubi"}, "dataset": {"tuples": "t"}, "musubi": {"dit": "x"}, "objective": {"critique_types": ["remove"]}}
    with pytest.raises(ValueError, match="objective.critique_types asks a critic, which model.host = 'musubi' has not"):
        parse_config(musubi)


def test_some_samples_of_a_batch_that_has_more_of_them_than_the_rollout_has_nodes():
    batch = toy_batch(t=tuple(0.1 * i for i in range(1, 9)), steps=2)
    some = batch.rows([1, 7])
    assert some.t.tolist() == [batch.t[1].item(), batch.t[7].item()] and torch.equal(some.nodes, batch.nodes)
    for name in ("source", "noise", "target"):
        assert torch.equal(getattr(some, name), getattr(batch, name)[[1, 7]])
    assert [words.id for words in some.words] == ["1", "7"] and all(len(noise) == 2 for noise in some.fresh)
    assert all(torch.equal(some.instruction[key], value[[1, 7]]) for key, value in batch.instruction.items())
