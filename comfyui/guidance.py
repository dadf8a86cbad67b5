"""Guidance where a family's differs from ComfyUI's `uncond + cfg (cond - uncond)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PATCH = 2


def qwen_guidance(args: dict[str, Any]) -> Tensor:
    """Qwen-Image: the usual combination, each token scaled back to the length it has without guidance.

    For ModelPatcher's `set_model_sampler_cfg_function`. Source: QwenImagePipeline. The predictions are sigma times a velocity,
    and the rule has no unit.
    """
    plain = args["cond"]
    combined = args["uncond"] + (plain - args["uncond"]) * args["cond_scale"]
    lengths = [_token_lengths(value) for value in (plain, combined)]
    return combined * (lengths[0] / lengths[1].clamp_min(torch.finfo(plain.dtype).tiny))


def _token_lengths(latents: Tensor) -> Tensor:
    """(B, C, ..., H, W) -> (B, 1, ..., H, W): the length of each token of 2 x 2 latents, at its four latents."""
    *_, h, w = latents.shape
    squares = latents.square().sum(dim=1, keepdim=True).unflatten(-1, (w // PATCH, PATCH)).unflatten(-3, (h // PATCH, PATCH))
    lengths = squares.sum(dim=(-1, -3), keepdim=True).sqrt()
    return lengths.expand_as(squares).flatten(-2).flatten(-3, -2)
