"""The three velocity fields over a network that musubi-tuner holds. Imports nothing of the host: it is handed its objects.

The host puts its LoRA in by replacing the `forward` of each adapted module; it moves blocks and experts itself, where a call
must be made at the right moment. Those moments are here:

- block swap: in training mode a forward pass leaves the blocks where only its backward pass fetches them from. So passes
  without gradient run in the host's inference mode, and one pass with gradient has its backward pass before the next.
- experts: they share one module, whose weights are exchanged. A graph that outlives an exchange would be differentiated with
  the other expert's weights, in silence.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from byg_plugin.hosts.ema import EmaWeights
from byg_plugin.hosts.experts import by_expert
from byg_plugin.hosts.lockstep import in_lockstep
from byg_plugin.hosts.sharding import Shards
from byg_plugin.objectives.base import Critique, Text, Velocity


class BlockSwap:
    """Keeps the host's offloader in the mode that the next forward pass needs.

    Args:
        transformer: with the host's `switch_block_swap_for_inference` and `switch_block_swap_for_training`; both wait for all
            transfers and put every block where a forward pass starts.
    """

    def __init__(self, transformer: Any):
        self._transformer = transformer
        self._mode: bool | None = None
        self._awaits_backward = False

    def before_forward(self) -> None:
        """Call it before every forward pass, in the gradient mode that the pass runs in."""
        wanted = torch.is_grad_enabled()
        assert not self._awaits_backward, "a forward pass before the last one's backward pass: its blocks are not on the device"
        if self._mode is not wanted:
            self._switch(wanted)
        self._awaits_backward = wanted

    def after_backward(self) -> None:
        """The blocks of the pass with gradient are back."""
        self._awaits_backward = False

    def before_exchange(self) -> None:
        """Every block in its place: what takes the weights' place was put away like this."""
        assert not self._awaits_backward, "an expert may not leave before its backward pass"
        if self._mode is not None:
            self._switch(self._mode)

    def forget(self) -> None:
        """Somebody else has switched modes."""
        self._mode = None

    def _switch(self, training: bool) -> None:
        transformer = self._transformer
        with contextlib.redirect_stdout(io.StringIO()):  # the host prints a line at every switch
            (transformer.switch_block_swap_for_training if training else transformer.switch_block_swap_for_inference)()
        self._mode = training


class Experts(Protocol):
    """The host's two experts in one module."""

    boundary: float

    @property
    def high(self) -> bool:
        """Which one is in the module."""
        ...

    def exchange(self) -> None:
        """The other one."""
        ...


