"""A float64 network small enough for 1e-12 and real enough to be wrong: attention over noisy, source and text tokens.

Its output depends on every input, edit, EMA and base are three different functions, and its contexts refuse to be used
in another way than the objective's contract says. Numbers come from Python's generator: the same on every platform.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from byg_plugin.objectives.base import FULL, IDENTITY, Batch, Critique, Text, Words

CHANNELS, FRAMES, HEIGHT, WIDTH = 3, 1, 2, 2
TOKENS = FRAMES * HEIGHT * WIDTH
HIDDEN, MLP, RANK, TEXT_DIM, TEXT_TOKENS, POOLED = 6, 10, 2, 5, 3, 4
ADAPTED = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN)}
ADAPTED |= {"up": (MLP, HIDDEN), "down": (HIDDEN, MLP)}
PLAIN = {"in": (HIDDEN, CHANNELS), "src": (HIDDEN, CHANNELS), "text": (HIDDEN, TEXT_DIM), "pooled": (HIDDEN, POOLED)}
PLAIN |= {"time": (HIDDEN, 3), "head": (CHANNELS, HIDDEN), "position": (TOKENS, HIDDEN)}

Lora = dict[str, Tensor]


def numbers(*shape: int, seed: str, scale: float = 1.0) -> Tensor:
    """Normal float64 numbers that depend on the seed's text alone."""
    rng = random.Random(seed)
    count = int(torch.Size(shape).numel())
    return torch.tensor([rng.gauss(0.0, scale) for _ in range(count)], dtype=torch.float64).view(shape)


def toy_lora(seed: str) -> Lora:
    """A and B of every adapted linear; B is not zero."""
    lora: Lora = {}
    for name, (rows, columns) in ADAPTED.items():
        lora[f"{name}.A"] = numbers(RANK, columns, seed=f"{seed}/{name}/A", scale=0.4)
        lora[f"{name}.B"] = numbers(rows, RANK, seed=f"{seed}/{name}/B", scale=0.4)
    return lora


def toy_weights() -> dict[str, Tensor]:
    """The frozen weights; the head is not zero."""
    return {name: numbers(*shape, seed=f"weight/{name}", scale=0.45) for name, shape in (ADAPTED | PLAIN).items()}


