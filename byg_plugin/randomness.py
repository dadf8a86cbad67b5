"""Every random number of a run is a pure function of (seed, purpose, where in the run it is drawn).

So a resumed run draws what the uninterrupted one draws, and N processes draw together what one process with N times the
accumulation draws: `index` counts micro-batches over the whole run and all ranks. There is no state to save.
"""

from __future__ import annotations

import hashlib

import torch


def derived_seed(seed: int, purpose: str, index: int) -> int:
    """A 63-bit seed; neighbouring indices are independent, as consecutive raw seeds of a generator need not be."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, index: int) -> torch.Generator:
    """A CPU generator for one purpose at one index: the same numbers on every device."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose, index))


def coin(seed: int, step: int, probability: float, purpose: str = "identity") -> bool:
    """The coin of one optimizer step (identity step or not, which expert): one toss, the same on every rank."""
    return torch.rand((), generator=generator(seed, purpose, step)).item() < probability


def pick(seed: int, step: int, count: int, purpose: str) -> int:
    """A number from 1 to `count` for one optimizer step, all alike often, the same on every rank."""
    return int(torch.randint(1, count + 1, (), generator=generator(seed, purpose, step)).item())
