"""What metrics of a judge's answers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.items import Item
from byg_plugin.evaluation.judged import QUESTIONS, Judged, sameness
from byg_plugin.evaluation.metrics.base import Options, Scores


class JudgedMetric:
    """A metric of a judge's answers; a subclass says its `question_set`, a name in `QUESTIONS`, and what becomes of them."""

    columns: ClassVar[Mapping[str, bool]]
    texts: ClassVar[tuple[str, ...]] = ("instruction",)
    question_set: ClassVar[str]

    def __init__(self, options: Options):
        if not options.judged:
            name = self.question_set
            raise ValueError(
                f"--metrics {name} needs --judged FILE: python dataset_tools/judge.py --edits DIR --ask {name} --out FILE makes it"
            )
        self.judged = Judged(options.judged, QUESTIONS[self.question_set])
        self.settings: Mapping[str, Any] = {"by": dict(self.judged.by)}

    def numbers(self, item: Item) -> tuple[dict[str, Mapping[str, float]], bool]:
        """The answers that could be read, by question, and whether one could not."""
        answers = self.judged.answers(item)
        read = {name: numbers for name, numbers in answers.items() if numbers is not None}
        return read, len(read) < len(answers)

    def sameness(self, items: Sequence[Item]) -> list[str]:
        """See `sameness`."""
        read = [self.numbers(item)[0] for item in items]
        return sameness({name: [one[name] for one in read if name in one] for name in self.judged.questions})

    def __call__(self, seen: Seen) -> Scores:
        """The scores of one item."""
        raise NotImplementedError
