"""A trainable set of weights, and its exponential moving average, which makes the rollouts (section 4.1)."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn


class EmaWeights:
    """A float32 shadow of named parameters, swapped in by pointer: no copy, no second adapter.

    With decay 0 there is no shadow: the rollout uses the current weights (the paper's video recipe).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"objective.ema_decay = {decay} must be in [0, 1)")
        self.decay = decay
        self._live = dict(parameters)
        self._shadow = {name: p.detach().clone().float() for name, p in parameters.items()} if decay else {}
        self._is_in = False
        # Another thread may ask for the weights to save them, while this one swaps them.
        self._swapping = threading.Lock()

    def decay_at(self, step: int) -> float:
        """Decay of the update after optimizer step `step` (from 1), ramped up: a slow average of a LoRA whose B starts
        at zero would make the first rollouts nearly the bare base model. (1 + k) / (10 + k) is the field's usual ramp."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int, names: Collection[str] | None = None) -> None:
        """Follow the live weights after optimizer step `step` (from 1) of the parameters `names`, by default all."""
        if self._shadow:
            some = [name for name in self._shadow if names is None or name in names]
            live = [self._live[name].detach() for name in some]
            torch._foreach_lerp_([self._shadow[name] for name in some], live, 1 - self.decay_at(step))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The shadow in the network's place; the live weights are back on exit, also after an exception."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with self._swapping:
            for name, shadow in self._shadow.items():
                parameter = self._live[name]
                parameter.data, self._shadow[name] = shadow, parameter.data
            self._is_in = not self._is_in

    def state(self) -> dict[str, Tensor]:
        """The rollout's weights by name (with decay 0: the live ones), also while they are swapped in."""
        with self._swapping:
            return dict(self._shadow) if self._shadow and not self._is_in else self._parameters()

    def live(self) -> dict[str, Tensor]:
        """The trained weights by name, also while the others are swapped in."""
        with self._swapping:
            return dict(self._shadow) if self._is_in and self._shadow else self._parameters()

    def _parameters(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._live.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the shadow; names and shapes must be the parameters'."""
        for name, shadow in self._shadow.items():
            shadow.copy_(state[name])


class Adapter(NamedTuple):
    """One trainable set of weights on a frozen network."""

    parameters: dict[str, nn.Parameter]
    """By the names of the LoRA file."""
    ema: EmaWeights
