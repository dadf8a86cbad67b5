"""The flow-matching conventions of this project, fixed once.

t in [0, 1]: t = 0 is clean data, t = 1 is noise. The path is `x_t = (1 - t) x + t noise`, its velocity
`v = d x_t / d t = noise - x`, and one step along v from t to 0 predicts the data: `x_hat = x_t - t v`.

Latents are (B, C, F, H, W); t is (B,). Every squared norm is a mean over the elements of a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), to be multiplied with `like` (B, ...)."""
    if t.shape != like.shape[:1]:
        raise ValueError(f"t must have one value a sample: t {tuple(t.shape)} for latents {tuple(like.shape)}")
    return t.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t on the straight path from data x (t = 0) to noise (t = 1)."""
    t_ = expand(t, x)
    return (1 - t_) * x + t_ * noise


def path_velocity(x: Tensor, noise: Tensor) -> Tensor:
    """The velocity of that path, the same for all t."""
    return noise - x


def predict_data(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """One-step prediction of the data (the paper's y_hat)."""
    return x_t - expand(t, x_t) * v


def euler_step(x_s: Tensor, v: Tensor, s: Tensor, s_next: Tensor) -> Tensor:
    """From time s (B,) to s_next (B,) along v."""
    return x_s - expand(s - s_next, x_s) * v


_MOST_RATIO = 2.0


def ab2_slope(v: Tensor, v_before: Tensor, h: Tensor, h_before: Tensor) -> Tensor:
    """The slope of a second-order Adams-Bashforth step on uneven steps: v + h / (2 h_before) (v - v_before).

    The ratio of the steps counts up to 2: beyond, the extrapolation is worse than a shorter one, and the difference of two velocities
    a short step apart is mostly rounding.

    Args:
        v, v_before: (B, ...), the velocity here and one step before.
        h: (B,) length of the step that is made.
        h_before: (B,) length of the step before; 0: there is none, which leaves Euler's v.
    """
    ratio = torch.where(h_before > 0, h / h_before, torch.zeros_like(h)).clamp(max=_MOST_RATIO)
    return v + expand(ratio / 2, v) * (v - v_before)


def mean_squared(difference: Tensor) -> Tensor:
    """(B, ...) -> (B,): squared norm as a mean over the elements of a sample."""
    return difference.flatten(1).square().mean(dim=1)


def cosine(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine per sample over the flattened tensors, and where it is defined.

    Args:
        a, b: (B, ...).

    Returns:
        (B,) cosine, 0 without gradient where either direction is zero; (B,) bool, true where it is defined.
    """
    a, b = a.flatten(1), b.flatten(1)
    floor = torch.finfo(a.dtype).tiny ** 0.5
    defined = (a.detach().norm(dim=1) > floor) & (b.detach().norm(dim=1) > floor)
    # A zero direction is replaced before the division: 0/0 would poison the gradient even behind a `where`.
    safe_a = torch.where(defined[:, None], a, torch.ones_like(a))
    safe_b = torch.where(defined[:, None], b, torch.ones_like(b))
    value = (safe_a * safe_b).sum(dim=1) / (safe_a.norm(dim=1) * safe_b.norm(dim=1))
    return torch.where(defined, value, torch.zeros_like(value)), defined
