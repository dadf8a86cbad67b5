"""What is known of a model family before any of its files is opened: data alone, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# The networks of a family: one, or the high-noise expert before the low-noise expert; and what follows the stem of a LoRA file of each.
EXPERT_SUFFIXES = {"transformer": "_high_noise", "transformer_2": "_low_noise"}
HIGH, LOW = EXPERT_SUFFIXES
GuidanceKind = Literal["embedding", "classifier_free"]


@dataclass(frozen=True, kw_only=True)
class ShiftByTokens:
    """A resolution-dependent inference shift: exp(mu), mu linear in the image tokens through two published points.

    Attributes:
        tokens: of the two points.
        mu: at the two points.
        patch: side of the square of latents that is a token.
        terminal: the last time before 0, to which all are stretched after the shift; None: where the shift leaves it.
    """

    tokens: tuple[int, int]
    mu: tuple[float, float]
    patch: int = 2
    terminal: float | None = None


@dataclass(frozen=True, kw_only=True)
class ShiftByTokensAndSteps:
    """FLUX.2's inference shift: exp(mu), mu between two lines in the image tokens by the number of steps; a latent is a token.

    Attributes:
        lines: slope and offset of mu by the two numbers of steps, the smaller first.
        most_tokens: above this many the second line serves alone, whatever the steps.
    """

    lines: Mapping[int, tuple[float, float]]
    most_tokens: int


@dataclass(frozen=True, kw_only=True)
class MusubiSpec:
    """What musubi-tuner has for a family.

    Attributes:
        adapter: `module:Class` of `musubi.family.MusubiFamily`, the call of its network.
        decided: options of the host's script that say which model it is, with their values.
        network_module: of the LoRA, unless `[musubi]` names one.
        text_encoders: the host's options of the text encoders.
        most_swapped: the largest `blocks_to_swap` that it takes.
        previews_with_fp8_t5: whether its previews can encode texts with `fp8_t5`.
        unguided: the scale of its previews (`--l`) without guidance, 1 or 0; see `FamilySpec.unguided`.
    """

    adapter: str
    decided: Mapping[str, str | bool] = field(default_factory=dict)
    network_module: str
    text_encoders: tuple[str, ...]
    most_swapped: int
    previews_with_fp8_t5: bool = True
    unguided: float = 1.0


@dataclass(frozen=True, kw_only=True)
class FlowEditSpec:
    """FlowEdit's settings (fallenshock/FlowEdit at 457f402); guidance scales are in the family's own formula.

    Attributes:
        steps: of the schedule.
        n_max: of these the last ones that are made.
        source_guidance, target_guidance: of the two captions' velocities.
    """

    steps: int
    n_max: int
    source_guidance: float
    target_guidance: float


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """One checkpoint that can be trained and edited with, as its authors publish it.

    Attributes:
        name: value of `model.family`.
        implementation: `module:Class` of its `models.base.Family`.
        lora_layout: names of its LoRA's layers, a key of `lora.layouts.LAYOUTS`.
        positions: the values of `conditioning.position` that it has.
        reference_id: first position id of the source tokens of an image where the position is not `same`.
        frame_multiple: clips have n times this many frames and one more; None: images alone.
        boundary: t from which the high-noise expert serves; None: one network.
        guidance: `embedding`: an input of the network, `conditioning.guidance`; `classifier_free`: of previews and edits,
            `sample.cfg_high_noise` and `sample.cfg_low_noise`.
        guidance_scales: the published scales at high and at low noise.
        unguided: the scale without classifier-free guidance. 1: v_negative + scale (v - v_negative); 0: v + scale (v - v_negative).
        guidance_keeps_length: whether each token of a guided velocity is scaled back to the length that it has without guidance.
        negative: the text that guidance leads away from, unless `sample.negative` names one.
        text_encoders: the parts of `[model]` that encode texts.
        text_limit: tokens of the longest text.
        text_in_sequence: whether text tokens are part of the network's sequence.
        text_width: of an encoded text, where families of one network differ by it.
        shift: of the inference schedule.
        solvers: the published sampler's names in `sample.solver`; none: Euler.
        fps: frames a second of its clips.
        native: side of the square with as many pixels as its native size, at which it edits; None: the size that was trained.
        vae_tiling: whether its VAE can work in tiles.
        defaults: of the configuration, by section, where they are not the general ones.
        distilled: found in the name of a file or folder, it tells distilled weights, which cannot be trained on; None: their names do not.
        diffusers: the first version that has its classes as they are called here.
        musubi: how musubi-tuner trains it; None: not at all.
        modelspec: `modelspec.architecture` (before `/lora`) and `modelspec.implementation` of its LoRAs, as musubi-tuner writes them.
    """

    name: str
    implementation: str
    lora_layout: str
    positions: tuple[str, ...]
    reference_id: int = 1
    frame_multiple: int | None = None
    boundary: float | None = None
    guidance: GuidanceKind
    guidance_scales: tuple[float, float] = (1.0, 1.0)
    unguided: float = 1.0
    guidance_keeps_length: bool = False
    negative: str = ""
    text_encoders: tuple[str, ...]
    text_limit: int = 512
    text_in_sequence: bool
    text_width: int | None = None
    shift: float | ShiftByTokens | ShiftByTokensAndSteps
    solvers: tuple[str, ...] = ()
    fps: int | None = None
    native: int | None = None
    vae_tiling: bool = False
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    distilled: str | None = None
    diffusers: tuple[int, int] = (0, 32)
    musubi: MusubiSpec | None = None
    modelspec: tuple[str, str] | None = None

    @property
    def flowedit(self) -> FlowEditSpec:
        """Published for FLUX.1-dev. Of a family with classifier-free guidance nothing is: those of Stable Diffusion 3, which has it too."""
        if self.guidance == "embedding":
            return FlowEditSpec(steps=28, n_max=24, source_guidance=1.5, target_guidance=5.5)
        less = 1.0 - self.unguided
        return FlowEditSpec(steps=50, n_max=33, source_guidance=3.5 - less, target_guidance=13.5 - less)

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of its networks, parts of `[model]`: one, or the high-noise and the low-noise expert."""
        return (HIGH,) if self.boundary is None else (HIGH, LOW)

    def source_id(self, position: str) -> int:
        """First position id of the source tokens of an image, at a value of `conditioning.position`."""
        return 0 if position == "same" else self.reference_id

    @property
    def has_experts(self) -> bool:
        """Whether it is two networks, told apart by t."""
        return self.boundary is not None

    @property
    def takes_clips(self) -> bool:
        """Whether it takes more than one frame."""
        return self.frame_multiple is not None
