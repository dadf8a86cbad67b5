"""What a model has said of edits: the lines that `dataset_tools/judge.py` writes, `evaluate.py --judged` reads.

A line is one of `scores.jsonl`: id, metric (the question), of (what was looked at), scores, and `by`: model and words. Answers that
could not be read lie in the rejects beside it; they are counted, and never scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byg_plugin.evaluation.items import Item
from byg_plugin.journal import numbered_records
from byg_plugin.user_files import file_digest

_ENOUGH = 5  # answers that may agree by chance


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a judge is asked in one request.

    Attributes:
        name: of the lines with its answers.
        parts: what the numbers of an answer are, in their order.
        least, most: of each number.
        with_source: whether the source is shown beside the edit.
    """

    name: str
    parts: tuple[str, ...]
    least: int
    most: int
    with_source: bool = True


SEMANTIC = Question(name="vie_semantic", parts=("success", "preservation"), least=0, most=10)
QUALITY = Question(name="vie_quality", parts=("naturalness", "artifacts"), least=0, most=10, with_source=False)
IMGEDIT = Question(name="imgedit", parts=("compliance", "seamlessness", "fidelity"), least=1, most=5)
QUESTIONS = {"viescore": (SEMANTIC, QUALITY), "imgedit": (IMGEDIT,)}
"""By what judge.py is asked for, which is also the metric's name."""


def keys_of(item: Item, questions: Iterable[Question]) -> dict[str, str]:
    """By question: names what is looked at. Another edit, source or instruction has another one."""
    looked_at = [file_digest(item.source), file_digest(item.edit), item.instruction]
    return {one.name: hashlib.sha256(json.dumps([one.name, *looked_at]).encode()).hexdigest()[:16] for one in questions}


def rejects_of(path: Path) -> Path:
    """Where the answers lie that could not be read."""
    return path.with_name(f"{path.stem}.rejects.jsonl")


class Judged:
    """The answers of some files.

    Args:
        paths: of one judge, e.g. of its shards.
        questions: whose.

    Raises:
        ValueError: a file is not there, a line is damaged, or the answers are of several judges.
    """

    def __init__(self, paths: Sequence[Path], questions: Sequence[Question]):
        self.questions = {one.name: one for one in questions}
        self._answers: dict[str, Mapping[str, float]] = {}
        self._unread: set[str] = set()
        self._keys: dict[str, dict[str, str]] = {}
        self.by: Mapping[str, Any] = {}
        for path in paths:
            if not path.is_file():
                raise ValueError(f"--judged {path}: no such file; python dataset_tools/judge.py --edits DIR --out {path} writes it")
            for number, record in numbered_records(path):
                self._add(path, number, record)
            for number, record in numbered_records(rejects_of(path)) if rejects_of(path).is_file() else ():
                by = record.get("by")
                self._one_judge(rejects_of(path), number, by if isinstance(by, dict) else self.by)
                self._unread.add(str(record.get("of")))

    def _add(self, path: Path, number: int, record: Mapping[str, Any]) -> None:
        of, scores, by = record.get("of"), record.get("scores"), record.get("by")
        question = self.questions.get(str(record.get("metric")))
        if question is None:
            return  # another question of the same file
        if not (isinstance(of, str) and isinstance(by, dict) and isinstance(scores, dict) and _fits(question, scores)):
            raise ValueError(f"--judged {path}: line {number} has not the scores of {question.name}; remove it")
        self._one_judge(path, number, by)
        self._answers[of] = scores

    def _one_judge(self, path: Path, number: int, by: Mapping[str, Any]) -> None:
        if self.by and by != self.by:
            raise ValueError(
                f"--judged {path}: line {number} is by {_words(by)}, earlier ones by {_words(self.by)}: scores of two judges cannot be "
                f"compared; give each its own file"
            )
        self.by = by

    def lacking(self, items: Sequence[Item]) -> list[str]:
        """Problems: items of which nothing was asked, or of which another edit was looked at."""
        known = self._answers.keys() | self._unread
        return [
            f"{item.id}: not judged as it is now ({', '.join(missing)}); run dataset_tools/judge.py again with the same --out"
            for item in items
            if (missing := [name for name, key in self._keys_of(item).items() if key not in known])
        ]

    def answers(self, item: Item) -> dict[str, Mapping[str, float] | None]:
        """By question, the numbers by part; None where the answer could not be read."""
        return {name: self._answers.get(key) for name, key in self._keys_of(item).items()}

    def _keys_of(self, item: Item) -> dict[str, str]:
        if item.id not in self._keys:
            self._keys[item.id] = keys_of(item, self.questions.values())
        return self._keys[item.id]


def sameness(answers: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """Words for a judge that gives everything the same numbers: it does not look, or does not understand.

    Args:
        answers: by question.
    """
    return [
        f"{name}: all {len(given)} answers are the same ({_numbers(given[0])}): this judge tells nothing apart"
        for name, given in answers.items()
        if len(given) >= _ENOUGH and all(one == given[0] for one in given)
    ]


def _fits(question: Question, scores: Mapping[str, Any]) -> bool:
    known = scores.keys() == {*question.parts}
    return known and all(type(value) in (int, float) and question.least <= value <= question.most for value in scores.values())


def _words(by: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in by.items())


def _numbers(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in scores.items())
