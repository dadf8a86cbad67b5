"""Whether a critic can tell Yes from No: questions about pictures whose right answers are known.

The pairs are made of any pictures: one and itself, one and another one, one and itself in grey, darkened or upside down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from byg_plugin.critics.critic import Critic
from byg_plugin.critics.questions import Question, kept, made

PAIRS = 32
_KINDS = 4  # of pairs, an eighth of them Yes and No each


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A known question: pictures (3, H, W) in [0, 1], and what is asked with its right answer."""

    source: Tensor
    edited: Tensor
    question: Question


def _grey(picture: Tensor) -> Tensor:
    return picture.mean(dim=0, keepdim=True).expand(3, -1, -1)


EDITS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("turn the picture into a black and white picture", _grey),
    ("make the picture much darker", lambda picture: picture * 0.25),
    ("turn the picture upside down", lambda picture: picture.flip(1)),
    ("invert the colours of the picture", lambda picture: 1 - picture),
)
"""Edits that are the same in every picture, with what makes them."""


def known_pairs(pictures: Sequence[Tensor]) -> list[Pair]:
    """`PAIRS` known questions, half of them with the answer Yes, about any pictures.

    Args:
        pictures: (3, H, W) in [0, 1], one or more, taken in turn; of one alone, the other one is what it looks like upside down in its
            opposite colours.
    """
    pictures = pictures if len(pictures) > 1 else [pictures[0], 1 - pictures[0].flip(1)]
    pairs = []
    for number in range(PAIRS // _KINDS):
        picture, other = (pictures[(number + more) % len(pictures)] for more in (0, 1))
        instruction, edit = EDITS[number % len(EDITS)]
        is_made, is_kept = made(instruction), kept(instruction)
        pairs += [
            Pair(source=picture, edited=edit(picture), question=is_made),
            Pair(source=picture, edited=picture, question=_otherwise(is_made)),
            Pair(source=picture, edited=picture, question=is_kept),
            Pair(source=picture, edited=other, question=_otherwise(is_kept)),
        ]
    return pairs


def _otherwise(question: Question) -> Question:
    return Question(name=question.name, pictures=question.pictures, text=question.text, answer=not question.answer)


@dataclass(frozen=True, kw_only=True)
class Probed:
    """How a critic answered.

    Attributes:
        right: share of right answers, of all.
        yes: share of right answers where the right one is Yes.
        no: the same where it is No.
    """

    right: float
    yes: float
    no: float


@torch.no_grad()
def probe(critic: Critic, pairs: Sequence[Pair]) -> Probed:
    """Ask what is known."""
    right: dict[bool, list[bool]] = {True: [], False: []}
    for pair in pairs:
        source = critic.source_features(pair.source)
        _, _, (probability,) = critic.judge(pair.edited.to(critic.vlm.device), source, [pair.question], differentiate=False)
        right[pair.question.answer].append(bool(probability > 0.5))
    yes, no = (sum(right[answer]) / max(1, len(right[answer])) for answer in (True, False))
    return Probed(right=sum(map(sum, right.values())) / len(pairs), yes=yes, no=no)


def refuse_a_blind_one(critic: Critic, pictures: Sequence[Tensor], least: float, path: str) -> Probed:
    """Ask `PAIRS` known questions.

    Raises:
        ValueError: it answers fewer than `least` of them rightly; names the figures.
    """
    found = probe(critic, known_pairs(pictures))
    if found.right < least:
        raise ValueError(
            f"critic.path = {path}: answers {found.right:.0%} of {PAIRS} known questions rightly ({found.yes:.0%} where Yes is right, "
            f"{found.no:.0%} where No is), critic.least_accuracy = {least} asks for more: it would teach nothing; choose a stronger model"
        )
    return found