class MusubiFields:
    """Implements `objectives.base.VelocityFields`, without a critic or a second LoRA.

    Args:
        network: the host's LoRA network, applied to the transformer.
        ema_weights: over the network's parameters.
        call: one call of the host's transformer: (noisy, t, text, source) -> velocity.
        experts: where the model has two.
        swap: where blocks are swapped.
        shards: where the transformer's weights are in shards.
        device: of the processes' agreements about them.

    Raises:
        ValueError: the network's modules cannot be taken off.
    """

    critique: Critique | None = None

    def __init__(
        self,
        network: nn.Module,
        ema_weights: EmaWeights,
        call: Velocity,
        *,
        experts: Experts | None = None,
        swap: BlockSwap | None = None,
        shards: Shards | None = None,
        device: torch.device | None = None,
    ):
        self._shards, self._device = shards, device
        self.network, self.ema_weights = network, ema_weights
        self._call, self._experts, self.swap = call, experts, swap
        self._adapted = _adapted(network)
        self._held: bool | None = None

    @contextmanager
    def edit(self) -> Iterator[Velocity]:
        """LoRA on, trainable. Dropout is active where gradients are."""
        with self._training(torch.is_grad_enabled()):
            try:
                yield self._velocity
            finally:
                self._held = None

    @contextmanager
    def ema(self) -> Iterator[Velocity]:
        """The EMA weights by pointer, no gradient. They are away again before any backward pass may recompute."""
        with self.ema_weights.swapped_in(), self._training(False), torch.no_grad():
            if self._shards is None:
                yield self._velocity
                return
            assert self._device is not None and self._experts is None
            with in_lockstep(self._one_expert, None, self._device) as velocity:
                yield velocity

    @contextmanager
    def live(self) -> Iterator[Velocity]:
        """The current weights, no gradient, no dropout."""
        with self._training(False), torch.no_grad():
            yield self._velocity

    @contextmanager
    def base(self) -> Iterator[Velocity]:
        """The frozen model bit for bit: each adapted module has its own forward back.

        A multiplier of 0 would be the same up to inf and nan, and would still multiply the LoRA out.
        """
        found = [(module, module.forward) for module, _ in self._adapted]
        try:
            for module, own in self._adapted:
                module.forward = own  # type: ignore[method-assign]
            with torch.no_grad():
                yield self._base_velocity
        finally:
            for module, forward in found:
                module.forward = forward  # type: ignore[method-assign]

    def fake(self) -> AbstractContextManager[Velocity]:
        """Refused by the configuration: `ObjectiveConfig.on_musubi`."""
        raise AssertionError("no second LoRA here")

    @contextmanager
    def _training(self, on: bool) -> Iterator[None]:
        before = self.network.training
        self.network.train(on)
        try:
            yield
        finally:
            self.network.train(before)

    @torch.no_grad()
    def prove_base(self, noisy: Tensor, t: Tensor, text: Text) -> None:
        """Once before training: the base may not depend on the LoRA. A compiled block that kept the LoRA would make it the student itself.

        Raises:
            ValueError: it does.
        """
        with self.base() as velocity:
            before = velocity(noisy, t, text, None)
        parameters = list(self.network.parameters())
        kept = [parameter.data for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.data = torch.full_like(parameter, 0.1)
            with self.live() as velocity:
                adapted = velocity(noisy, t, text, None)  # compiles what the base must not take for its own
            with self.base() as velocity:
                after = velocity(noisy, t, text, None)
        finally:
            for parameter, data in zip(parameters, kept, strict=True):
                parameter.data = data
        margin = {"rtol": 1e-3, "atol": 1e-3 * before.abs().max().item()}
        if torch.equal(before, adapted):
            raise ValueError(
                "the LoRA changes nothing where musubi-tuner runs the network, and could not be trained: leave out musubi.compile, or use "
                "another musubi.network_module"
            )
        if not torch.allclose(before, after, **margin):
            raise ValueError(
                "the frozen base changes with the LoRA, which is therefore not taken off where musubi-tuner runs it: leave out "
                "musubi.compile, or use another musubi.network_module"
            )

    def backward_done(self) -> None:
        """Call it after every backward pass."""
        if self.swap is not None:
            self.swap.after_backward()
        if self._shards is not None:
            self._shards.after_backward()

    def _base_velocity(self, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        assert source is None, "the frozen base has no source tokens"
        return self._velocity(noisy, t, text, None)

    def _velocity(self, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        """Each sample by the expert that serves its t."""
        if self._experts is None:
            return self._one_expert(None, noisy, t, text, source)
        experts = self._experts
        # The one that is there first.
        return by_expert(self._one_expert, experts.boundary, lambda: experts.high, noisy, t, text, source)

    def _one_expert(self, high: bool | None, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        if self._experts is not None:
            assert self._held in (None, high), "the other expert's backward pass is still to come"
            if self._experts.high != high:
                if self.swap is not None:
                    self.swap.before_exchange()
                self._experts.exchange()
            if torch.is_grad_enabled():
                self._held = high
        if self.swap is not None:
            self.swap.before_forward()
        return self._call(noisy, t, text, source)


def _adapted(network: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """(adapted module of the transformer, its own forward) of each LoRA module."""
    loras: list[Any] = [module for module in network.modules() if hasattr(module, "org_forward")]
    # A bound method says whose it is; the host's fp8 linears have one too.
    own: list[Any] = [lora.org_forward for lora in loras if inspect.ismethod(lora.org_forward)]
    if not loras or len(own) != len(loras):
        raise ValueError(
            f"musubi.network_module: {type(network).__name__} does not keep the forward of what it adapts (org_forward), so that its LoRA "
            "cannot be taken off for the frozen base; use networks.lora_wan, networks.lora_flux, networks.loha or networks.lokr"
        )
    return [(forward.__self__, forward) for forward in own]
