"""Engines by name, one file each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from byg_plugin.config.sections import TrainConfig
from byg_plugin.training.engine import Adapters, Engine
from byg_plugin.training.engines.plain import PlainEngine

if TYPE_CHECKING:
    from byg_plugin.training.launch import Launch


def make_engine(launch: Launch, train: TrainConfig, adapters: Adapters, accumulation: int, device: torch.device) -> Engine:
    """The engine of a run.

    Args:
        launch: what the launcher asks for.
        train: the `[train]` section.
        adapters: what is trained.
        accumulation: micro-steps of an optimizer step.
        device: of the weights.
    """
    if launch.stage in (1, 2):
        from byg_plugin.training.engines.zero import ZeroEngine

        return ZeroEngine(train, adapters, accumulation, device, launch.deepspeed)
    return PlainEngine(train, adapters, accumulation, device)
