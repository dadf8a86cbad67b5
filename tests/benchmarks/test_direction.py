"""Where the base says that an edit belongs: the figures by hand, the real base on a few edits, and the table as committed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import direction
from byg_plugin.demo import world
from tests.support import ROOT


def test_located_by_hand():
    share = np.array([[1.0, 1.0], [0.0, 0.5]])  # what is half changed counts on neither side
    assert direction.located(np.array([[3.0, 2.0], [1.0, 9.0]]), share) == 1.0
    assert direction.located(np.array([[3.0, 0.0], [1.0, 9.0]]), share) == 0.5
    assert direction.located(np.array([[1.0, 0.0], [1.0, 9.0]]), share) == 0.25
    assert direction.located(np.zeros((2, 2)), np.ones((2, 2))) is None


def test_strength_by_hand():
    """One of 50 latent pixels of 5 x 10, rms over two channels, in units of v_src."""
    towards = torch.zeros(1, 2, 1, 5, 10)
    towards[0, :, 0, 2, 3] = torch.tensor([3.0, 1.0])
    local, strongest = direction.strengths(towards, torch.full((1, 2, 1, 5, 10), -2.0))
    assert local.shape == (1, 5, 10) and local[0, 2, 3] == pytest.approx(5**0.5) and local.sum() == pytest.approx(5**0.5)
    assert strongest.tolist() == pytest.approx([5**0.5 / 2])


def test_cells_are_shares_of_pixels():
    change = np.zeros((1, 4, 4))
    change[0, :2, 1] = 1
    assert direction.cells(change, 2).tolist() == [[[0.5, 0.0], [0.0, 0.0]]]


def test_on_the_base_a_few_edits_say_what_the_committed_ones_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(direction, "TIMES", (0.5, 0.95))
    found = {(row["state"], row["type"], row["t"]): row for row in direction.measure(4, world.DEFAULT_TYPES)}
    assert len(found) == 2 * 2 * 2
    assert found["source", "recolour_object", 0.5]["located"] > 0.9 > 0.4 > found["source", "recolour_background", 0.5]["located"]
    assert found["source", "recolour_background", 0.95]["strength"] > 3 * found["source", "recolour_background", 0.5]["strength"]


def test_the_table_tells_the_committed_figures():
    committed = json.loads((ROOT / "benchmarks/results/direction.json").read_text(encoding="utf-8"))
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for line in direction.table(committed["rows"]).splitlines():
        assert line in text
