"""A micro-batch's randomness: every noise is another one."""

from __future__ import annotations

from itertools import combinations

import torch

from byg_plugin.data.rules import ROLES
from byg_plugin.hosts.batch import draw_batch
from byg_plugin.objectives.np_edit_config import NpEditConfig
from byg_plugin.randomness import generator
from tests.support.critic_runs import flux, latents


def test_fresh_noises_differ_from_each_other_and_from_the_first():
    source = latents(6, 6, 2, torch.float32)
    texts = {role: {"t5": torch.zeros(2, 3, 4)} for role in ROLES}

    def drawn(seed: int) -> list[torch.Tensor]:
        batch = draw_batch(NpEditConfig(), flux(), source, texts, generator(seed, "noise", 0), torch.device("cpu"), kind="full-1")
        return [batch.noise, *batch.fresh]

    noises = drawn(0)
    assert len(noises) == 3
    for one, other in combinations([sample for noise in noises for sample in noise], 2):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.3, "samples of all noises are independent"
    assert all(torch.equal(one, again) for one, again in zip(noises, drawn(0), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(noises, drawn(1), strict=True))
