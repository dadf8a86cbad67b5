"""Figures of a results file's rows. A record is a row at one setting of checkpointing; the preset has one a kind of step."""

from __future__ import annotations

import statistics
from typing import Any

ROLLOUT = "rollout"
UPDATE = "optimizer and EMA"
FAST = "fast"
"""Name of the preset's rows."""

Record = dict[str, Any]


def total(phases: dict[str, float]) -> float:
    """A step without the updates after it."""
    return sum(value for phase, value in phases.items() if phase != UPDATE)


def find(results: dict[str, Any], name: str, checkpointing: bool) -> Record | None:
    return next((row for row in results["rows"] if row["name"] == name and row["checkpointing"] == checkpointing), None)


def seconds(row: Record) -> float:
    """Median step."""
    return statistics.median(total(phases) for phases in row["seconds"])


def ratios(row: Record) -> list[float]:
    """One a repetition: this step over the median paired step of the same repetition."""
    return [total(phases) / paired for phases, paired in zip(row["seconds"], row["paired_seconds"], strict=True)]


def ratio(row: Record) -> float:
    return statistics.median(ratios(row))


def flop_ratio(results: dict[str, Any], row: Record) -> float:
    paired = find(results, "paired", row["checkpointing"])
    assert paired is not None
    return total(row["flops"]) / total(paired["flops"])


def peak(row: Record, kind: str) -> float:
    return max(row["bytes"][kind].values())


def phase_ratio(row: Record, phase: str) -> float:
    """Median over the repetitions of a phase over the paired step beside it."""
    return statistics.median(phases[phase] / paired for phases, paired in zip(row["seconds"], row["paired_seconds"], strict=True))


# --- the preset: a mean over the kinds of step that its coins give ---


def preset(results: dict[str, Any], checkpointing: bool) -> list[Record]:
    """Its rows; empty in a file from before it."""
    return [row for row in results["rows"] if row["name"] == FAST and row["checkpointing"] == checkpointing]


def expected_ratios(rows: list[Record]) -> list[float]:
    """One a repetition: the mean step over the paired steps beside each of its kinds."""
    assert abs(sum(row["probability"] for row in rows) - 1) < 1e-9, "the kinds of step are not all"
    by_kind = [
        [row["probability"] * paid(row, phases) / paired for phases, paired in zip(row["seconds"], row["paired_seconds"], strict=True)]
        for row in rows
    ]
    return [sum(values) for values in zip(*by_kind, strict=True)]


def expected_ratio(rows: list[Record]) -> float:
    return statistics.median(expected_ratios(rows))


def expected_flops(rows: list[Record]) -> dict[str, float]:
    """Of the mean step, by phase."""
    found: dict[str, float] = {}
    for row in rows:
        for phase, value in row["flops"].items():
            share = row["rollout_share"] if phase == ROLLOUT else 1.0
            found[phase] = found.get(phase, 0.0) + row["probability"] * share * value
    return found


def paid(row: Record, phases: dict[str, float]) -> float:
    """A step with its part of the rollout: others may use it too, and this one's t may be early or late."""
    return total(phases) + (row["rollout_share"] - 1) * phases.get(ROLLOUT, 0.0)


def largest_peak(results: dict[str, Any], rows: list[Record]) -> float:
    """The largest of the rows' peaks over the paired step's, of every kind of bytes."""
    found = []
    for row in rows:
        paired = find(results, "paired", row["checkpointing"])
        assert paired is not None
        found += [peak(row, kind) / peak(paired, kind) for kind in row["bytes"]]
    return max(found)
