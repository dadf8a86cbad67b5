"""Muon over LoRA matrices: `torch.optim.Muon`'s update in float32, all matrices of one shape at once.

torch's own (2.9 to 2.13) orthogonalises one matrix after another, and in bfloat16 whatever the weights are. On a CPU without
instructions for bfloat16 that was a third of a step of the demo; a LoRA's matrices are small, so float32 costs nothing anywhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic, as in torch
_ITERATIONS = 5
_EPSILON = 1e-7
_ADAMW_RMS = 0.2
"""Root mean square of AdamW's usual update in units of its learning rate ("Muon is scalable for LLM training", 2.2)."""


def orthogonalized(matrices: Tensor) -> Tensor:
    """Five Newton-Schulz iterations on each matrix (N, rows, columns): singular values near 1, the singular vectors kept."""
    wide = matrices.float()
    if tall := wide.shape[1] > wide.shape[2]:
        wide = wide.mT
    # At most 1 in every norm, which the iteration needs.
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=_EPSILON)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if tall else wide


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, as long as AdamW's update: learning rates are of the same order. Weight decay is decoupled.

    Args:
        parameters: matrices.
        lr: learning rate.
        weight_decay: of the weights, in units of `lr`.
        momentum: decay of the mean of gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        assert all(p.ndim == 2 for group in self.param_groups for p in group["params"]), "a LoRA's weights are matrices"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            of_shape: defaultdict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    of_shape[p.shape].append(p)
            for shape, parameters in of_shape.items():
                length = group["lr"] * _ADAMW_RMS * math.sqrt(max(shape))
                updates = orthogonalized(torch.stack([self._momentum(p, group["momentum"]) for p in parameters]))
                for p, update in zip(parameters, updates.unbind(), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.to(p.dtype), alpha=-length)

    def _momentum(self, p: nn.Parameter, decay: float) -> Tensor:
        """The mean of gradients brought up to date, one step ahead (Nesterov)."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        mean: Tensor = state["momentum_buffer"]
        mean.lerp_(p.grad, 1 - decay)
        return p.grad.lerp(mean, decay)
