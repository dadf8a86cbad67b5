"""What a step asks of the processes and the optimizer. The loop draws, orders and saves; how gradients meet is an engine's.

For an engine that holds its weights in shards: every method is called by every process, `last` marks a micro-step's end (the
`accumulation`-th one ends the step's gradients), and nothing is saved but by way of `gathered` and `state`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

Adapters = Mapping[str, Mapping[str, nn.Parameter]]
"""Trainable parameters by adapter and name."""

Trained = tuple[str, str | None]
"""An adapter, and the expert whose part of it is meant; None: all of it."""


def is_left_out(norm: Tensor, limit: float) -> bool:
    """Whether an update of this gradient norm is left out; `limit`: `train.skip_grad_norm`, 0 = none is."""
    return bool(limit) and not bool(norm <= limit)  # also NaN


class Engine(Protocol):
    """Gradients, optimizer steps and agreement over all processes. Implements `objectives.base.Backward` in `backward`."""

    @property
    def whole(self) -> bool:
        """Whether `state` and `gathered` need no other process."""
        ...

    def begin(self, trained: Collection[Trained]) -> None:
        """Before the first micro-step of an optimizer step: what it trains."""
        ...

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
        """Go on from `state()`, with this run's options: a checkpoint's own would silently outlive a changed weight decay.

        The parameters hold the checkpoint's weights already.
        """
        ...


def refuse_idle(names: Sequence[str]) -> None:
    """DeepSpeed's ZeRO-1/2 takes no gradient for one of zeros, by which momentum and weight decay would move the weight.

    Raises:
        ValueError: there is a weight that no gradient reaches.
    """
    if names:
        raise ValueError(
            f"{names[0]} has no gradient, and DeepSpeed ZeRO-1/2 would move it all the same: take it out of lora.targets, or "
            "launch with ZeRO-3, FSDP2 or plain multi-GPU"
        )
