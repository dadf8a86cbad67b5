"""Supervised editing (Eq. 1): the baseline that every ratio is taken against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from byg_plugin import flow
from byg_plugin.objectives.base import EDIT, Backward, Batch, Metrics, Plan, StepMemory, VelocityFields

if TYPE_CHECKING:
    from byg_plugin.objectives.paired_config import PairedConfig


class Paired:
    """L_edit = ||(noise - y) - edit(y_t, t, c, x)||^2 with the true edited latents y. Knows no identity steps."""

    adapters = averaged = (EDIT,)
    memory = StepMemory()

    def __init__(self, config: PairedConfig):
        self.config = config

    def plan(self, step: int, seed: int) -> Plan:
        """Every step is the same."""
        return Plan()

    def step(self, fields: VelocityFields, batch: Batch, backward: Backward | None) -> Metrics:
        """See `objectives.base.Objective.step`.

        Raises:
            ValueError: the batch has no target.
        """
        if batch.target is None:
            raise ValueError('objective.name = "paired" needs a `target` image in every tuple')
        y_t = flow.interpolate(batch.target, batch.noise, batch.t)
        with torch.set_grad_enabled(backward is not None), fields.edit() as velocity:
            v = velocity(y_t, batch.t, batch.instruction, batch.source)
            loss = flow.mean_squared(v - flow.path_velocity(batch.target, batch.noise)).mean()
            if backward is not None:
                backward(loss, last=True)
        return {"loss": loss.detach()}
