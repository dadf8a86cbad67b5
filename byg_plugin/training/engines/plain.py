"""Data parallelism over the LoRA's gradients.

The network is not wrapped: a step makes several backward passes through changing adapter states, and a wrapper that synchronises
inside forward or backward would have to know of each. The LoRA's gradients are small; they are averaged once, after the last
backward of an optimizer step. The frozen base may lie in shards: it has no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from byg_plugin.config.sections import TrainConfig
from byg_plugin.training.engine import Adapters, Trained, is_left_out
from byg_plugin.training.engines.processes import Replicas, average_gradients
from byg_plugin.training.optimizers import make_optimizer


class PlainEngine(Replicas):
    """Every process holds all weights of the LoRA and its own optimizers.

    Args:
        train: the `[train]` section.
        adapters: what is trained.
        accumulation: micro-steps of an optimizer step.
        device: of the weights.
    """

    whole = True

    def __init__(self, train: TrainConfig, adapters: Adapters, accumulation: int, device: torch.device):
        super().__init__(adapters, device)
        self.accumulation = accumulation
        self.optimizers = {name: make_optimizer(train, parameters) for name, parameters in self.adapters.items()}
        self._max_norm = train.max_grad_norm or math.inf
        self._most_norm = train.skip_grad_norm

    def begin(self, trained: Collection[Trained]) -> None:
        """See `Engine`. What has gradients is what is trained."""

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
            for name, optimizer in self.optimizers.items():
                left_out = is_left_out(norms[name], self._most_norm)
                if left_out:
                    _forget(self.adapters[name])
                for group in optimizer.param_groups:
                    group["lr"] = 0.0 if left_out else lr
                optimizer.step()
        finally:
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
        return norms

    def state(self) -> dict[str, dict[str, Any]]:
        """See `Engine`."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """See `Engine`."""
        for name, optimizer in self.optimizers.items():
            options = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": states[name]["state"], "param_groups": options})


def _forget(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients of zeros: the optimizer counts its step, as a resumed run expects, and its moments learn nothing."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()
