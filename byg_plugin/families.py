"""The model families by name, and what their authors publish beside the weights. Data alone: no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class WanSpec:
    """One Wan text-to-video checkpoint.

    Attributes:
        boundary: t from which the high-noise expert serves; None: one network.
        shift: of the inference schedule.
        steps: of the published sampler (UniPC).
        guidance: classifier-free guidance at high and at low noise.
        fps: frames a second of its clips.
        native: side of the square with as many pixels as its native size, 832 x 480 (5B: 1280 x 704).
    """

    boundary: float | None = None
    shift: float
    steps: int
    guidance: tuple[float, float]
    fps: int
    native: int = 632


WAN = {
    "wan2.2-t2v-a14b": WanSpec(boundary=0.875, shift=12.0, steps=40, guidance=(4.0, 3.0), fps=16),
    "wan2.1-t2v-14b": WanSpec(shift=5.0, steps=50, guidance=(5.0, 5.0), fps=16),
    "wan2.1-t2v-1.3b": WanSpec(shift=8.0, steps=50, guidance=(6.0, 6.0), fps=16),
    "wan2.2-ti2v-5b": WanSpec(shift=5.0, steps=50, guidance=(5.0, 5.0), fps=24, native=950),
}
# The negative prompt that Wan's own pipelines use where none is given.
WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
LoraFormat = Literal["diffusers", "comfyui", "musubi"]
LORA_FORMATS: tuple[LoraFormat, ...] = ("diffusers", "comfyui", "musubi")
# What follows the stem of a LoRA file, by the expert that it is for.
EXPERT_SUFFIXES = {"transformer": "_high_noise", "transformer_2": "_low_noise"}
POSITIONS = {"flux": ("same", "kontext"), **dict.fromkeys(WAN, ("same", "bernini"))}


def has_experts(family: str) -> bool:
    """Whether a family is two networks, told apart by t."""
    return family in WAN and WAN[family].boundary is not None