def toy_network(weights: dict[str, Tensor], lora: Lora | None, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
    """(B, C, F, H, W) -> velocity of that shape."""

    def linear(name: str, x: Tensor) -> Tensor:
        out = x @ weights[name].T
        return out if lora is None else out + (x @ lora[f"{name}.A"].T) @ lora[f"{name}.B"].T

    def tokens(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    time = torch.stack([torch.cos(3 * t), torch.sin(3 * t), t], dim=1) @ weights["time"].T
    states = [tokens(noisy) @ weights["in"].T + weights["position"] + time[:, None]]
    if source is not None:
        states.append(tokens(source) @ weights["src"].T + weights["position"])
    states.append(text["tokens"] @ weights["text"].T)
    z = torch.cat(states, dim=1) * (1 + 0.3 * torch.tanh(text["pooled"] @ weights["pooled"].T))[:, None]
    scores = linear("q", z) @ linear("k", z).transpose(1, 2) / HIDDEN**0.5
    z = z + linear("o", scores.softmax(dim=-1) @ linear("v", z))
    z = z + linear("down", torch.tanh(linear("up", z)))
    return (z[:, :TOKENS] @ weights["head"].T).transpose(1, 2).reshape(noisy.shape)


@dataclass
class Call:
    """One evaluation of a field."""

    state: str
    noisy: Tensor
    t: Tensor
    text: Text
    source: Tensor | None
    grad_enabled: bool
    value: Tensor


class RecordedFields:
    """`edit`, `ema`, `base` and `fake` from plain functions; records every call and enforces the contract of use."""

    critique: Critique | None = None

    def __init__(
        self,
        edit: Callable[..., Tensor],
        ema: Callable[..., Tensor],
        base: Callable[..., Tensor],
        fake: Callable[..., Tensor] | None = None,
    ):
        self.functions = {"edit": edit, "ema": ema, "base": base} | ({"fake": fake} if fake else {})
        self.calls: list[Call] = []
        self.opened: list[str] = []
        self.active: str | None = None
        self.before_call: Callable[[str], None] = lambda state: None

    @contextmanager
    def _context(self, state: str) -> Iterator[Any]:
        assert self.active is None, f"{state} was opened inside {self.active}"
        self.active = state
        self.opened.append(state)

        def velocity(noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
            assert self.active == state, f"{state} was called while {self.active} was active"
            assert (source is None) == (state in ("base", "fake")), f"{state} with source {type(source)}"
            assert t.shape == noisy.shape[:1] and all(len(value) == len(noisy) for value in text.values())
            self.before_call(state)
            value = self.functions[state](noisy, t, text, source)
            self.calls.append(Call(state, noisy, t, text, source, torch.is_grad_enabled(), value))
            return value

        try:
            yield velocity
        finally:
            self.active = None

    def edit(self) -> Any:
        return self._context("edit")

    def ema(self) -> Any:
        return self._context("ema")

    def base(self) -> Any:
        return self._context("base")

    def fake(self) -> Any:
        return self._context("fake")

    def of(self, state: str) -> list[Call]:
        return [call for call in self.calls if call.state == state]


class ToyFields(RecordedFields):
    """The toy network's states.

    EMA LoRA and base weights require gradient here, although nothing may give them one: a leak shows as a `.grad`.
    Args:
        current: the EMA state is the live weights (decay 0).
    """

    def __init__(self, current: bool = False):
        self.weights = toy_weights()
        self.base_weights = {name: value.clone().requires_grad_() for name, value in self.weights.items()}
        self.lora = {name: value.requires_grad_() for name, value in toy_lora("live").items()}
        self.ema_lora = self.lora if current else {name: value.requires_grad_() for name, value in toy_lora("ema").items()}
        self.fake_lora = {name: value.requires_grad_() for name, value in toy_lora("fake").items()}
        super().__init__(
            lambda *inputs: toy_network(self.weights, self.lora, *inputs),
            lambda *inputs: toy_network(self.weights, self.ema_lora, *inputs),
            lambda *inputs: toy_network(self.base_weights, None, *inputs),
            lambda *inputs: toy_network(self.weights, self.fake_lora, *inputs),
        )

    def gradients(self, lora: Lora | None = None) -> dict[str, Tensor]:
        """A LoRA's gradients, by default the editor's; one that is missing is an error."""
        gradients = {name: value.grad for name, value in (self.lora if lora is None else lora).items()}
        missing = [name for name, value in gradients.items() if value is None]
        assert not missing, f"no gradient for {missing}"
        return {name: value.clone() for name, value in gradients.items() if value is not None}


def toy_text(count: int, seed: str) -> Text:
    return {
        "tokens": numbers(count, TEXT_TOKENS, TEXT_DIM, seed=f"{seed}/tokens"),
        "pooled": numbers(count, POOLED, seed=f"{seed}/pooled"),
    }


def toy_batch(
    t: tuple[float, ...] = (0.13, 0.52, 0.87), seed: str = "batch", steps: int = 5, identity_step: bool = False, kind: str = ""
) -> Batch:
    """One sample for each t; every other one is a removal."""
    count = len(t)
    shape = (count, CHANNELS, FRAMES, HEIGHT, WIDTH)
    return Batch(
        source=numbers(*shape, seed=f"{seed}/source"),
        noise=numbers(*shape, seed=f"{seed}/noise"),
        src_caption=toy_text(count, f"{seed}/src_caption"),
        tgt_caption=toy_text(count, f"{seed}/tgt_caption"),
        instruction=toy_text(count, f"{seed}/instruction"),
        reverse_instruction=toy_text(count, f"{seed}/reverse_instruction"),
        t=torch.tensor(t, dtype=torch.float64),
        nodes=torch.linspace(1, 0, steps + 1, dtype=torch.float64),
        kind=kind or (IDENTITY if identity_step else FULL),
        target=numbers(*shape, seed=f"{seed}/target"),
        fresh=tuple(numbers(*shape, seed=f"{seed}/fresh {i}") for i in range(2)),
        beside={name: toy_text(count, f"{seed}/{name}") for name in ("do_nothing", "negative")},
        words=tuple(Words(f"{i}", "do it", "before", "after", ("remove", "add", None)[i % 3]) for i in range(count)),
    )


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest over the tensors of ||found - expected|| / ||expected||; no tensor may be expected to be zero."""
    assert found.keys() == expected.keys()
    assert all(value.norm() > 1e-8 for value in expected.values()), "a comparison with zero shows nothing"
    return max(((found[name] - expected[name]).norm() / expected[name].norm()).item() for name in expected)
