"""Data parallelism over the LoRA's gradients.

The network is not wrapped: a step makes several backward passes through changing adapter states, and a wrapper that
synchronises inside forward or backward has to be told of each. The LoRA's gradients are small; they are averaged once,
after the last backward of an optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def _world() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean of the gradients over all processes, in one collective.

    Parameters without a gradient are left out: the optimizer must not move them. Which ones they are is the same on every
    process, because the kind of a step (identity or edit, which expert) is drawn for all of them together.
    """
    if _world() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return
    flat = torch.cat([g.flatten() for g in grads])
    torch.distributed.all_reduce(flat)
    flat /= _world()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def broadcast_from_first(parameters: Iterable[nn.Parameter]) -> None:
    """Rank 0's values on every rank."""
    if _world() > 1:
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, src=0)


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when it is true on one."""
    if _world() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return bool(value.item())


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Mean of scalars over ranks; all ranks must hold the same names."""
    names = sorted(values)
    if not names:
        return {}
    flat = torch.stack([values[name].float() for name in names])
    if _world() > 1:
        torch.distributed.all_reduce(flat)
        flat /= _world()
    return dict(zip(names, flat.tolist(), strict=True))
