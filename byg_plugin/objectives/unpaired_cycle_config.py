"""The `[objective]` section of Algorithm 1. No torch: every command reads a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from byg_plugin.config.fields import EditType, EditTypes, Probability, Rate, Steps, Weight
from byg_plugin.config.objective import EmaDecay, LawOfT, LeastT, MostT, ObjectiveConfig, ShiftOfT


class UnpairedCycleConfig(ObjectiveConfig):
    """Algorithm 1 of the paper, its weights, and one switch per ablation of its Table 4."""

    implementation: ClassVar[str] = "byg_plugin.objectives.unpaired_cycle:UnpairedCycle"
    on_musubi: ClassVar[bool] = True

    name: Literal["unpaired_cycle"] = Field("unpaired_cycle", description="Algorithm 1; no pairs.")
    graph: Literal["sequential", "joint"] = Field("sequential", description="One graph at a time, or the single-graph reference.")
    lambda_cycle: Weight = Field(1.0, description="Weight of the cycle loss.")
    lambda_prior: Weight = Field(1.0, description="Weight of forward and reverse prior losses.")
    lambda_id: Weight = Field(0.2, description="Weight of the identity loss.")
    alpha: Weight = Field(0.1, description="Weight of the MSE inside the prior loss.")
    prior_guidance: Mapping[EditType, Annotated[float, Field(gt=0.0, le=100.0)]] = Field(
        {},
        description="By a tuple's `edit_type`: g of v_src + g (v_tgt - v_src), which the forward prior's MSE pulls to in place of v_tgt, "
        "e.g. { remove = 3.0 }; types that are not named have 1.",
    )
    reverse_prior: bool = Field(
        True,
        description="The prior of the reverse pass too (Eq. 5). Not the paper's: false = of the forward pass alone, as the reverse pass is "
        "told its answer by the cycle loss; two frozen passes a step fewer.",
    )
    ema_decay: EmaDecay = 0.99
    rollout_steps: Annotated[int, Field(ge=2, le=1000)] = Field(
        10, description="Euler steps from noise to y_0; each is a pass through the network, at most 1,000."
    )
    rollout_schedule: Literal["uniform", "shifted"] = Field(
        "uniform", description="Nodes of the rollout (family's shift); default for Wan: shifted."
    )
    rollout_solver: Literal["euler", "ab2"] = Field(
        "euler", description="ab2 = Adams-Bashforth of second order on the same nodes: closer to the path at no call more."
    )
    t_distribution: LawOfT = "uniform"
    t_shift: ShiftOfT = 1.0
    t_min: LeastT = 0.0
    t_max: MostT = 1.0
    identity_warmup_steps: Steps = Field(200, description="First optimizer steps that train the identity term alone.")
    identity_probability: Probability = Field(
        0.15, description="Chance that a later step trains the identity term alone; default for Wan: 0.1."
    )
    identity_step_weight: Weight = Field(1.0, description="Weight of the identity term on an identity step.")
    identity_rate: Rate = Field(
        1.0, description="Chance that a step which is no identity step has the identity term, then with 1 / rate of its weight; 1 = always."
    )
    reverse_rate: Rate = Field(
        1.0, description="The same of the reverse pass (cycle loss and reverse prior). A step without it needs no y_0."
    )
    frozen_batch: Literal[1, 2, 4] = Field(2, description="Frozen-base velocities of one sample evaluated at once.")
    rollout_weights: Literal["swap", "merged"] = Field(
        "swap",
        description="merged = the rollout's LoRA multiplied into a second copy of the adapted linears: no LoRA products in its steps, "
        "more memory; equal up to the rounding of model.dtype.",
    )
    merge_identity: bool = Field(False, description="Batch the identity pass with the reverse pass (small inputs; more memory).")
    critique_types: EditTypes = Field(
        (), description='Values of a tuple\'s `edit_type` whose edits a critic ([critic]) judges too, e.g. ["remove"]; none = no critic.'
    )
    critique_weight: Weight = Field(0.02, description="Weight of the critic's loss.")
    routing: bool = Field(True, description="Ablation: false conditions the reverse pass on the one-step prediction.")
    bootstrap: bool = Field(True, description="Ablation: false feeds x_t instead of the rollout's y_t.")
    cycle: bool = Field(True, description="Ablation: false drops the cycle loss (the reverse prior stays).")
    directional: bool = Field(True, description="Ablation: false keeps only alpha * MSE of the prior.")
    prior: bool = Field(True, description="Ablation: false drops the prior losses.")

    @property
    def rollout(self) -> tuple[int, str]:
        """See `ObjectiveConfig.rollout`."""
        return self.rollout_steps, self.rollout_schedule

    @property
    def merges_rollout(self) -> bool:
        """See `ObjectiveConfig.merges_rollout`."""
        return self.rollout_weights == "merged"

    @property
    def asked_types(self) -> tuple[str, ...]:
        """See `ObjectiveConfig.asked_types`."""
        return self.critique_types

    @property
    def named_types(self) -> dict[str, tuple[str, ...]]:
        """See `ObjectiveConfig.named_types`."""
        return {"critique_types": self.critique_types, "prior_guidance": tuple(self.prior_guidance)}

    @property
    def criticised(self) -> bool:
        """See `ObjectiveConfig.criticised`."""
        return bool(self.critique_types)

    @property
    def criticised_from(self) -> int:
        """See `ObjectiveConfig.criticised_from`."""
        return self.identity_warmup_steps

    @property
    def joins_passes(self) -> bool:
        """See `ObjectiveConfig.joins_passes`."""
        return self.graph == "joint"

    @property
    def repeats_passes(self) -> bool:
        """See `ObjectiveConfig.repeats_passes`: without routing y_hat is made once for its value, once for its gradient."""
        return not self.routing and self.graph == "sequential"

    def doubts_of_steps(self, steps: int) -> tuple[str, ...]:
        """See `ObjectiveConfig.doubts_of_steps`."""
        if self.identity_warmup_steps < steps:
            return ()
        return (
            f"objective.identity_warmup_steps = {self.identity_warmup_steps} makes all of train.steps = {steps} identity steps: copying "
            "is trained, and no edit",
        )

    def trains_nothing(self, steps: int) -> str | None:
        """All steps may be identity steps of the weight 0."""
        if self.identity_step_weight or self.identity_warmup_steps < steps:
            return None
        return (
            f"objective.identity_warmup_steps = {self.identity_warmup_steps} makes all of train.steps = {steps} identity "
            "steps, and objective.identity_step_weight = 0 trains nothing on those: change one of them"
        )

    @model_validator(mode="after")
    def _check(self) -> UnpairedCycleConfig:
        prior = self.lambda_prior and self.prior and (self.directional or self.alpha)
        if not (self.lambda_cycle and self.cycle) and not prior and not self.lambda_id:
            raise ValueError(
                "objective.lambda_cycle, objective.lambda_prior and objective.lambda_id are all 0 or switched off (a prior without "
                "directional needs objective.alpha): nothing is left to train; give one of them a weight"
            )
        if self.identity_probability == 1 and not self.identity_step_weight:
            raise ValueError(
                "objective.identity_probability = 1 makes every step an identity step, and objective.identity_step_weight = 0 trains "
                "nothing on those: change one of them"
            )
        if self.reverse_rate < 1 and not prior:
            raise ValueError(
                f"objective.reverse_rate = {self.reverse_rate} leaves steps without the reverse pass, and without a prior nothing is "
                "left to train on those: set it to 1, or give objective.lambda_prior a weight"
            )
        if not self.reverse_prior and not (self.lambda_cycle and self.cycle):
            raise ValueError(
                "objective.reverse_prior = false leaves the reverse pass to the cycle loss, which is switched off or has no weight: set it "
                "to true, or give objective.lambda_cycle a weight"
            )
        if not self.reverse_prior and not prior:
            raise ValueError("objective.reverse_prior = false: there is no prior, set it to true")
        if self.prior_guidance and not (prior and self.alpha):
            raise ValueError(
                f"objective.prior_guidance = {dict(self.prior_guidance)} guides the prior's MSE, which has no weight: leave it out, or "
                "give objective.lambda_prior and objective.alpha a weight"
            )
        if self.identity_rate < 1 and not self.lambda_id:
            raise ValueError(f"objective.identity_rate = {self.identity_rate} is of no use with objective.lambda_id = 0: leave it out")
        if self.identity_rate < 1 and not prior and not (self.lambda_cycle and self.cycle):
            raise ValueError(
                f"objective.identity_rate = {self.identity_rate} leaves steps without the identity term, and nothing else is "
                "trained: set it to 1"
            )
        if self.critique_types and not prior and not (self.lambda_cycle and self.cycle):
            raise ValueError(
                f"objective.critique_types = {list(self.critique_types)}: the critic judges the edit that the reverse pass is conditioned "
                "on, and without cycle and prior there is none: leave it out"
            )
        if self.critique_types and not self.critique_weight:
            raise ValueError("objective.critique_weight = 0 would ask a critic for nothing: leave objective.critique_types out")
        if not self.critique_types and self.critique_weight != UnpairedCycleConfig.model_fields["critique_weight"].default:
            raise ValueError(
                f"objective.critique_weight = {self.critique_weight} weighs a critic that objective.critique_types does not ask: leave it "
                "out"
            )
        if self.merge_identity and self.graph == "joint":
            raise ValueError("objective.merge_identity batches passes of graph = 'sequential'; set one of the two")
        return self
