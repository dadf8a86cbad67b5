"""Every process makes the same collectives in the same order, whatever its own samples need.

A network in shards is gathered by all processes together. In a rollout each one crosses the experts' boundary at a step of its own,
and may end at one of its own: one would gather expert A while another gathers B, whose shapes agree, and the shards would mix without
an error. So before each call the processes agree on what anyone needs, and one that does not need it calls it all the same, on one
sample, and drops the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from byg_plugin.hosts.experts import OneExpert
from byg_plugin.objectives.base import Text, Velocity
from byg_plugin.timesteps import is_high


def agree(wanted: Sequence[bool], device: torch.device) -> list[bool]:
    """What any process wants."""
    flags = torch.tensor(wanted, dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


@contextmanager
def in_lockstep(call: OneExpert, boundary: float | None, device: torch.device) -> Iterator[Velocity]:
    """A velocity that processes may call at other times and other often; on exit it waits, and takes part, until all are done.

    Args:
        call: one expert's velocity; a family without experts has the high-noise one alone.
        boundary: t from which the high-noise expert serves; None: one network.
        device: of the process group's tensors.
    """
    seen: list[tuple[Tensor, Tensor, Text, Tensor | None]] = []

    def round_(rows_of: Callable[[bool], Tensor | None]) -> tuple[bool, dict[bool, Tensor]]:
        sides = (True,) if boundary is None else (True, False)
        wanted = agree([rows_of(side) is not None for side in sides], device)
        out: dict[bool, Tensor] = {}
        for side in (side for side, anyone in zip(sides, wanted, strict=True) if anyone):
            rows = rows_of(side)
            noisy, t, text, source = seen[-1]
            if rows is None:
                call(side, noisy[:1], t[:1], {n: v[:1] for n, v in text.items()}, None if source is None else source[:1])
            else:
                some = {n: v[rows.to(v.device)] for n, v in text.items()}
                out[side] = call(side, noisy[rows], t[rows], some, None if source is None else source[rows])
        return any(wanted), out

    def velocity(noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        seen[:] = [(noisy, t, text, source)]
        high = torch.ones_like(t, dtype=torch.bool) if boundary is None else is_high(t, boundary)
        rows = {True: high, False: ~high}
        _, parts = round_(lambda side: rows[side] if bool(rows[side].any()) else None)
        if len(parts) == 1:
            return next(iter(parts.values()))
        out = torch.zeros_like(noisy, dtype=parts[True].dtype)
        for side, part in parts.items():
            out[rows[side]] = part
        return out

    yield velocity
    while seen and round_(lambda side: None)[0]:
        pass
