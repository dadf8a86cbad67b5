"""The `[objective]` section of supervised editing. No torch: every command reads a configuration."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from byg_plugin.config.objective import EmaDecay, LawOfT, LeastT, MostT, ObjectiveConfig, ShiftOfT


class PairedConfig(ObjectiveConfig):
    """The supervised baseline (Eq. 1)."""

    implementation: ClassVar[str] = "byg_plugin.objectives.paired:Paired"
    requires: ClassVar[frozenset[str]] = frozenset({"target"})

    name: Literal["paired"] = Field("paired", description="The supervised baseline (Eq. 1): every tuple has a `target`.")
    ema_decay: EmaDecay = 0.99
    t_distribution: LawOfT = "uniform"
    t_shift: ShiftOfT = 1.0
    t_min: LeastT = 0.0
    t_max: MostT = 1.0
