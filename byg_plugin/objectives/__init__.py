"""Objectives by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from byg_plugin.objectives.base import Objective
from byg_plugin.objectives.paired import Paired
from byg_plugin.objectives.unpaired_cycle import UnpairedCycle

if TYPE_CHECKING:
    from byg_plugin.config.sections import ObjectiveConfig


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that `[objective] name` asks for."""
    if config.name == "paired":
        return Paired()
    assert config.name == "unpaired_cycle", config.name
    return UnpairedCycle(config)
