"""What is drawn for an optimizer step, the same on every host and for every objective: the experts' side, and t."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from byg_plugin import timesteps
from byg_plugin.randomness import coin

if TYPE_CHECKING:
    from byg_plugin.config.objective import ObjectiveConfig
    from byg_plugin.config.sections import Config


def law_of_t(objective: ObjectiveConfig) -> dict[str, Any]:
    """The keywords of `timesteps` that say how t is distributed."""
    return {"distribution": objective.t_distribution, "s": objective.t_shift, "t_min": objective.t_min, "t_max": objective.t_max}


def share_of_high_noise(config: Config, boundary: float | None) -> float | None:
    """Probability that a step trains the high-noise expert; None for a family without experts.

    Raises:
        ValueError: the law of t never reaches an expert that is to be trained.
    """
    if boundary is None:
        return None
    objective = config.objective
    share = timesteps.probability_above(boundary, **law_of_t(objective))
    wanted = {"high_noise": share, "low_noise": 1 - share}
    if config.lora.experts in wanted:
        wanted = {config.lora.experts: wanted[config.lora.experts]}
    for expert, probability in wanted.items():
        if not probability:
            raise ValueError(
                f"objective.t_min = {objective.t_min} and objective.t_max = {objective.t_max} lie on one side of the experts' boundary "
                f"t = {boundary}: the {expert.replace('_', '-')} expert would never be trained; widen them"
            )
    return {"high_noise": 1.0, "low_noise": 0.0}.get(config.lora.experts, share)


def side_of(seed: int, high_share: float | None, step: int) -> bool | None:
    """Whether an optimizer step trains the high-noise expert: one toss, the same on every rank; None without experts."""
    return None if high_share is None else coin(seed, step, high_share, "expert")


def draw_t(objective: ObjectiveConfig, size: int, rng: torch.Generator, boundary: float | None, high: bool | None) -> Tensor:
    """(size,) times of the configured law; `high` (of `side_of`): on that side of the experts' boundary."""
    law = law_of_t(objective)
    if high is None:
        return timesteps.sample_t(size, rng, **law)
    assert boundary is not None
    return timesteps.sample_t_beside(size, rng, boundary, high, **law)
