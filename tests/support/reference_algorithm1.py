"""Algorithm 1 of the paper, written down by hand, line by line, for one sample at a time.

It shares no code with the package: it imports torch and nothing else. It is slow, holds one graph, and is what the
objective is compared with. Two things the pseudocode leaves open are fixed here as the design fixes them: t is
continuous, so the interior node nearest to it is moved onto it; a squared norm is a mean over elements.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Weights:
    """Eq. 5's weights, alpha, and the ablations."""

    lambda_cycle: float = 1.0
    lambda_prior: float = 1.0
    lambda_id: float = 0.2
    alpha: float = 0.1
    routing: bool = True
    bootstrap: bool = True
    directional: bool = True
    reverse_prior: bool = True  # not the paper's


@dataclass
class Tuple:
    """(x, p_src, p_tgt, c, c_bar), t and epsilon of one sample: tensors with a batch dimension of 1, t a float."""

    x: torch.Tensor
    p_src: dict
    p_tgt: dict
    c: dict
    c_bar: dict
    t: float
    eps: torch.Tensor


def moved_schedule(nodes: list[float], t: float) -> tuple[list[float], int]:
    """The times of the rollout with t among them, and where it is."""
    best = 1
    for k in range(2, len(nodes) - 1):
        if abs(nodes[k] - t) < abs(nodes[best] - t):
            best = k
    times = list(nodes)
    times[best] = t
    return times, best


def rollout(ema: Callable, item: Tuple, nodes: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Lines 4-11."""
    times, at = moved_schedule(nodes, item.t)
    y, y_t = item.eps, None
    with torch.no_grad():
        for k in range(len(times) - 1):
            if k == at:
                y_t = y
            s = torch.tensor([times[k]], dtype=y.dtype)
            y = y - (times[k] - times[k + 1]) * ema(y, s, item.c, item.x)
    assert y_t is not None
    return y_t, y


def directional(v: torch.Tensor, v_src: torch.Tensor, v_tgt: torch.Tensor) -> torch.Tensor:
    """Eq. 2."""
    edit, direction = v - v_src, v_tgt - v_src
    dot = sum(a * b for a, b in zip(edit.reshape(-1), direction.reshape(-1), strict=True))
    return 1 - dot / (torch.sqrt((edit**2).sum()) * torch.sqrt((direction**2).sum()))


def one_sample(edit: Callable, ema: Callable, t2i: Callable, item: Tuple, nodes: list[float], w: Weights) -> dict[str, torch.Tensor]:
    """Lines 4-34 for one sample: every term of Eq. 5, and their sum."""
    x, t, eps = item.x, item.t, item.eps
    time = torch.tensor([t], dtype=x.dtype)
    x_t = (1 - t) * x + t * eps
    y_t, y_0 = rollout(ema, item, nodes)
    if not w.bootstrap:
        y_t = x_t

    v_fwd = edit(y_t, time, item.c, x)
    y_hat = y_t - t * v_fwd

    with torch.no_grad():
        v_src, v_tgt = t2i(y_t, time, item.p_src, None), t2i(y_t, time, item.p_tgt, None)
        # "Analogously": the reverse edit leads from the target caption to the source caption, at x_t.
        r_src, r_tgt = t2i(x_t, time, item.p_tgt, None), t2i(x_t, time, item.p_src, None)

    mse_fwd = ((v_fwd - v_tgt) ** 2).mean()
    prior_fwd = w.alpha * mse_fwd
    if w.directional:
        prior_fwd = directional(v_fwd, v_src, v_tgt) + prior_fwd

    y_hyb = y_0.detach() + (y_hat - y_hat.detach()) if w.routing else y_hat
    v_rev = edit(x_t, time, item.c_bar, y_hyb)
    cycle = ((v_rev - (eps - x)) ** 2).mean()
    mse_rev = ((v_rev - r_tgt) ** 2).mean()
    prior_rev = w.alpha * mse_rev
    if w.directional:
        prior_rev = directional(v_rev, r_src, r_tgt) + prior_rev

    identity = ((edit(x_t, time, item.c_bar, x) - (eps - x)) ** 2).mean()
    return {
        "loss": w.lambda_cycle * cycle + w.lambda_prior * (prior_fwd + prior_rev * w.reverse_prior) + w.lambda_id * identity,
        "cycle": cycle,
        "prior_fwd": prior_fwd,
        "prior_rev": prior_rev,
        "mse_fwd": mse_fwd,
        "mse_rev": mse_rev,
        "cosine_fwd": 1 - directional(v_fwd, v_src, v_tgt),
        "cosine_rev": 1 - directional(v_rev, r_src, r_tgt),
        "identity": identity,
    }


def batch_mean(edit: Callable, ema: Callable, t2i: Callable, items: list[Tuple], nodes: list[float], w: Weights) -> dict[str, torch.Tensor]:
    """The mean of every term over the samples."""
    terms = [one_sample(edit, ema, t2i, item, nodes, w) for item in items]
    return {name: sum(term[name] for term in terms) / len(terms) for name in terms[0]}
