"""Encoded texts in batches and out of them, those of several lengths too.

An encoding is named tensors. Where texts keep their own lengths, `mask` (L,) says which rows are text, and every other tensor has L rows
too: what is stored is text alone, and a batch is filled up with zeros. An encoding without `mask` has one length for all texts.

Beside a batch of them, `guidance` (B,) stands above the configured value of the guidance embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MASK = "mask"
GUIDANCE = "guidance"


def text_at(batch: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """One text of a batch, without batch and without rows that are no text."""
    one = {name: value[index] for name, value in batch.items()}
    return {name: value[one[MASK]] for name, value in one.items()} if MASK in one else one


def stack_texts(texts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Single texts as a batch."""
    return cat_text(*({name: value[None] for name, value in text.items()} for text in texts))


def cat_text(*batches: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Texts of several batches as one batch."""
    if MASK in batches[0]:
        length = max(batch[MASK].shape[1] for batch in batches)
        batches = tuple({name: _filled_up(value, length) for name, value in batch.items()} for batch in batches)
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _filled_up(rows: Tensor, length: int) -> Tensor:
    """(B, L, ...) -> (B, length, ...) with zeros after what is there."""
    missing = length - rows.shape[1]
    return torch.cat([rows, rows.new_zeros(len(rows), missing, *rows.shape[2:])], dim=1) if missing else rows


def padding_mask(batch: Mapping[str, Tensor], device: torch.device) -> Tensor | None:
    """(B, L) bool, true where a row is text; None where every row is, so that attention can do without."""
    mask = batch[MASK]
    return None if bool(mask.all()) else mask.to(device)
