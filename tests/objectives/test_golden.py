"""The training curve of the toy is the recorded one.

Set BYG_REGENERATE_GOLDEN=1 to write tests/support/golden/objective_curve.json anew (only after a change that is meant).
"""

from __future__ import annotations

import json
import os

import pytest
import torch

from tests.support import GOLDEN
from tests.support.objective_runs import GRAPHS, Loop, objective
from tests.support.toy_fields import ToyFields, numbers, toy_batch

CURVE = GOLDEN / "objective_curve.json"


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
        CURVE.write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(CURVE.read_text(encoding="utf-8"))
    assert len(curve) == len(golden)
    for index, (found, expected) in enumerate(zip(curve, golden, strict=True)):
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-9), f"step {index}, {name}"


def test_the_recorded_run_learns():
    golden = [step["loss"] for step in json.loads(CURVE.read_text(encoding="utf-8"))[:-1] if "cycle" in step]
    assert sum(golden[-8:]) < 0.8 * sum(golden[:8])
