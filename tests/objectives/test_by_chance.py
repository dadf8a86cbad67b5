"""Terms by chance: the mean over the coins is the whole step, and a step without a term does not pay for it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin.objectives.base import FULL, IDENTITY
from byg_plugin.objectives.unpaired_cycle_config import UnpairedCycleConfig
from tests.support.objective_runs import EXACT, GRAPHS, VARIANTS, Loop, objective
from tests.support.toy_fields import ToyFields, relative_difference, toy_batch

RATES = {"identity": 0.25, "reverse": 0.4}
KINDS = {"-".join([FULL, *left_out]): left_out for left_out in ([], ["identity"], ["reverse"], ["identity", "reverse"])}


def gradients(kind: str, factor: float = 1.0, **options: Any) -> dict[str, Tensor]:
    fields = ToyFields()
    objective(**options).step(fields, dataclasses.replace(toy_batch(), kind=kind), Loop(factor=factor))
    return {name: value.grad.clone() for name, value in fields.lora.items() if value.grad is not None}


def probability(left_out: list[str]) -> float:
    shares = [1 - rate if term in left_out else rate for term, rate in RATES.items()]
    return shares[0] * shares[1]


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize(
    ("graph", "variant"), product(GRAPHS, ["paper", "weights", "no routing", "no bootstrap", "no cycle", "direction alone"])
)
def test_the_mean_over_the_coins_is_the_whole_gradient(graph: str, variant: str, factor: float):
    options = GRAPHS[graph] | VARIANTS[variant][0]
    by_chance = options | {f"{term}_rate": rate for term, rate in RATES.items()}
    whole = gradients(FULL, factor, **options)
    mean = {name: torch.zeros_like(value) for name, value in whole.items()}
    for kind, left_out in KINDS.items():
        for name, value in gradients(kind, factor, **by_chance).items():
            mean[name] += probability(left_out) * value
    assert sum(map(probability, KINDS.values())) == pytest.approx(1)
    assert relative_difference(mean, whole) <= EXACT


def test_coins_have_their_rates_and_leave_identity_steps_alone():
    plain, by_chance = objective(), objective(identity_rate=0.25, reverse_rate=0.4)
    kinds = [by_chance.plan(step, 3).kind for step in range(200, 6200)]
    assert (
        kinds == [by_chance.plan(step, 3).kind for step in range(200, 6200)] != [by_chance.plan(step, 4).kind for step in range(200, 6200)]
    )
    identity = [step for step in range(200, 6200) if plain.plan(step, 3).kind == IDENTITY]
    assert identity == [200 + number for number, kind in enumerate(kinds) if kind == IDENTITY]
    others = Counter(kind for kind in kinds if kind != IDENTITY)
    assert set(others) == set(KINDS)
    for kind, left_out in KINDS.items():
        assert others[kind] / others.total() == pytest.approx(probability(left_out), abs=0.02)
    assert {plain.plan(step, 3).kind for step in range(6000)} == {FULL, IDENTITY}


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_step_without_the_reverse_pass_pays_for_none_of_it(graph: str):
    t = (0.61, 0.79)  # the second and the first of five nodes
    for kind in KINDS:
        fields, batch = ToyFields(), dataclasses.replace(toy_batch(t), kind=kind)
        metrics = objective(**GRAPHS[graph], identity_rate=0.5, reverse_rate=0.5).step(fields, batch, Loop())
        assert ("cycle" in metrics) == ("cosine_rev" in metrics) == ("reverse" not in kind)
        assert ("identity" in metrics) == ("identity" not in kind)
        assert "cosine_fwd" in metrics
        frozen = sum(len(call.t) for call in fields.of("base"))
        assert len(fields.of("ema")) == (2 if "reverse" in kind else 5)
        assert frozen == (2 if "reverse" in kind else 4) * len(t)


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_validation_has_every_term_at_its_whole_weight(graph: str):
    batch = toy_batch()
    whole = objective(**GRAPHS[graph]).step(ToyFields(), batch, None)
    by_chance = objective(**GRAPHS[graph], identity_rate=0.25, reverse_rate=0.4).step(ToyFields(), batch, None)
    assert whole.keys() == by_chance.keys() and all(torch.equal(value, by_chance[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reverse_rate": 0.5, "prior": False}, "objective.reverse_rate = 0.5 leaves steps"),
        ({"identity_rate": 0.5, "lambda_id": 0.0}, "objective.identity_rate = 0.5 is of no use"),
        ({"identity_rate": 0.5, "prior": False, "cycle": False}, "objective.identity_rate = 0.5 leaves steps"),
        ({"reverse_rate": 0.0}, "reverse_rate"),
        ({"identity_rate": 1.1}, "identity_rate"),
    ],
)
def test_rates_that_leave_nothing_are_refused(options: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        UnpairedCycleConfig(**options)
