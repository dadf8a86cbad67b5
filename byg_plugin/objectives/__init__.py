"""Objectives: each declares its section in a file without torch, and `config.objective.OBJECTIVES` lists them."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from byg_plugin.config.objective import ObjectiveConfig
    from byg_plugin.objectives.base import Objective


def no_critic(name: str) -> str:
    """The message for an objective that asks a critic where there is none."""
    return (
        f'objective.name = "{name}" asks a critic, a vision-language model, and there is none here: '
        "switch it off (objective.vlm = false, or leave objective.critique_types out)"
    )


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective whose section it is; its file is imported here and not before."""
    return cast("Objective", resolve_name(config.implementation)(config))
