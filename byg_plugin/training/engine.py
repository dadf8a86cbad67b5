"""What a step asks of the processes and the optimizer. The loop draws, orders and saves; how gradients meet is an engine's.

`PlainEngine` is data parallelism over the LoRA's gradients. The network is not wrapped: a step makes several backward passes
through changing adapter states, and a wrapper that synchronises inside forward or backward would have to know of each. The
LoRA's gradients are small; they are averaged once, after the last backward of an optimizer step.

For an engine that holds its weights in shards: every method is called by every process, `last` marks a micro-step's end (the
`accumulation`-th one ends the step's gradients), and nothing is saved but by way of `gathered` and `state`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from byg_plugin.config.sections import TrainConfig
from byg_plugin.training.optimizers import make_optimizer

Adapters = Mapping[str, Mapping[str, nn.Parameter]]
"""Trainable parameters by adapter and name."""


class Engine(Protocol):
    """Gradients, optimizer steps and agreement over all processes. Implements `objectives.base.Backward` in `backward`."""

    def backward(self, loss: Tensor, *, last: bool) -> float:
        """Differentiate a loss of one micro-step; returns the factor it was multiplied by."""
        ...

    def step(self, lr: float, check: Callable[[Mapping[str, Tensor]], None]) -> dict[str, Tensor]:
        """One optimizer step of every adapter that has gradients, which are averaged over processes, clipped, and gone afterwards.

        Args:
            lr: the learning rate.
            check: called with the gradient norms before any weight moves; when it raises, none has moved.

        Returns:
            the norm of each adapter's gradient before clipping.
        """
        ...

    def any(self, flag: bool) -> bool:
        """True on every process when it is true on one."""
        ...

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Mean of scalars over processes; all must hold the same names."""
        ...

    def broadcast(self) -> None:
        """The first process's weights on every process."""
        ...

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights, or averages of them, whole and detached: for saving."""
        ...

    def state(self) -> dict[str, dict[str, Any]]:
        """`torch.optim.Optimizer.state_dict()` by adapter, whole."""
        ...

    def load_state(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from `state()`, with this run's options: a checkpoint's own would silently outlive a changed weight decay."""
        ...


class PlainEngine:
    """Every process holds all weights and its own optimizers.

    Args:
        train: the `[train]` section.
        adapters: what is trained.
        accumulation: micro-steps of an optimizer step.
        device: of the weights.
    """

    def __init__(self, train: TrainConfig, adapters: Adapters, accumulation: int, device: torch.device):
        self.adapters = {name: list(parameters.values()) for name, parameters in adapters.items()}
        self.accumulation, self.device = accumulation, device
        self.optimizers = {name: make_optimizer(train, parameters) for name, parameters in self.adapters.items()}
        self._max_norm = train.max_grad_norm or math.inf

    def backward(self, loss: Tensor, *, last: bool) -> float:
        """See `Engine`. Gradients are averaged over processes in `step`: `last` needs nothing here."""
        scale = 1.0 / self.accumulation
        (loss * scale).backward()
        return scale

    def step(self, lr: float, check: Callable[[Mapping[str, Tensor]], None]) -> dict[str, Tensor]:
        """See `Engine`."""
        norms = {}
        for name, parameters in self.adapters.items():
            average_gradients(parameters)
            norms[name] = torch.nn.utils.clip_grad_norm_(parameters, self._max_norm).to(self.device)
        try:
            check(norms)
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
        finally:
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
        return norms

    def any(self, flag: bool) -> bool:
        """See `Engine`."""
        if _world() == 1:
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
        if _world() > 1:
            torch.distributed.all_reduce(flat)
            flat /= _world()
        return dict(zip(names, flat.tolist(), strict=True))

    def broadcast(self) -> None:
        """See `Engine`."""
        if _world() > 1:
            for parameter in (p for parameters in self.adapters.values() for p in parameters):
                torch.distributed.broadcast(parameter.data, src=0)

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they are."""
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def state(self) -> dict[str, dict[str, Any]]:
        """See `Engine`."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """See `Engine`."""
        for name, optimizer in self.optimizers.items():
            options = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states[name]["state"], "param_groups": options})


def make_engine(train: TrainConfig, adapters: Adapters, accumulation: int, device: torch.device) -> Engine:
    """The engine of a run; arguments as of `PlainEngine`. A second one is chosen here."""
    return PlainEngine(train, adapters, accumulation, device)


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
