"""A run that leaves the finite numbers is stopped, and where that came from is said: the data, the weights, or the step's size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from byg_plugin.config.sections import TrainConfig
from byg_plugin.data.dataset import CachedTuples
from byg_plugin.data.rules import ROLES
from byg_plugin.finite import all_finite, first_not_finite, not_finite
from byg_plugin.hosts import Host
from byg_plugin.hosts.sharding import local
from byg_plugin.objectives.base import EDIT, Metrics
from byg_plugin.training import checkpoint
from byg_plugin.training.engine import Engine, is_left_out

MOST_LEFT_OUT = 10
"""Updates of one adapter that `train.skip_grad_norm` may leave out in a row."""


class Diagnosis:
    """Looks at a step's terms, then at its weights, then at what is saved.

    Args:
        train: the `[train]` section.
        host: the networks.
        data: the tuples that are trained on.
        engine: agrees over processes.
        checkpoints: the folder of the way back.
    """

    def __init__(self, train: TrainConfig, host: Host, data: CachedTuples, engine: Engine, checkpoints: Path):
        self.train, self.host, self.data, self.engine, self.checkpoints = train, host, data, engine, checkpoints
        self._in_a_row: Counter[str] = Counter()
        self._left_out = 0

    def before_step(
        self,
        step: int,
        metrics: Metrics,
        norms: Mapping[str, Tensor],
        micro_batches: Sequence[dict[str, Any]],
        terms: Sequence[Metrics],
    ) -> None:
        """Before an optimizer step.

        Args:
            step: its number, from 1.
            metrics: of the whole step.
            norms: of the gradients of the adapters that it trains, averaged over the processes: the same on each.
            micro_batches: what it has seen.
            terms: the metrics of each of them.

        Raises:
            FloatingPointError: a term is not finite, on any process; or a norm, of which `train.skip_grad_norm` leaves out a few.
        """
        row = None
        if self.train.skip_grad_norm:
            row = self._row_left_out(norms)
        else:
            metrics = metrics | {"gradient norm" if name == EDIT else f"gradient norm/{name}": norm for name, norm in norms.items()}
        bad = not_finite(metrics)
        if self.engine.any(bool(bad or row)):
            what = f"{', '.join(bad) or 'another process'} is not finite" if bad or not row else row
            raise FloatingPointError(
                f"{what} at step {step}; the weights were not changed. {self._why(micro_batches, terms)}. {self._way_back()}"
            )

    def _row_left_out(self, norms: Mapping[str, Tensor]) -> str | None:
        """Counts what is left out; says so when it is too much of one adapter."""
        limit, too_many = self.train.skip_grad_norm, None
        for name, norm in norms.items():
            left_out = is_left_out(norm, limit)
            self._left_out += left_out
            self._in_a_row[name] = self._in_a_row[name] + 1 if left_out else 0
            if self._in_a_row[name] >= MOST_LEFT_OUT:
                too_many = (
                    f"train.skip_grad_norm = {limit} has left out {self._in_a_row[name]} updates of the adapter {name} in a row, the last "
                    f"one with a gradient norm of {norm.item():.3g}"
                )
        return too_many

    def left_out(self) -> dict[str, float]:
        """For the log: the updates that were left out since this was asked before; nothing where none may be."""
        counted, self._left_out = self._left_out, 0
        return {"left_out": float(counted)} if self.train.skip_grad_norm else {}

    def after_step(self, step: int) -> None:
        """What the optimizer has made of finite gradients (a weight decay of 1e308, a rate of 1e30) must not be saved.

        Raises:
            FloatingPointError: a weight is not finite.
        """
        weights = self._weights()
        if not all_finite([value for _, value in weights]):
            raise FloatingPointError(
                f"{first_not_finite(weights)} is not finite after step {step}, although its gradient was; nothing of this step is saved. "
                f"Try a lower train.lr ({self.train.lr}) or train.weight_decay ({self.train.weight_decay}). {self._way_back()}"
            )

    def before_saving(self, state: checkpoint.TrainingState) -> None:
        """Also what no step looks at: the averages and the optimizer's moments.

        Raises:
            FloatingPointError: something of it is not finite.
        """
        for adapter in state.adapters.values():
            moments, _ = checkpoint.split_optimizer(adapter.optimizer)
            every = {f"the LoRA's {k}": v for k, v in adapter.lora.items()} | {f"the EMA's {k}": v for k, v in adapter.ema.items()}
            if (name := first_not_finite(every | moments)) is not None:
                raise FloatingPointError(
                    f"{name} is not finite after step {state.step}; nothing of it is saved. "
                    f"Try a lower train.lr or train.max_grad_norm. {self._way_back()}"
                )

    def _why(self, micro_batches: Sequence[dict[str, Any]], terms: Sequence[Metrics]) -> str:
        """The learning rate is blamed only when data and weights are clean."""
        guilty = [examples for examples, found in zip(micro_batches, terms, strict=True) if not_finite(found)] or list(micro_batches)
        entries = [self._not_finite_entry(examples) for examples in guilty]
        if found := [entry for entry in entries if entry]:
            return f"The data are the reason: {'; '.join(found)}; remove dataset.cache_dir and cache again"
        weights = [(f"the LoRA's {name}", value) for name, value in self._weights()]
        weights += [(f"the EMA's {name}", value) for adapter in self.host.adapters.values() for name, value in adapter.ema.state().items()]
        # Of shards this process's own: the others may have found their reason already, and a gather would wait for them.
        frozen = ((f"{key}'s {name}", local(p)) for key, network in self.host.networks.items() for name, p in network.named_parameters())
        if (name := first_not_finite(weights)) is not None or (name := first_not_finite(frozen)) is not None:
            return f"The weights are the reason: {name} holds NaN or infinite values"
        tuples = ", ".join(dict.fromkeys(self._tuple_name(index) for examples in guilty for index in examples["index"]))
        shown = f" (tuples: {tuples:.300})" if tuples else ""
        return f"Data{shown} and weights are finite: try a lower train.lr or train.max_grad_norm, or model.dtype = 'bfloat16'"

    def _weights(self) -> list[tuple[str, Tensor]]:
        return [(name, p.detach()) for adapter in self.host.adapters.values() for name, p in adapter.parameters.items()]

    def _not_finite_entry(self, examples: Mapping[str, Any]) -> str | None:
        """The first tensor of a micro-batch with NaN or infinite values, by its tuple."""
        named = {name: examples[name] for name in ("source", "target") if name in examples}
        named |= {f"{role} ({part})": value for role in ROLES for part, value in examples[role].items()}
        for row, index in enumerate(examples["index"]):
            if (name := first_not_finite((name, value[row]) for name, value in named.items())) is not None:
                return f"the cached {name} of tuple {self._tuple_name(index)} holds NaN or infinite values"
        return None

    def _tuple_name(self, index: int) -> str:
        item = self.data.tuples[index]
        return f"{item.id} ({item.source})"

    def _way_back(self) -> str:
        text = checkpoint.way_back(self.checkpoints)
        return text[0].upper() + text[1:]
