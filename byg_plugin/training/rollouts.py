"""One rollout for several optimizer steps (`objective.t_per_rollout` = K): which step uses whose, and what is kept until then.

Of the steps that have rollouts, `SPREAD` in a row make theirs, each through K times of every sample. In K - 1 rounds the next ones
take the other times: each micro-batch slot the same `SPREAD` rollouts in an order of its own, so that a step's batch is mixed from
several earlier ones and has no source twice. Which is which is a pure function of (seed, step, slot), as a rollout's data, noise
and times are; only the states are kept, in main memory, and saved with a checkpoint. The weights that made a rollout are at most
K x SPREAD - 1 such steps old.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from byg_plugin.objectives.base import Rollout
from byg_plugin.randomness import generator

SPREAD = 4
"""Optimizer steps whose rollouts are mixed."""


class Schedule:
    """Who uses whose rollout.

    Args:
        uses: K, optimizer steps of one rollout.
        has_rollout: whether an optimizer step has rollouts; a pure function, true again and again.
        seed: of the run.
        slots: micro-batches of an optimizer step over all processes.
    """

    def __init__(self, uses: int, has_rollout: Callable[[int], bool], seed: int, slots: int):
        self.uses, self.slots = uses, slots
        self._has_rollout, self._seed = has_rollout, seed
        self._steps: list[int] = []  # those with rollouts
        self._numbers: dict[int, int] = {}  # the inverse
        self._counted = 0

    def source(self, step: int, slot: int) -> tuple[int, int]:
        """(optimizer step whose rollout this slot of `step` takes, which of its uses this is); the first use makes it."""
        if not self._shared(step):
            return step, 0
        block, use, i = self._at(step)
        return (self._step(block, 0, self._order(block, use, slot)[i]), use) if use else (step, 0)

    def steps_of(self, step: int, slot: int) -> list[int]:
        """The optimizer steps that take the rollout which this slot of `step` makes, by use."""
        if not self._shared(step):
            return [step]
        block, use, i = self._at(step)
        assert use == 0, "it makes none"
        return [step, *(self._step(block, k, self._order(block, k, slot).index(i)) for k in range(1, self.uses))]

    def pending(self, step: int) -> dict[tuple[int, int], list[int]]:
        """(step, slot) of the rollouts that are made before `step` -> their uses at it or later; those without are left out."""
        if self.uses == 1:
            return {}
        self._count(lambda: self._counted < step)
        before = len([known for known in self._steps if known < step])
        pending = {}
        for made in self._steps[before - before % (self.uses * SPREAD) : before]:
            for slot in range(self.slots if self._at(made)[1] == 0 else 0):
                if later := [use for use, at in enumerate(self.steps_of(made, slot)) if at >= step]:
                    pending[made, slot] = later
        return pending

    def _shared(self, step: int) -> bool:
        return self.uses > 1 and self._has_rollout(step)

    def _order(self, block: int, use: int, slot: int) -> list[int]:
        order: list[int] = torch.randperm(SPREAD, generator=generator(self._seed, f"use {use}", block * self.slots + slot)).tolist()
        return order

    def _at(self, step: int) -> tuple[int, int, int]:
        """(block of K x SPREAD steps, round in it, position in the round)."""
        self._count(lambda: self._counted <= step)
        block, at = divmod(self._numbers[step], self.uses * SPREAD)
        return (block, *divmod(at, SPREAD))

    def _step(self, block: int, use: int, i: int) -> int:
        number = (block * self.uses + use) * SPREAD + i
        self._count(lambda: len(self._steps) <= number)
        return self._steps[number]

    def _count(self, more: Callable[[], bool]) -> None:
        while more():
            if self._has_rollout(self._counted):
                self._numbers[self._counted] = len(self._steps)
                self._steps.append(self._counted)
            self._counted += 1


def difference(
    found: Mapping[str, Tensor], schedule: Schedule, step: int, shape: Callable[[int, int], Sequence[int]], *, end: bool
) -> str | None:
    """What a checkpoint's rollouts are not of what a run has to keep after so many steps; None: they are that.

    Args:
        found: `Kept.state()` of all processes.
        schedule: the run's.
        step: optimizer steps done.
        shape: of the latents of a step's slot, (B, C, F, H, W).
        end: whether y_0 is kept too.
    """
    wanted = {}
    for (made, slot), uses in schedule.pending(step).items():
        for state in [*(f"y_t/{use}" for use in uses), *(["y_0"] if end else [])]:
            wanted[f"{made}/{slot}/{state}"] = tuple(shape(made, slot))
    for name in [*wanted, *found]:
        if name not in found or name not in wanted:
            return f"{name} is {'not part of this run' if name in found else 'missing'}"
        if tuple(found[name].shape) != wanted[name] or found[name].dtype != torch.float32:
            return f"{name} is {found[name].dtype} {tuple(found[name].shape)}, here it is torch.float32 {wanted[name]}"
    return None


class Kept:
    """The states of rollouts that have uses before them, of this process's slots; in main memory."""

    def __init__(self) -> None:
        self._states: dict[tuple[int, int], dict[str, Tensor]] = {}

    def put(self, step: int, slot: int, rollouts: Sequence[Rollout]) -> None:
        """All but the first of the rollouts that a step has made; the first it uses itself."""
        y_0 = rollouts[0].y_0
        states = {f"y_t/{use}": rollout.y_t for use, rollout in enumerate(rollouts) if use}
        self._states[step, slot] = {name: value.cpu() for name, value in states.items() | ({"y_0": y_0} if y_0 is not None else {}).items()}

    def take(self, step: int, slot: int, use: int, device: torch.device) -> Rollout:
        """One use of a rollout; with its last one it is forgotten."""
        states = self._states[step, slot]
        y_t, y_0 = states.pop(f"y_t/{use}"), states.get("y_0")
        if states.keys() <= {"y_0"}:
            del self._states[step, slot]
        return Rollout(y_t.to(device), None if y_0 is None else y_0.to(device))

    def state(self) -> dict[str, Tensor]:
        """Everything by `<step>/<slot>/<state>`."""
        return {f"{step}/{slot}/{name}": value for (step, slot), states in self._states.items() for name, value in states.items()}

    def load(self, tensors: Mapping[str, Tensor], slots: Callable[[int], bool]) -> None:
        """Go on from `state()` of all processes.

        Args:
            tensors: by name.
            slots: which are this process's.
        """
        for key, value in tensors.items():
            step, slot, name = key.split("/", 2)
            if slots(int(slot)):
                self._states.setdefault((int(step), int(slot)), {})[name] = value
