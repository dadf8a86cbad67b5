"""The `[objective]` section of NP-Edit. No torch: every command reads a configuration.

Where a number is from: [N] notes on the paper, [R] its author's public code, [D] DMD2's code, [I] decided here.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from byg_plugin.config.critic import REMOVE
from byg_plugin.config.fields import EditTypes, Probability, Scale, Steps, Weight
from byg_plugin.config.objective import EmaDecay, LawOfT, LeastT, MostT, ObjectiveConfig, ShiftOfT
from byg_plugin.families.spec import FamilySpec

TeacherGuidance = Annotated[Scale, Field(ge=1.0)]
DO_NOTHING, NEGATIVE = "do_nothing", "negative"
"""Names of the texts that no tuple has."""


class NpEditConfig(ObjectiveConfig):
    """NP-Edit: a few-step editor taught by a vision-language model, held among images by distribution matching."""

    implementation: ClassVar[str] = "byg_plugin.objectives.np_edit:NpEdit"
    takes_experts: ClassVar[bool] = False
    rhythm: ClassVar[tuple[str, ...]] = ("fake_updates", "identity_warmup_steps", "dmd")
    may_ask_none: ClassVar[bool] = True
    fresh_noises: ClassVar[int] = 2

    name: Literal["np_edit"] = Field("np_edit", description="NP-Edit; no pairs, a few-step editor.")
    ema_decay: EmaDecay = 0.999  # [R]
    sampling_steps: Annotated[int, Field(ge=1, le=16)] = Field(  # [N]
        4, description="Steps that the editor is trained to edit in; a training step unrolls one or two of them."
    )
    schedule: Literal["uniform", "shifted"] = Field("shifted", description="Nodes of those steps (family's shift).")  # [R]
    lambda_vlm: Weight = Field(0.02, description="Weight of the critic's loss.")  # [R]
    lambda_dmd: Weight = Field(1.0, description="Weight of distribution matching.")  # [R]
    lambda_id: Weight = Field(1.0, description='Weight of the latent MSE of an identity step ("do nothing.").')  # [R]
    fake_updates: Annotated[int, Field(ge=1, le=100)] = Field(  # [R] [D]
        5, description="Optimizer steps of the fake score before each one of the editor."
    )
    guidance: TeacherGuidance = Field(  # [R]
        3.5,
        description="Classifier-free guidance of the frozen teacher, 1 = none (of every family: below, it would teach the negative text).",
    )
    strong_guidance: TeacherGuidance = Field(7.5, description="The same for the edit types of `strong_types`.")  # [R]
    strong_types: EditTypes = Field(  # [R]
        ("remove", "shape_adjustment", "style_change", "action_change"),
        description="Values of a tuple's `edit_type` with the stronger guidance.",
    )
    negative: Annotated[str, Field(max_length=10_000)] | None = Field(  # [R]: "low quality, artifacts"
        None,
        description='Text of the teacher\'s other branch, which guidance leads away from, e.g. "low quality, artifacts" as the public code '
        "has it; default: the family's own.",
    )
    dmd_t_min: Probability = Field(0.02, description="Smallest t that distribution matching compares scores at.")  # [R] [D]
    dmd_t_max: Probability = Field(0.98, description="Largest t of that.")  # [R] [D]
    t_distribution: LawOfT = "uniform"  # [R]
    t_shift: ShiftOfT = 1.0  # [R]
    t_min: LeastT = 0.0  # [R]
    t_max: MostT = 1.0  # [R]
    identity_warmup_steps: Steps = Field(  # [N]; [R]: 5000, of a full fine-tune
        1000, description="First optimizer steps, in which the editor learns to copy the source by flow matching."
    )
    identity_probability: Probability = Field(0.01, description='Chance that a step of the editor is "do nothing.".')  # [R]
    vlm: bool = Field(True, description="Ablation: false asks no critic.")
    identity_question: bool = Field(True, description="Ablation: false asks the critic for the edit alone, not whether the rest is kept.")
    dmd: bool = Field(True, description="Ablation: false drops distribution matching, and with it the fake score.")

    @classmethod
    def sampled(cls, section: Mapping[str, Any], spec: FamilySpec) -> dict[str, Any]:
        """See `ObjectiveConfig.sampled`: few stochastic steps without guidance."""
        defaults = {key: cls.model_fields[key].default for key in ("sampling_steps", "schedule")}
        given = {key: section.get(key, default) for key, default in defaults.items()}
        # What is of another type is told of its own key.
        steps, schedule = (given[key] if type(given[key]) is type(default) else default for key, default in defaults.items())
        guided = {"cfg_high_noise": spec.unguided} if spec.guidance == "classifier_free" else {}
        return {"solver": "stochastic", "steps": steps, "schedule": schedule, **guided}

    def texts_beside(self, spec: FamilySpec) -> dict[str, str]:
        """See `ObjectiveConfig.texts_beside`."""
        texts = {DO_NOTHING: "do nothing."} if self.identity_probability else {}  # [R]
        return texts | ({NEGATIVE: spec.negative if self.negative is None else self.negative} if self.guided else {})

    def doubts(self, spec: FamilySpec) -> tuple[str, ...]:
        """See `ObjectiveConfig.doubts`."""
        if not self.guided or spec.guidance != "embedding":
            return ()
        return (
            f"{spec.name} is distilled from a guided model: objective.guidance = {self.guidance} and objective.strong_guidance = "
            f"{self.strong_guidance} guide its teacher a second time, beyond conditioning.guidance; 1 and 1 leave it as it is",
        )

    def doubts_of_log(self, every: int, steps: int) -> tuple[str, ...]:
        """See `ObjectiveConfig.doubts_of_log`: editor and fake score take turns, and all lines may be of one of them."""
        turns, first = self.fake_updates + 1, self.identity_warmup_steps
        logged = {(step - 1 - first) % turns == self.fake_updates for step in range(every, steps + 1, every) if step > first}
        if not self.dmd or len(logged) != 1:
            return ()
        seen, unseen = ("the editor", "the fake score") if True in logged else ("the fake score", "the editor")
        return (
            f"train.log_every = {every}: all lines of the log after copying are steps of {seen} and none of {unseen}, since "
            f"objective.fake_updates = {self.fake_updates} makes turns of {turns} steps; choose a number without a common divisor, e.g. 1",
        )

    @property
    def repeats_passes(self) -> bool:
        """See `ObjectiveConfig.repeats_passes`: what is unrolled is made again, with gradient."""
        return True

    def doubts_of_types(self, types: Set[str | None]) -> tuple[str, ...]:
        """See `ObjectiveConfig.doubts_of_types`."""
        found = f"edit_type in dataset.tuples is {', '.join(sorted(map(repr, types - {None}))) or 'never set'}"
        doubts = []
        if self.guided and self.strong_guidance != self.guidance and self.strong_types and not types & set(self.strong_types):
            doubts.append(
                f"objective.strong_types = {list(self.strong_types)}: no tuple has one of them ({found}); all get objective.guidance"
            )
        if self.criticised and REMOVE not in types:
            doubts.append(f"no tuple has edit_type = {REMOVE!r} ({found}): the critic is asked of removals as of other edits")
        return tuple(doubts)

    @property
    def guided(self) -> bool:
        """Whether the teacher has a second branch."""
        return self.dmd and (self.guidance != 1 or bool(self.strong_types and self.strong_guidance != 1))

    @property
    def rollout(self) -> tuple[int, str]:
        """See `ObjectiveConfig.rollout`."""
        return self.sampling_steps, self.schedule

    @property
    def few_steps(self) -> int:
        """See `ObjectiveConfig.few_steps`."""
        return self.sampling_steps

    @property
    def criticised(self) -> bool:
        """See `ObjectiveConfig.criticised`."""
        return self.vlm and self.lambda_vlm > 0

    @property
    def criticised_from(self) -> int:
        """See `ObjectiveConfig.criticised_from`."""
        return self.identity_warmup_steps

    def trains_nothing(self, steps: int) -> str | None:
        """Copying and the fake score's first steps may be all, or every step of the editor may be "do nothing."."""
        if self.identity_probability == 1:
            return 'objective.identity_probability = 1 makes every step of the editor "do nothing.": no edit would be trained; lower it'
        fake = self.fake_updates if self.dmd else 0
        first = self.identity_warmup_steps + fake
        if steps > first:
            return None
        scored = f" and the fake score's first objective.fake_updates = {fake}" if fake else ""
        return (
            f"train.steps = {steps} are all of copying (objective.identity_warmup_steps = {self.identity_warmup_steps}){scored}: no edit "
            f"would be trained; set train.steps to {first + 1} or more, or lower those"
        )

    @model_validator(mode="after")
    def _check(self) -> NpEditConfig:
        if not self.criticised and not (self.dmd and self.lambda_dmd):
            raise ValueError(
                "objective.vlm and objective.dmd are both switched off or of weight 0: nothing says what an edit is; switch one of them on"
            )
        if self.dmd and not self.lambda_dmd:
            raise ValueError("objective.lambda_dmd = 0 would train a fake score that nothing asks: set objective.dmd = false")
        if not self.identity_question and not self.criticised:
            raise ValueError("objective.identity_question = false is a question less for the critic, which is not asked: leave it out")
        if self.negative is not None and self.dmd and not self.guided:
            raise ValueError(
                f"objective.negative = {self.negative!r:.100} is of the branch that guidance leads away from, and objective.guidance = 1 "
                "without objective.strong_guidance has none: leave it out"
            )
        if self.dmd_t_min >= self.dmd_t_max:
            raise ValueError(
                f"objective.dmd_t_min = {self.dmd_t_min} must be below objective.dmd_t_max = {self.dmd_t_max}: the range of t is empty"
            )
        return self
