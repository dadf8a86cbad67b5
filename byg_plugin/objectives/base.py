"""What an objective sees: velocity fields over one frozen network, a batch, a critic where it asks one, and a way to differentiate.

Nothing here knows a host, a model family or a loop. A host supplies the fields; a loop draws noise and t, supplies
`backward`, and steps the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Text = Mapping[str, Tensor]
"""One or several encoded texts: named tensors with the batch first (`texts.py`). Only a family looks inside."""

Metrics = dict[str, Tensor]
"""Detached scalars by name."""

EDIT = "edit"
"""The adapter that edits: the first of every objective, the one of rollouts, previews and LoRA files."""

FAKE = "fake"
"""The adapter of a score network: what the editor's own results are distributed like. It never sees a source."""

FULL, IDENTITY = "full", "identity"
"""Kinds of steps: all terms, the identity term alone."""


class Velocity(Protocol):
    """A velocity field: (noisy (B, C, F, H, W), t (B,), text of B, source like noisy or None) -> like noisy, float32."""

    def __call__(self, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor: ...


class Critique(Protocol):
    """How well x0 carries out its edit, in a graph of its own."""

    def __call__(self, x0: Tensor, batch: Batch, *, identity_question: bool) -> tuple[Tensor, Metrics]:
        """Loss and metrics of edited latents.

        Args:
            x0: (B, C, F, H, W), as the editor made it.
            batch: whose sources; `batch.words` says what was asked for, `batch.updates` how far the editor has come.
            identity_question: whether it is also asked if the rest is as it was.

        Returns:
            the loss, a mean over the batch, float32, differentiable with respect to x0 alone; metrics (probability of the
            right answer and share of right ones, by question), of the same names for every batch: their means are taken over processes.
        """
        ...


class VelocityFields(Protocol):
    """One network in several states. Each context restores the state it found, also after an exception.

    `edit`: LoRA on, trainable; a backward of what it returned runs inside the context.
    `ema`: the rollout's weights (EMA, or the current ones with decay 0); no gradient.
    `base`: LoRA off, to the last bit the model without LoRA; never called with a source; no gradient.
    `fake`: the LoRA `FAKE` in the other one's stead, trainable; never called with a source. Only where the objective trains it.
    """

    critique: Critique | None
    """The critic, where the objective asks one."""

    def edit(self) -> AbstractContextManager[Velocity]: ...

    def ema(self) -> AbstractContextManager[Velocity]: ...

    def base(self) -> AbstractContextManager[Velocity]: ...

    def fake(self) -> AbstractContextManager[Velocity]: ...


class Backward(Protocol):
    """Differentiate a loss now. Returns the factor the loss was multiplied by (accumulation, loss scale).

    `last` is true on a micro-step's final call: only then may gradients be synchronised.
    """

    def __call__(self, loss: Tensor, *, last: bool) -> float: ...


class Words(NamedTuple):
    """A tuple's texts as they were written, for who reads language."""

    id: str
    instruction: str
    src_caption: str
    tgt_caption: str
    edit_type: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One micro-batch with its randomness, drawn by the caller."""

    source: Tensor
    """x: latents (B, C, F, H, W)."""
    src_caption: Text
    tgt_caption: Text
    instruction: Text
    reverse_instruction: Text
    noise: Tensor
    """epsilon, like source: the same noise starts the rollout and makes x_t."""
    t: Tensor
    """(B,) in [0, 1]."""
    nodes: Tensor | None = None
    """(n + 1,) rollout nodes from 1 to 0, before t is moved in; None for an objective without rollouts."""
    boundary: float | None = None
    """t at which one expert hands over to the other; None: one network."""
    kind: str = FULL
    """Of the optimizer step, as the objective has planned it."""
    target: Tensor | None = None
    """y: the edited latents, where the objective requires them."""
    fresh: tuple[Tensor, ...] = ()
    """More noise like `noise`, as many tensors as `ObjectiveConfig.fresh_noises` says."""
    beside: Mapping[str, Text] = field(default_factory=dict)
    """Encodings of B of the texts that no tuple has, by the names of `ObjectiveConfig.texts_beside`."""
    words: tuple[Words, ...] = ()
    """Of each sample; none on a host whose caches have no texts."""
    updates: int | None = 0
    """Optimizer steps that have trained the adapter `EDIT` before this one; None: of a validation, which is the same over a run."""

    def rows(self, which: Sequence[int]) -> Batch:
        """Some of its samples."""
        index = list(which)

        def some(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[index]
            if isinstance(value, Mapping):
                return {name: some(each) for name, each in value.items()}
            return tuple(some(each) for each in value) if isinstance(value, tuple) else value

        of_all = {"nodes": self.nodes, "words": tuple(self.words[i] for i in index)}
        # The nodes are of no sample: a batch may have more samples than a rollout has nodes.
        return replace(self, **{each.name: some(getattr(self, each.name)) for each in fields(self) if each.name not in of_all}, **of_all)

    @property
    def identity_step(self) -> bool:
        """Train the identity term alone."""
        return self.kind == IDENTITY


class Plan(NamedTuple):
    """What an optimizer step does: the same on every process."""

    kind: str = FULL
    """A name that the objective gives and finds in its batches."""
    adapters: tuple[str, ...] = (EDIT,)
    """Those that it trains; the others get no gradient."""


class StepMemory(NamedTuple):
    """What a step keeps on the device, for the memory sum."""

    graphs: int = 1
    """Forward passes whose activations are alive at once."""
    rows: int = 1
    """Samples of one such pass, in micro-batches."""
    merged_weights: bool = False
    """Whether the rollout has linears of its own with the LoRA merged in."""


class Objective(Protocol):
    """A training objective. It is made from its section, which says what it requires, and keeps no state: a resumed run makes it anew."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the trainable sets of weights, `EDIT` first; each has an optimizer of its own."""
        ...

    @property
    def averaged(self) -> tuple[str, ...]:
        """Those of the adapters that have a moving average."""
        ...

    @property
    def memory(self) -> StepMemory:
        """What a step keeps."""
        ...

    def plan(self, step: int, seed: int) -> Plan:
        """What optimizer step `step` (from 0) of a run with this seed does: a pure function, so that a resumed run does the same."""
        ...

    def step(self, fields: VelocityFields, batch: Batch, backward: Backward | None) -> Metrics:
        """Compute all terms and differentiate them; with `backward=None` only compute (validation)."""
        ...
