"""NP-Edit written down by hand, for one sample at a time, as one graph.

It shares no code with the package: it imports torch and nothing else. It is slow, holds everything at once, and is what the objective is
compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Weights:
    """What multiplies the terms, and the teacher's guidance."""

    vlm: float = 0.02
    dmd: float = 1.0
    identity: float = 1.0
    guidance: float = 3.5
    strong_guidance: float = 7.5
    law: tuple[float, float] = (0.0, 1.0)
    scores: tuple[float, float] = (0.02, 0.98)


@dataclass
class Sample:
    """One sample: tensors with a batch dimension of 1, times are floats."""

    x: torch.Tensor
    c: dict
    nothing: dict
    p_src: dict
    p_tgt: dict
    negative: dict
    t: float
    eps: torch.Tensor
    eps_unroll: torch.Tensor
    eps_score: torch.Tensor
    removal: bool


Field = Callable[[torch.Tensor, torch.Tensor, dict, torch.Tensor | None], torch.Tensor]


def at(time: float, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor([time], dtype=like.dtype)


def unroll(editor: Field, s: Sample, c: dict, t_k: float) -> torch.Tensor:
    """x_0 by one call at t = 1, or by way of t_k."""
    x_hat = s.eps - editor(s.eps, at(1.0, s.eps), c, s.x)
    if t_k == 1.0:
        return x_hat
    x_t = (1 - t_k) * x_hat + t_k * s.eps_unroll
    return x_t - t_k * editor(x_t, at(t_k, s.eps), c, s.x)


def dmd(teacher: Field, fake: Field, s: Sample, x_0: torch.Tensor, p: dict, scale: float, w: Weights) -> torch.Tensor:
    """0.5 ||x_0 - sg(x_0 - g)||^2 at t in (0.02, 0.98), usually."""
    with torch.no_grad():
        t = w.scores[0] + (w.scores[1] - w.scores[0]) * (s.t - w.law[0]) / (w.law[1] - w.law[0])
        x_t = (1 - t) * x_0 + t * s.eps_score
        v, v_negative = (teacher(x_t, at(t, x_t), text, None) for text in (p, s.negative))
        x_real = x_t - t * (v_negative + scale * (v - v_negative))
        x_fake = x_t - t * fake(x_t, at(t, x_t), p, None)
        g = (x_fake - x_real) / (x_0 - x_real).abs().mean()
    return 0.5 * ((x_0 - (x_0 - g).detach()) ** 2).mean()


def editor_loss(
    editor: Field, teacher: Field, fake: Field, critic: Callable | None, s: Sample, t_k: float, w: Weights, identity: bool
) -> dict:
    """The terms of a step of the editor, and their sum."""
    x_0 = unroll(editor, s, s.nothing if identity else s.c, t_k)
    terms = {}
    total = torch.zeros((), dtype=x_0.dtype)
    if w.dmd:
        scale = w.strong_guidance if s.removal and not identity else w.guidance
        terms["dmd"] = dmd(teacher, fake, s, x_0, s.p_src if identity else s.p_tgt, scale, w)
        total = total + w.dmd * terms["dmd"]
    if identity:
        terms["identity"] = ((x_0 - s.x) ** 2).mean()
        total = total + w.identity * terms["identity"]
    elif critic is not None:
        terms["vlm"] = critic(x_0, s)
        total = total + w.vlm * terms["vlm"]
    return {"loss": total, **terms}


def fake_loss(editor: Field, fake: Field, s: Sample, t_k: float) -> dict:
    """Flow matching of the fake score on what the editor makes."""
    with torch.no_grad():
        x_0 = unroll(editor, s, s.c, t_k)
    x_t = (1 - s.t) * x_0 + s.t * s.eps_score
    loss = ((fake(x_t, at(s.t, x_t), s.p_tgt, None) - (s.eps_score - x_0)) ** 2).mean()
    return {"loss": loss, "fake": loss}


def copy_loss(editor: Field, s: Sample) -> dict:
    """The warm-up: flow matching of the source beside itself."""
    x_t = (1 - s.t) * s.x + s.t * s.eps
    loss = ((editor(x_t, at(s.t, x_t), s.p_src, s.x) - (s.eps - s.x)) ** 2).mean()
    return {"loss": loss, "copy": loss}
