"""Objectives: each declares its section in a file without torch, and `config.objective.OBJECTIVES` lists them."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from byg_plugin.config.objective import ObjectiveConfig
    from byg_plugin.objectives.base import Objective


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective whose section it is; its file is imported here and not before."""
    return cast("Objective", resolve_name(config.implementation)(config))
