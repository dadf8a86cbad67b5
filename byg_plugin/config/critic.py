"""The section of the critic: a frozen vision-language model whose answers are differentiated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from byg_plugin.config.fields import NonNegative, PathText, Probability, Section, Steps

REMOVE = "remove"
"""The edit type whose questions have a form of their own."""

CriticDevice = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")]
Side = Annotated[int, Field(ge=16, le=4096)]


class CriticConfig(Section):
    """A vision-language model that is asked whether an edit is made and the rest preserved. For objectives that take a critic."""

    path: PathText | None = Field(
        None, description="Folder or hub id of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL, InternVL (transformers' own) or LLaVA-OneVision."
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Dtype of its weights and its computation.")
    quantization: Literal["none", "nf4"] = Field("none", description="nf4 = its linears in 4 bits (bitsandbytes extra).")
    device: CriticDevice = Field(
        "auto",
        description="auto = the networks' own; or cpu, cuda, cuda:1, which is one and the same for every process: it and its VAE's decoder "
        "live here.",
    )
    image_size: Side | None = Field(
        None,
        description="Pictures are shown with at most image_size x image_size pixels; default: 448, or the one square that the model takes.",
    )
    gradient_checkpointing: bool = Field(True, description="Recompute its layers, and those of the VAE's decoder, in backward.")
    tile: Side | None = Field(
        None,
        description="Side in pixels of the tiles that the edit is decoded in, one differentiated at a time, blended over a quarter of "
        "it; default: the whole picture, which is exact.",
    )
    least_accuracy: Probability = Field(
        0.75, description="Share of 32 known answers at the start, below which the critic is refused; chance is 0.5, 0 = not asked."
    )
    scale_from: Annotated[float, Field(ge=0.001, le=1.0)] = Field(
        0.1, description="Factor of its logits in the loss at the first update that asks it; it rises to 1."
    )
    scale_steps: Steps = Field(2000, description="Updates of the editor from there until that factor is 1.")
    kept_sources: NonNegative = Field(
        256, description="Sources whose features are kept in main memory, about 3 MiB each of a model of 2B; 0 = none."
    )
