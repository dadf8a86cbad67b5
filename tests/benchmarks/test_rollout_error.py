"""The rollout's error: measured with the objective's own rollout, and told as it was measured."""

from __future__ import annotations

import json

from benchmarks import rollout_error
from tests.support import ROOT

COMMITTED = json.loads((ROOT / "benchmarks/results/rollout_error.json").read_text(encoding="utf-8"))


def test_rows_have_both_solvers_at_each_number_of_steps():
    rows = rollout_error.measure("flux", samples=2, reference_steps=40)
    assert [(row["schedule"], row["steps"], row["solver"]) for row in rows] == [
        (row["schedule"], row["steps"], row["solver"]) for row in COMMITTED if row["base"] == "flux"
    ]
    by = {(row["schedule"], row["steps"], row["solver"]): row for row in rows}
    for schedule in ("uniform", "shifted"):
        assert by[schedule, 20, "euler"]["y_0"] < by[schedule, 5, "euler"]["y_0"], "more steps come closer"
        assert by[schedule, 20, "ab2"]["y_0"] < by[schedule, 10, "ab2"]["y_0"]


def test_the_table_tells_the_committed_figures():
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for base, name in (("flux", "FLUX"), ("wan", "Wan, two experts")):
        for schedule in ("uniform", "shifted"):
            rows = [row for row in COMMITTED if (row["base"], row["schedule"]) == (base, schedule)]
            cells = [f"{row['y_t']:.3f} / {row['y_0']:.3f}".replace("0.", ".") for row in rows]
            assert f"| {name} | {schedule} | {' | '.join(cells)} |" in text
