"""Texts that stand in a tuples file where nobody knows one: benchmarks have instructions alone, and a tuple has four texts."""

from __future__ import annotations

PLACEHOLDERS = {
    "src_caption": "the picture that is given",
    "tgt_caption": "the picture that is asked for",
    "reverse_instruction": "do the inverse of the instruction",
}
"""By the fields of a tuple. They break no rule of tuples and say nothing."""


def known(role: str, text: str | None) -> str | None:
    """The text, unless it is blank or the role's placeholder."""
    return text if text and text.strip() and text != PLACEHOLDERS.get(role) else None
