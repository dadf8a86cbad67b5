"""The ways of making a step that `benchmarks.step` compares."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.step_figures import FAST
from benchmarks.step_shapes import Shape, preset_of
from byg_plugin.config.objective import ObjectiveConfig
from byg_plugin.objectives.base import FULL


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of making a step."""

    name: str
    title: str
    objective: dict[str, Any] = field(default_factory=dict)
    base: str = "bare"
    """The frozen passes: LoRA `scaled` by 0, PEFT's `switch`, or the `bare` linears (the project's way)."""
    inference_mode: bool = True
    """Of the passes without gradient."""
    kind: str = FULL
    """Of the step: which terms chance has left out."""
    probability: float = 1.0
    """Of the kind."""


CHANCE = ("identity", "reverse")
"""Terms that a step may leave out, in the order in which a kind's name has them."""
PAIRED = Row(name="paired", title="paired step (Eq. 1)", objective={"name": "paired"})


def ladder(steps: int) -> list[Row]:
    """From Algorithm 1 as one would write it to the cheapest exact step; each row adds to the one before."""
    first = {"graph": "joint", "frozen_batch": 1, "rollout_weights": "swap", "rollout_steps": steps}
    rows = [
        Row(
            name="printed",
            title="Algorithm 1 as printed: one graph, LoRA scaled by 0 in the base",
            base="scaled",
            inference_mode=False,
            objective=first,
        )
    ]

    def add(name: str, title: str, objective: dict[str, Any] | None = None, **changes: Any) -> None:
        rows.append(replace(rows[-1], name=name, title=title, objective=rows[-1].objective | (objective or {}), **changes))

    add("sequential", "one pass's graph at a time", {"graph": "sequential"})
    add("switch", "base with PEFT's switch: no LoRA products", base="switch")
    add("bare", "base on its own linears: no PEFT layers", base="bare")
    add("inference", "passes without gradient in inference mode", inference_mode=True)
    add("frozen 2", "frozen passes two at once (the defaults)", {"frozen_batch": 2})
    add("frozen 4", "frozen passes all four at once", {"frozen_batch": 4})
    add("merged", "rollout on merged weights", {"rollout_weights": "merged"})
    add("beside", "identity beside the reverse pass", {"merge_identity": True})
    return rows


LADDER = tuple(row.name for row in ladder(10))
RECOMPUTED = ("paired", "printed", "frozen 2", "merged", "beside", "default, fewer", "merged, fewer", FAST)
"""Rows that are also measured with recomputed activations, where a shape has both."""


def kinds(objective: ObjectiveConfig) -> dict[str, float]:
    """Probability of each kind of step (`objectives.base.Plan.kind`) among those that are no identity steps.

    Identity steps stay out of every row: their share is the same with and without the preset, and each costs one paired step.
    """
    found = {FULL: 1.0}
    for term in CHANCE:
        rate = getattr(objective, f"{term}_rate", 1.0)
        found = {
            longer: probability * share
            for kind, probability in found.items()
            for longer, share in ((kind, rate), (f"{kind}-{term}", 1 - rate))
            if share
        }
    return found


def preset_rows(shape: Shape) -> list[Row]:
    """The shape's recipe, one row a kind of step."""
    objective = preset_of(shape)
    values = objective.model_dump()
    return [
        Row(name=FAST, title=f"`{shape.preset}`", objective=values, kind=kind, probability=probability)
        for kind, probability in kinds(objective).items()
    ]


def all_rows(shape: Shape) -> list[Row]:
    """The paired step, the ladder, and what stands beside it."""
    steps, fewer = shape.rollout_steps
    rungs = {row.name: row for row in ladder(steps)}

    def beside(name: str, title: str, of: str, objective: dict[str, Any] | None = None, **changes: Any) -> Row:
        return replace(rungs[of], name=name, title=title, objective=rungs[of].objective | (objective or {}), **changes)

    return [
        PAIRED,
        *rungs.values(),
        beside("default, fewer", f"the defaults with {fewer} rollout steps", "frozen 2", {"rollout_steps": fewer}),
        beside("merged, fewer", f"merged with {fewer} rollout steps", "merged", {"rollout_steps": fewer}),
        *preset_rows(shape),
    ]


def plan(shape: Shape) -> list[tuple[Row, bool]]:
    """(row, checkpointing) of everything that is measured, paired first."""
    rows = all_rows(shape)
    return [
        (row, checkpointing)
        for index, checkpointing in enumerate(shape.checkpointing)
        for row in rows
        if index == 0 or row.name in RECOMPUTED
    ]
