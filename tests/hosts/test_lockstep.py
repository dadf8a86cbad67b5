"""Calls of a sharded network: every process makes as many, of the same experts, in the same order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin.hosts import lockstep

CPU = torch.device("cpu")


class Others:
    """The other processes: what they want, round by round."""

    def __init__(self, *rounds: list[bool]):
        self.rounds = list(rounds)

    def agree(self, wanted: list[bool], device: torch.device) -> list[bool]:
        other = self.rounds.pop(0) if self.rounds else [False] * len(wanted)
        return [a or b for a, b in zip(wanted, other, strict=True)]


def run(
    monkeypatch: pytest.MonkeyPatch, others: Others, times: list[list[float]], boundary: float | None
) -> tuple[list[Any], list[Tensor]]:
    """The experts called, with their times, and what came of each call."""
    monkeypatch.setattr(lockstep, "agree", others.agree)
    called: list[Any] = []

    def call(high: bool, noisy: Tensor, t: Tensor, text: Any, source: Tensor | None) -> Tensor:
        called.append((high, [round(value, 2) for value in t.tolist()]))
        return noisy * (2.0 if high else 3.0)

    made = []
    with lockstep.in_lockstep(call, boundary, CPU) as velocity:
        for t in times:
            made.append(velocity(torch.ones(len(t), 1), torch.tensor(t), {"umt5": torch.zeros(len(t), 2)}, None))
    return called, made


def test_an_expert_that_another_process_needs_is_called_and_its_result_dropped(monkeypatch: pytest.MonkeyPatch):
    called, made = run(monkeypatch, Others([True, True], [False, True]), [[0.95, 0.9], [0.9, 0.95]], 0.875)
    assert called == [(True, [0.95, 0.9]), (False, [0.95]), (True, [0.9, 0.95]), (False, [0.9])]
    assert all(torch.equal(each, torch.full((2, 1), 2.0)) for each in made)


def test_a_batch_on_both_sides_is_split_and_joined(monkeypatch: pytest.MonkeyPatch):
    called, made = run(monkeypatch, Others(), [[0.5, 0.95, 0.6]], 0.875)
    assert called == [(True, [0.95]), (False, [0.5, 0.6])]
    assert made[0].flatten().tolist() == [3.0, 2.0, 3.0]


def test_a_process_that_is_done_takes_part_until_all_are(monkeypatch: pytest.MonkeyPatch):
    called, _ = run(monkeypatch, Others([False, True], [False, True], [True, False]), [[0.95]], 0.875)
    assert called == [(True, [0.95]), (False, [0.95]), (False, [0.95]), (True, [0.95])]
    one_network, _ = run(monkeypatch, Others([True], [True], [True]), [[0.95]], None)
    assert one_network == [(True, [0.95])] * 3
