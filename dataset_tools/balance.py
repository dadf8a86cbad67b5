"""Which edit types an image is offered: fixed priorities times an online term for what this run has used so far."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from byg_plugin.data.rules import EDIT_TYPES

# Appendix D.1 over-samples remove and replace "slightly"; how much is not in the paper.
PRIORITY = {name: 1.5 if name in ("remove", "replace") else 1.0 for name in EDIT_TYPES}


class Balance:
    """Draws k different types an image, each next one with probability proportional to its weight among those left.

    weight = priority / (1 + use / share), use = accepted + reserved in flight, share = priority / mean priority. So use is
    drawn towards priority; a model's own preferences are damped to about their square root, not removed. Of k types that
    are offered and not answered yet, each counts 1 / k: one of them will be used.
    """

    def __init__(self, priority: Mapping[str, float] = PRIORITY, accepted: Mapping[str, int] | None = None):
        self.priority = dict(priority)
        self.accepted: Counter[str] = Counter(accepted or {})
        self._in_flight: Counter[tuple[int, str]] = Counter()  # (k, type): whole numbers, so that they return to 0

    def use(self, name: str) -> float:
        """Accepted, and reserved in flight."""
        return self.accepted[name] + sum(count / k for (k, other), count in self._in_flight.items() if other == name)

    def weights(self) -> dict[str, float]:
        """Relative chance of each type at the next draw."""
        mean = sum(self.priority.values()) / len(self.priority)
        return {name: p / (1.0 + self.use(name) / (p / mean)) for name, p in self.priority.items()}

    def draw(self, rng: random.Random, k: int) -> tuple[str, ...]:
        """k different types."""
        left = self.weights()
        drawn = []
        for _ in range(min(k, len(left))):
            name = rng.choices(list(left), list(left.values()))[0]
            drawn.append(name)
            del left[name]
        return tuple(drawn)

    def reserve(self, offered: Sequence[str]) -> None:
        """An image is in flight with these types."""
        self._in_flight.update((len(offered), name) for name in offered)

    def release(self, offered: Sequence[str], chosen: str | None) -> None:
        """It has come back: with one of them, or rejected."""
        self._in_flight.subtract((len(offered), name) for name in offered)
        assert min(self._in_flight.values(), default=0) >= 0, "released what was not reserved"
        if chosen is not None:
            self.accepted[chosen] += 1
