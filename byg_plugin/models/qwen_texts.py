"""Texts by a Qwen language model: the chat template of Qwen-Image, which Krea 2 has too, and the rows of its hidden states.

Every text keeps its own number of rows: padding is masked in the networks, which is the same as none (it differs in rounding alone),
and would be most of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
DROPPED = 34
"""Tokens of PREFIX, whose rows the network does not see."""


@dataclass(frozen=True)
class TextEncoder:
    """The language model (the layers that see are not loaded) and its tokenizer."""

    model: nn.Module
    tokenizer: Any


def token_ids(tokenizer: Any, texts: Sequence[str], limit: int | None, *, keeps_suffix: bool) -> list[list[int]]:
    """Ids of the filled-in template, of which `limit` follow the dropped ones at most; None: uncut.

    Args:
        tokenizer: of the language model.
        texts: what the user says.
        limit: tokens after the dropped ones.
        keeps_suffix: whether a text is cut before the template's end (Krea 2), and not the whole (Qwen-Image).
    """
    # verbose=False: the tokenizer would warn of its own model_max_length.
    heads = tokenizer([PREFIX + text for text in texts], truncation=False, verbose=False).input_ids
    suffix = list(tokenizer(SUFFIX).input_ids)
    if limit is None:
        return [[*head, *suffix] for head in heads]
    if keeps_suffix:
        return [[*head[: DROPPED + limit - len(suffix)], *suffix] for head in heads]
    return [[*head, *suffix][: DROPPED + limit] for head in heads]


@torch.no_grad()
def hidden_states(
    encoder: TextEncoder, ids: Sequence[Sequence[int]], layers: Sequence[int], length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Hidden states of some layers, side by side on an axis of their own, of every row, padding too.

    Args:
        encoder: the language model.
        ids: of each text.
        layers: indices into the hidden states, of which 0 is the embedding and the last one is after the final norm.
        length: rows of each; None: of the longest text.

    Returns:
        (B, L, layers, D), and (B, L) whether a row is text; on the CPU.
    """
    device = next(encoder.model.parameters()).device
    lengths = torch.tensor([len(one) for one in ids])
    # Padded on the right: in a causal model nothing before it changes, and positions count from the text's own start.
    padded = torch.full((len(ids), length or int(lengths.max())), encoder.tokenizer.pad_token_id)
    for row, one in zip(padded, ids, strict=True):
        row[: len(one)] = torch.tensor(one)
    mask = torch.arange(padded.shape[1]) < lengths[:, None]
    states = encoder.model(
        input_ids=padded.to(device), attention_mask=mask.to(device, torch.long), output_hidden_states=True, use_cache=False
    ).hidden_states
    return torch.stack([states[layer] for layer in layers], dim=2).cpu(), mask


def hidden_rows(encoder: TextEncoder, ids: Sequence[Sequence[int]], layers: Sequence[int], dropped: int = DROPPED) -> dict[str, Tensor]:
    """Hidden states after the dropped tokens: `qwen` (B, L, layers, D) with zeros after a text's end, and `mask` (B, L); on the CPU."""
    rows, mask = (value[:, dropped:] for value in hidden_states(encoder, ids, layers))
    return {"qwen": torch.where(mask[..., None, None], rows, torch.zeros_like(rows)), "mask": mask}
