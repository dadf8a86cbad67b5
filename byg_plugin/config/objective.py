"""What every objective's section has, and where the sections are declared: each beside its objective."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from byg_plugin.config.fields import Probability, Section, Shift
from byg_plugin.families.spec import FamilySpec

# objective.name -> its section, `module:Class`; that class names the objective. A new objective is one line here and its file.
OBJECTIVES = {
    "unpaired_cycle": "byg_plugin.objectives.unpaired_cycle_config:UnpairedCycleConfig",
    "paired": "byg_plugin.objectives.paired_config:PairedConfig",
    "np_edit": "byg_plugin.objectives.np_edit_config:NpEditConfig",
}
DEFAULT = "unpaired_cycle"

# Keys that several objectives have, with one meaning; a section gives the defaults.
EmaDecay = Annotated[
    float,
    Field(
        ge=0.0,
        le=0.99999,
        description="Decay of the rollout's weights, an optimizer step; 0 = current weights (default for Wan). At most 0.99999: a mean "
        "over 100,000 steps.",
    ),
]
LawOfT = Annotated[Literal["uniform", "logit_normal"], Field(description="Law of the training t; default for Wan: logit_normal.")]
ShiftOfT = Annotated[Shift, Field(description="t <- s t / (1 + (s - 1) t); 1 = none; default for Wan: 12.")]
LeastT = Annotated[Probability, Field(description="Smallest t that is drawn.")]
MostT = Annotated[Probability, Field(description="Largest t that is drawn.")]
_LEAST_RANGE = 1e-6  # of t, which is float32


class ObjectiveConfig(Section):
    """One objective's section. A subclass declares the keys; the order is that of the JSON in a LoRA's metadata."""

    if TYPE_CHECKING:
        name: str
        ema_decay: EmaDecay
        t_distribution: LawOfT
        t_shift: ShiftOfT
        t_min: LeastT
        t_max: MostT

    implementation: ClassVar[str]
    """`module:Class` of the `objectives.base.Objective`."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """What a tuple must have beyond its source and its four texts: "target"."""
    on_musubi: ClassVar[bool] = False
    """Whether musubi-tuner can be its host."""
    takes_experts: ClassVar[bool] = True
    """Whether it trains a family of two experts."""
    rhythm: ClassVar[tuple[str, ...]] = ()
    """Keys that say which step trains which adapter: a run that goes on changes nothing of the steps that were made."""
    may_ask_none: ClassVar[bool] = False
    """Whether `[critic]` may stand where no critic is asked: an ablation by one key leaves the rest of a recipe as it is."""
    fresh_noises: ClassVar[int] = 0
    """Noises of a sample beyond the first."""

    @classmethod
    def sampled(cls, section: Mapping[str, Any], spec: FamilySpec) -> dict[str, Any]:
        """Defaults of `[sample]` for what it trains, from its own raw section; none: the family's."""
        return {}

    def texts_beside(self, spec: FamilySpec) -> dict[str, str]:
        """Texts that no tuple has and that its steps need, by the names it finds their encodings by."""
        return {}

    def doubts(self, spec: FamilySpec) -> tuple[str, ...]:
        """What may be no good with a family, as warnings."""
        return ()

    def doubts_of_types(self, types: Set[str | None]) -> tuple[str, ...]:
        """The same of the values of `edit_type` that the tuples have; None: a tuple has none."""
        return ()

    @property
    def few_steps(self) -> int | None:
        """Steps of the stochastic sampler that it trains for; None: any sampler of the family."""
        return None

    def doubts_of_steps(self, steps: int) -> tuple[str, ...]:
        """The same of a run of so many steps."""
        return ()

    def doubts_of_log(self, every: int, steps: int) -> tuple[str, ...]:
        """The same of a log of one step in `every`."""
        return ()

    @property
    def repeats_passes(self) -> bool:
        """Whether a step makes a pass twice and counts on one value of both."""
        return False

    @property
    def criticised_from(self) -> int:
        """Updates of the editor before the first one that asks a critic."""
        return 0

    @property
    def asked_types(self) -> tuple[str, ...]:
        """Edit types that a user has named for a critic; none: all."""
        return ()

    @property
    def named_types(self) -> dict[str, tuple[str, ...]]:
        """By key the edit types that a user has named, each of which some tuple must have."""
        return {}

    @property
    def criticised(self) -> bool:
        """Whether its steps ask a critic."""
        return False

    @property
    def rollout(self) -> tuple[int, str] | None:
        """(steps, schedule) of its rollouts; None: it has none."""
        return None

    @property
    def merges_rollout(self) -> bool:
        """Whether the rollout's LoRA is multiplied into a second copy of the adapted linears."""
        return False

    @property
    def joins_passes(self) -> bool:
        """Whether a step makes several forward passes before a backward pass."""
        return False

    def trains_nothing(self, steps: int) -> str | None:
        """Why a run of so many steps would train nothing, with the remedy; None: it trains."""
        return None

    @model_validator(mode="after")
    def _check_range_of_t(self) -> ObjectiveConfig:
        if self.t_min >= self.t_max:
            raise ValueError(f"objective.t_min = {self.t_min} must be below objective.t_max = {self.t_max}: the range of t is empty")
        if self.t_max - self.t_min < _LEAST_RANGE:
            raise ValueError(
                f"objective.t_min = {self.t_min} and objective.t_max = {self.t_max} are one number in float32: the range of t is empty"
            )
        return self
