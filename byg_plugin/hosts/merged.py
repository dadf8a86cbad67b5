"""A LoRA multiplied into its linears: for the rollout as weights of their own, for the differentiated passes as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class MergedRollout:
    """Linears of their own with the LoRA multiplied in, for passes without gradient.

    Args:
        layers: PEFT's LoRA layers.
        adapter: the LoRA's name in them.
    """

    def __init__(self, layers: Sequence[Any], adapter: str):
        self._layers, self._adapter = layers, adapter
        self.linears: list[nn.Linear] = []

    @torch.no_grad()
    def of_this_moment(self) -> list[nn.Linear]:
        """W + scale B A with the weights of this moment, rounded once to W's dtype.

        Made anew from the frozen W at every call: nothing goes stale or drifts, and it costs what `rank` more tokens
        would cost one step of the rollout.
        """
        if not self.linears:
            self.linears = [_empty_like(layer.base_layer) for layer in self._layers]
        for layer, merged in zip(self._layers, self.linears, strict=True):
            a, b = layer.lora_A[self._adapter].weight, layer.lora_B[self._adapter].weight
            merged.weight.copy_(torch.addmm(layer.base_layer.weight.float(), b, a, alpha=layer.scaling[self._adapter]))
        return self.linears

    def free(self) -> None:
        """Give the copy's memory back until it is asked for again."""
        self.linears = []


class MergedLinear(nn.Module):
    """A LoRA layer as x (W + scale B A)^T: one product for its three, with the same gradient of A and B.

    Per row of x, forward and backward, 3 in out multiplications for the LoRA layer's 2 in out + 3 rank (in + out): fewer where the
    rank is near the width. Holds the layer's parameters under no name of its own.
    """

    def __init__(self, layer: Any, adapter: str):
        super().__init__()
        # In a tuple: a module that registers them would show them twice in a network's state_dict.
        self._layer, self._adapter = (layer,), adapter

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The frozen one's: a network asks whether there is one."""
        bias: Tensor | None = self._layer[0].base_layer.bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        (layer,) = self._layer
        a, b = layer.lora_A[self._adapter].weight, layer.lora_B[self._adapter].weight
        weight = torch.addmm(layer.base_layer.weight, b, a, alpha=layer.scaling[self._adapter])
        return functional.linear(x, weight, layer.base_layer.bias)


def _empty_like(linear: nn.Linear) -> nn.Linear:
    """A frozen linear with a weight of its own, not yet filled, and the same bias."""
    out = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    out.weight = nn.Parameter(torch.empty_like(linear.weight), requires_grad=False)
    out.bias = linear.bias
    return out
