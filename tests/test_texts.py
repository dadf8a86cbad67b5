"""Texts of several lengths in batches and out of them."""

from __future__ import annotations

import torch

from byg_plugin.texts import cat_text, padding_mask, stack_texts, text_at

CPU = torch.device("cpu")


def one(length: int, first: float) -> dict[str, torch.Tensor]:
    return {"rows": torch.full((length, 2), first), "mask": torch.ones(length, dtype=torch.bool)}


def test_texts_come_back_from_a_batch_as_they_were():
    texts = [one(3, 1.0), one(5, 2.0), one(1, 3.0)]
    batch = stack_texts(texts)
    assert batch["rows"].shape == (3, 5, 2) and batch["mask"].sum(dim=1).tolist() == [3, 5, 1]
    assert not batch["rows"][~batch["mask"]].any(), "what is filled up is zero"
    for index, text in enumerate(texts):
        assert all(torch.equal(value, text[name]) for name, value in text_at(batch, index).items())


def test_batches_of_other_lengths_become_one():
    both = cat_text(stack_texts([one(2, 1.0)]), stack_texts([one(4, 2.0), one(3, 3.0)]))
    assert both["rows"].shape == (3, 4, 2) and both["mask"].sum(dim=1).tolist() == [2, 4, 3]
    assert both["rows"][:, 0, 0].tolist() == [1.0, 2.0, 3.0]


def test_texts_without_a_mask_are_stacked_as_they_are():
    texts = [{"t5": torch.full((4, 2), value), "pooled": torch.full((3,), value)} for value in (1.0, 2.0)]
    batch = stack_texts(texts)
    assert torch.equal(batch["t5"], torch.stack([text["t5"] for text in texts]))
    assert torch.equal(text_at(batch, 1)["pooled"], texts[1]["pooled"])


def test_a_batch_without_padding_needs_no_mask():
    assert padding_mask(stack_texts([one(3, 1.0), one(3, 2.0)]), CPU) is None
    mask = padding_mask(stack_texts([one(3, 1.0), one(2, 2.0)]), CPU)
    assert mask is not None and mask.tolist() == [[True] * 3, [True, True, False]]
