"""What autograd keeps, counted: peaks of memory that a CPU can compare."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class _Held:
    """A saved tensor; it is dropped with the graph."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def most_saved(work: Callable[[], T]) -> tuple[int, T]:
    """The most bytes that graphs hold at once while `work` runs, each storage once and without parameters; and its result."""
    alive: Counter[int] = Counter()
    most = 0

    def pack(tensor: Tensor) -> Any:
        nonlocal most
        held, storage = _Held(tensor), tensor.untyped_storage()
        if isinstance(tensor, torch.nn.Parameter):
            return held
        key, size = storage.data_ptr(), storage.nbytes()
        alive[key] += 1
        sizes[key] = size
        weakref.finalize(held, _drop, alive, key)
        most = max(most, sum(sizes[one] for one in alive))
        return held

    sizes: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        result = work()
    return most, result


def _drop(alive: Counter[int], key: int) -> None:
    alive[key] -= 1
    if not alive[key]:
        del alive[key]
