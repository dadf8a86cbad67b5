"""Objectives by name: one line here and one file make one."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from byg_plugin.objectives.base import Objective

if TYPE_CHECKING:
    from byg_plugin.config.sections import ObjectiveConfig

OBJECTIVES = {
    "unpaired_cycle": "byg_plugin.objectives.unpaired_cycle:UnpairedCycle",
    "paired": "byg_plugin.objectives.paired:Paired",
}


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that `[objective] name` asks for; its file is imported here and not before."""
    module, _, name = OBJECTIVES[config.name].partition(":")
    made: Objective = getattr(import_module(module), name)(config)
    return made
