"""What is another in a network for one call, of diffusers' networks and of another host's: both name these parts alike. Torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def first_arguments(module: nn.Module, *values: Tensor) -> Iterator[None]:
    """The module's first arguments are these.

    diffusers rounds times and guidance to the tokens' dtype before it embeds them: in bfloat16 a guidance of 3500 becomes 3504, and
    t = 0.77 becomes 0.7695 beside an x_t made with 0.77.
    """

    def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*values, *args[len(values) :])

    handle = module.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def image_positions(network: nn.Module, *, doubled: bool) -> Iterator[None]:
    """Qwen-Image's positions of the image, twice where source tokens have the noisy tokens' own.

    The network keeps its tables: those that were made in inference mode must not be saved for a backward pass.
    """

    def change(module: nn.Module, args: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        image, text = (table.clone() if table.is_inference() else table for table in tables)
        return (torch.cat([image, image]) if doubled else image), text

    handle = network.pos_embed.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def own_forward(network: nn.Module, forward: Any) -> Iterator[None]:
    """The network's `forward` is this one, inside whatever hooks and wrappers it has."""
    before = vars(network).get("forward")
    network.forward = forward
    try:
        yield
    finally:
        if before is None:
            del network.forward
        else:
            network.forward = before
