"""ImgEdit-Bench's score (Ye et al. 2025; nothing of their code is here) of the answers to dataset_tools/judge.py --ask imgedit.

Three numbers, 1 to 5, of source and edit: does it what was asked, is it seamless, are details and physics right. `imgedit` is
their mean. What could not be read has no score and counts in imgedit_unread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.judged import IMGEDIT
from byg_plugin.evaluation.metrics.answers import JudgedMetric
from byg_plugin.evaluation.metrics.base import Scores


class ImgEdit(JudgedMetric):
    """See the module."""

    columns: ClassVar[Mapping[str, bool]] = {
        "imgedit": True,
        **{f"imgedit_{part}": True for part in IMGEDIT.parts},
        "imgedit_unread": False,
    }
    question_set = "imgedit"

    def __call__(self, seen: Seen) -> Scores:
        """Five columns."""
        read, unread = self.numbers(seen.item)
        numbers = read.get(IMGEDIT.name, {})
        mean = sum(numbers.values()) / len(numbers) if numbers else None
        return {"imgedit": mean, **{f"imgedit_{part}": numbers.get(part) for part in IMGEDIT.parts}, "imgedit_unread": float(unread)}
