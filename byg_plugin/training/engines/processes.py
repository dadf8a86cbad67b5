"""Agreement over processes that each hold the LoRA whole: what every engine here has in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from byg_plugin.training.engine import Adapters


def world() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


class Replicas:
    """The parts of `Engine` that know no optimizer.

    Args:
        adapters: what is trained, whole on every process.
        device: of the weights.
    """

    def __init__(self, adapters: Adapters, device: torch.device):
        self.adapters = {name: list(parameters.values()) for name, parameters in adapters.items()}
        self.device = device

    def any(self, flag: bool) -> bool:
        """See `Engine`."""
        if world() == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return bool(value.item())

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """See `Engine`."""
        names = sorted(values)
        if not names:
            return {}
        flat = torch.stack([values[name].float() for name in names])
        if world() > 1:
            torch.distributed.all_reduce(flat)
            flat /= world()
        return dict(zip(names, flat.tolist(), strict=True))

    def broadcast(self) -> None:
        """See `Engine`."""
        if world() > 1:
            for parameter in (p for parameters in self.adapters.values() for p in parameters):
                torch.distributed.broadcast(parameter.data, src=0)

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they are."""
        return {name: tensor.detach() for name, tensor in tensors.items()}


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Mean of the gradients over all processes, in one collective.

    Parameters without a gradient are left out: the optimizer must not move them. Which ones they are is the same on every
    process, because the kind of a step (identity or edit, which expert) is drawn for all of them together.
    """
    if world() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return
    flat = torch.cat([g.flatten() for g in grads])
    torch.distributed.all_reduce(flat)
    flat /= world()
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))
