"""Where an editor loses its source: parts by hand, oracles on the real base, and the table as committed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import direction, editors, where_lost
from byg_plugin.demo import world
from tests.support import ROOT


@pytest.fixture(scope="module")
def backgrounds() -> where_lost.Backgrounds:
    return where_lost.Backgrounds(16)


def test_each_latent_pixel_lies_in_one_part():
    before, after = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8)
    after[0, :4, :4] = 200  # one whole
    after[0, 5, 5] = 200  # some pixels of another
    after[0, 0, 7] = direction.CHANGED  # rounding
    parts = where_lost.parts_of(before, after, 2)
    assert {name: mask.squeeze().tolist() for name, mask in parts.items()} == {
        "kept": [[False, True], [True, False]],
        "background": [[True, False], [False, False]],
        "edges": [[False, False], [False, True]],
    }


def test_what_is_named_is_replaced():
    parts = {"kept": torch.tensor([True, False, False]), "edges": torch.tensor([False, True, False])}
    latents, exact = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    assert where_lost.replaced(latents, exact, parts, ()).tolist() == [1, 2, 3]
    assert where_lost.replaced(latents, exact, parts, ("edges",)).tolist() == [1, 20, 3]
    assert where_lost.replaced(latents, exact, parts, ("kept", "edges")).tolist() == [10, 20, 3]


def test_the_exact_edit_loses_nothing_and_a_copy_of_latents_does(backgrounds: where_lost.Backgrounds):
    assert {edit.edit_type for edit in backgrounds.edits} == {where_lost.KIND} and len(backgrounds.edits) == 16
    assert backgrounds.preserved(backgrounds.exact) == backgrounds.preserved(backgrounds.source) == 1.0
    assert 0.3 < backgrounds.copied() < 0.95
    moved = backgrounds.moved()
    assert moved["kept"] > 0.6 * moved["background"], "another background moves the latents of what is kept"


def test_the_part_that_is_wrong_is_found(backgrounds: where_lost.Backgrounds, monkeypatch: pytest.MonkeyPatch):
    """An editor that is exact but for its edges."""
    noise = torch.randn(backgrounds.exact.shape, generator=torch.Generator().manual_seed(0))
    wrong = where_lost.replaced(backgrounds.exact, backgrounds.exact + 4 * noise, backgrounds.parts, ("edges",))

    class Host:
        def load_lora(self, tensors: object) -> None:
            self.tensors = tensors

        def live(self) -> Host:
            return self

        def __enter__(self) -> None:
            return None

        def __exit__(self, *_: object) -> None:
            return None

    monkeypatch.setattr(editors, "make_host", lambda *_, **__: Host())
    monkeypatch.setattr(editors, "read_named", lambda *_: ({}, {}))
    monkeypatch.setattr(backgrounds.evaluator, "latents", lambda velocity, texts: wrong)
    found = backgrounds.of_editor(ROOT)
    assert found["edges"] == found["all but kept"] == 1.0
    assert found["nothing"] == found["kept"] == found["background"] < 0.8


def test_an_edit_by_the_base_has_latents_that_decode_to_what_the_study_scores(backgrounds: where_lost.Backgrounds):
    """The evaluator samples and decodes in two steps; together they are its edits."""
    field = lambda noisy, t, text, source: noisy - source  # noqa: E731
    images = backgrounds.evaluator.edit(field, 3)
    latents = backgrounds.evaluator.latents(field, [edit.instruction for edit in backgrounds.edits[:3]])
    again = backgrounds.evaluator.decoded(latents)
    assert list(images) == list(again) == [edit.id for edit in backgrounds.edits[:3]]
    assert all(np.array_equal(images[name], again[name]) for name in images)
    assert images[backgrounds.edits[0].id].shape == (world.SIZE, world.SIZE, 3)


def test_the_table_tells_the_committed_figures():
    committed = json.loads((ROOT / "benchmarks/results/where_lost.json").read_text(encoding="utf-8"))
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for line in where_lost.table(committed).splitlines():
        assert line in text
    assert f"preserve {100 * committed['copied']:.0f} %" in text
    assert f"{committed['moved']['kept']:.2f} (background {committed['moved']['background']:.2f})" in text
