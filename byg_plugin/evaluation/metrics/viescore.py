"""VIEScore (Ku et al. 2024; their code is MIT, nothing of it is here) of the answers that dataset_tools/judge.py has collected.

Two questions of two numbers, 0 to 10: semantic consistency (was the edit made; is the rest kept) of source and edit, perceptual
quality (natural; free of artifacts) of the edit alone.

- official: vie_semantic and vie_quality are the lesser of their two numbers.
- paper: vie_semantic is the edit's success, vie_quality the freedom from artifacts, as sections 5.1.2 and 5.2 of the ByG paper describe
  them; that is our reading, the paper gives no formula.

vie_overall is their geometric mean, item by item. What could not be read has no score and counts in vie_unread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.judged import QUALITY, SEMANTIC
from byg_plugin.evaluation.metrics.answers import JudgedMetric
from byg_plugin.evaluation.metrics.base import Options, Scores


def aspect(numbers: Mapping[str, float], reading: str, alone: str) -> float:
    """Of two numbers the lesser one ("official"), or the one named `alone` ("paper")."""
    return float(min(numbers.values()) if reading == "official" else numbers[alone])


def overall(semantic: float | None, quality: float | None) -> float | None:
    """Geometric mean; None where one is not known."""
    return None if semantic is None or quality is None else (semantic * quality) ** 0.5


class VieScore(JudgedMetric):
    """See the module."""

    columns: ClassVar[Mapping[str, bool]] = {
        **dict.fromkeys(("vie_overall", "vie_semantic", "vie_quality"), True),
        **{f"vie_{part}": True for part in (*SEMANTIC.parts, *QUALITY.parts)},
        "vie_unread": False,
    }
    question_set = "viescore"

    def __init__(self, options: Options):
        super().__init__(options)
        self._reading = options.vie_reading
        self.settings = {**self.settings, "reading": options.vie_reading}

    def __call__(self, seen: Seen) -> Scores:
        """Eight columns."""
        read, unread = self.numbers(seen.item)
        semantic, quality = (
            None if one.name not in read else aspect(read[one.name], self._reading, alone)
            for one, alone in ((SEMANTIC, "success"), (QUALITY, "artifacts"))
        )
        parts = {f"vie_{part}": read.get(one.name, {}).get(part) for one in (SEMANTIC, QUALITY) for part in one.parts}
        return {
            "vie_overall": overall(semantic, quality),
            "vie_semantic": semantic,
            "vie_quality": quality,
            **parts,
            "vie_unread": float(unread),
        }
