"""The few figures that a change of the step's cost is held to, in minutes: one line of JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from benchmarks import step_figures as figures
from benchmarks import step_peer as peer
from benchmarks.step_bench import Bench
from benchmarks.step_rows import PAIRED
from benchmarks.step_shapes import shape_named
from byg_plugin.objectives.base import FULL

SECONDS = 110.0
"""After which no further repetition of the rows begins."""
LEAST, MOST = 3, 7
"""Repetitions of the rows, and of the peer's steps."""
WAN = ("wan-high", "wan-low")


def bar(flux: str, wan: tuple[str, ...], checkout: Path | None, clock: str, seconds: float = SECONDS) -> dict[str, float | None]:
    """The figures of a shape of FLUX; the peak is the largest of its and the Wan shapes' columns. No checkout: no peer."""
    device = torch.device("cpu")
    bench = Bench(shape_named(flux), device, clock)
    every = bench.plan
    bench.plan = [(row, setting) for row, setting in every if row.name == figures.FAST or (row.name, setting) == ("frozen 2", False)]
    results = {"rows": bench.started()}
    begin, repetitions = time.monotonic(), 0
    while repetitions < LEAST or (repetitions < MOST and time.monotonic() - begin < seconds):
        bench.time_once(results["rows"])
        repetitions += 1
    default = figures.find(results, "frozen 2", False)
    assert default is not None
    found: dict[str, float | None] = {
        "fast_over_paired": figures.expected_ratio(figures.preset(results, False)),
        "fast_over_paired_recomputed": figures.expected_ratio(figures.preset(results, True)),
        "defaults_over_paired": figures.ratio(default),
    }
    bench.plan = every
    found["peak_over_paired"] = max(_largest_peak(bench), *(_largest_peak(Bench(shape_named(name), device)) for name in wan))
    found |= {"peer_seconds": None, "peer_peak": None}
    if checkout is not None:
        found |= peer.figures(peer.compare(shape_named(flux), checkout, MOST, clock))
    return found


def _largest_peak(bench: Bench) -> float:
    """Of the preset's step with all terms, which allocates all that one without some of them does; kept and recomputed, both meters."""
    bench.plan = [(row, setting) for row, setting in bench.plan if row is PAIRED or (row.name == figures.FAST and row.kind == FULL)]
    rows = bench.started()
    for (row, setting), record in zip(bench.plan, rows, strict=True):
        record["bytes"] = bench.peaks(row, setting)
    return figures.largest_peak({"rows": rows}, [row for row in rows if row["name"] == figures.FAST])


def as_line(found: dict[str, float | None]) -> str:
    """JSON, to a thousandth."""
    return json.dumps({key: value if value is None else round(value, 3) for key, value in found.items()})
