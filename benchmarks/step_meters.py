"""Meters of a step's phases: seconds, FLOPs and bytes alive at once."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class Meter:
    """Values by phase: `lap(phase)` books what came since the lap before."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}

    def begin(self) -> None: ...

    def lap(self, phase: str) -> None: ...


class Rises(Meter):
    """Of a value that only rises (a clock, a counter): how much of it each phase took."""

    def __init__(self, read: Callable[[], float]):
        super().__init__()
        self.read, self._last = read, 0.0

    def begin(self) -> None:
        self._last = self.read()

    def lap(self, phase: str) -> None:
        now = self.read()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now


class Peaks(Meter):
    """Of a peak that can be read and set back: the highest in each phase."""

    def __init__(self, read: Callable[[], float], reset: Callable[[], None]):
        super().__init__()
        self._read, self._reset = read, reset

    def begin(self) -> None:
        self._reset()

    def lap(self, phase: str) -> None:
        self.phases[phase] = max(self.phases.get(phase, 0.0), self._read())
        self._reset()


class Several(Meter):
    """Meters that run beside each other."""

    def __init__(self, meters: Sequence[Meter]):
        super().__init__()
        self._meters = meters

    def begin(self) -> None:
        for meter in self._meters:
            meter.begin()

    def lap(self, phase: str) -> None:
        for meter in self._meters:
            meter.lap(phase)


def clock(device: torch.device, kind: str = "wall") -> Rises:
    """Seconds: `wall`, waiting for the device at every lap, or `process` (the CPU time of all threads of this process)."""
    if kind == "process":
        return Rises(time.process_time)

    def read() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return Rises(read)


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter of matrix products and attention, which knows no formula for the CPU's attention kernel."""
    aten = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    mapping = {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


class Bytes:
    """Bytes of storages that are held, each storage once however many tensors hold it."""

    def __init__(self, outside: Iterable[Tensor]):
        """`outside`: tensors that live anyway (weights, inputs); theirs are not counted."""
        self._outside = {tensor.untyped_storage().data_ptr() for tensor in outside}
        self._holders: dict[int, int] = {}
        self.now = self.peak = 0

    def reset(self) -> None:
        self.peak = self.now

    def hold(self, storage: torch.UntypedStorage, holder: object) -> None:
        """Count the storage until `holder` dies."""
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._outside or not size:
            return
        if not self._holders.get(address):
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[address] = self._holders.get(address, 0) + 1
        weakref.finalize(holder, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self.now -= size


class _Saved:
    """What a graph holds in a saved tensor's place."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.detach()  # a result would hold its own graph, and that its result: a ring that nothing frees


class SavedBytes(Bytes):
    """What graphs keep for their backward. Blocks that checkpointing recomputes are hidden from it: see `AliveBytes`."""

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self.hold(tensor.untyped_storage(), saved)
        return saved


class _Watch(TorchDispatchMode):
    def __init__(self, bytes: Bytes):
        super().__init__()
        self._bytes, self._seen = bytes, weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # PyTorch gives the same Python object for one storage as long as that lives.
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                self._seen.add(tensor.untyped_storage())
                self._bytes.hold(tensor.untyped_storage(), tensor.untyped_storage())
        return out


class AliveBytes(Bytes):
    """Every tensor made since, dead ones taken off: what an allocator would see, without its rounding and kernels' workspaces."""

    def __enter__(self) -> AliveBytes:
        self._watch = _Watch(self)
        self._watch.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._watch.__exit__(*error)
