"""A critic that cannot tell Yes from No is refused with its figures."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from byg_plugin.critics import probe
from byg_plugin.critics.critic import Critic
from byg_plugin.critics.questions import KEPT, MADE, Question
from byg_plugin.critics.vlm import Features
from tests.support.critic_runs import critic
from tests.support.tiny_critics import critic_config


def pictures(count: int = 3) -> list[Tensor]:
    return list(torch.rand(count, 3, 24, 32, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1)


class Knowing:
    """Answers by the pictures themselves: what was done, or, with `of = None`, always Yes."""

    device = torch.device("cpu")

    def __init__(self, knows: Sequence[str]):
        self._knows = knows

    def features(self, picture: Tensor) -> Features:
        return Features(tokens=picture.flatten(1))

    def logits(self, question: Question, shown: Sequence[Features]) -> Tensor:
        source, edited = (each.tokens.reshape(3, 24, 32) for each in shown)
        if question.name not in self._knows:
            return torch.tensor([0.0, 1.0])
        if question.name == KEPT:
            yes = torch.equal(source, edited)
        else:
            yes = any(torch.equal(edit(source), edited) for text, edit in probe.EDITS if text in question.text)
        return torch.tensor([0.0, 1.0]) if yes else torch.tensor([1.0, 0.0])


def knowing(*knows: str) -> Critic:
    return Critic(Knowing(knows), None, critic_config("x"))  # type: ignore[arg-type]


def test_of_the_known_questions_half_are_yes_and_each_question_is_asked_both_ways():
    pairs = probe.known_pairs(pictures())
    assert len(pairs) == probe.PAIRS == 32
    answers = [(pair.question.name, pair.question.answer) for pair in pairs]
    assert all(answers.count((name, answer)) == 8 for name in (MADE, KEPT) for answer in (True, False))
    assert len({pair.question.text for pair in pairs}) == 2 * len(probe.EDITS)


def test_one_that_knows_is_taken():
    assert probe.refuse_a_blind_one(knowing(MADE, KEPT), pictures(), 1.0, "x") == probe.Probed(right=1.0, yes=1.0, no=1.0)


def test_one_that_always_says_yes_is_refused_with_its_figures():
    with pytest.raises(ValueError, match=r"critic\.path = x: answers 50% of 32 known .* \(100% where Yes is right, 0% where No is\)"):
        probe.refuse_a_blind_one(knowing(), pictures(), 0.75, "x")


def test_one_that_knows_one_of_the_two_questions_is_at_the_limit():
    found = probe.probe(knowing(MADE), probe.known_pairs(pictures()))
    assert found == probe.Probed(right=0.75, yes=1.0, no=0.5)
    probe.refuse_a_blind_one(knowing(MADE), pictures(), 0.75, "x")


def test_a_random_model_is_refused():
    with pytest.raises(ValueError, match="it would teach nothing; choose a stronger model"):
        probe.refuse_a_blind_one(critic(), pictures(), 0.75, "x")
