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


def test_a_cosine_by_hand():
    """v_src = 0 and v_tgt = (1, 0): the velocity that leads to the end is (3, 4), with a cosine of 0.6."""
    shape = (1, 2, 1, 1, 2)

    def field(first: float, second: float) -> torch.Tensor:
        return torch.tensor([first, second]).view(1, 2, 1, 1, 1).expand(shape)

    answers = iter([field(0.0, 0.0), field(1.0, 0.0)])
    fields = type("Fields", (), {"velocity": lambda *_: next(answers)})()
    clean, t = torch.ones(shape), 0.5
    noisy = (clean + torch.randn(shape, generator=torch.Generator().manual_seed(0))) / 2
    ends = {"one": noisy - t * field(3.0, 4.0)}
    found = direction._at(fields, clean, t, {}, {}, np.array([[[1.0, 0.0]]]), ends)
    assert found["cosine_one"] == pytest.approx(0.6)


def test_blurred_keeps_the_mean_and_loses_the_edge():
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    pixels[:, :, 16:] = 200
    made = direction.blurred(pixels)
    assert made.shape == pixels.shape and abs(float(made.mean()) - 100) < 2
    assert int(made[0, 16, 16, 0]) - int(made[0, 16, 15, 0]) < 40 and made[0, 16, 31, 0] == 200


def test_on_the_base_a_few_edits_say_what_the_committed_ones_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(direction, "TIMES", (0.5, 0.95))
    found = {(row["state"], row["type"], row["t"]): row for row in direction.measure(4, world.DEFAULT_TYPES)}
    assert len(found) == 2 * 2 * 2
    assert found["source", "recolour_object", 0.5]["located"] > 0.9 > 0.4 > found["source", "recolour_background", 0.5]["located"]
    # The directional loss likes a sharp edit where the base sees it, and a blurred one as well where it sees noise.
    sharper = {
        t: found["edit", "recolour_background", t]["cosine_exact"] - found["edit", "recolour_background", t]["cosine_blurred"]
        for t in (0.5, 0.95)
    }
    assert sharper[0.5] > 0.15 > 0.03 > sharper[0.95]
    assert "cosine_exact" not in found["source", "recolour_object", 0.5]
    assert found["source", "recolour_background", 0.95]["strength"] > 3 * found["source", "recolour_background", 0.5]["strength"]


def test_the_table_tells_the_committed_figures():
    committed = json.loads((ROOT / "benchmarks/results/direction.json").read_text(encoding="utf-8"))
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for line in "\n".join(direction.tables(committed["rows"])).splitlines():
        assert line in text
