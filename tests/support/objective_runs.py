"""The objective on the toy, beside Algorithm 1 written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from byg_plugin.objectives.base import Batch, Metrics
from byg_plugin.objectives.unpaired_cycle import UnpairedCycle
from byg_plugin.objectives.unpaired_cycle_config import UnpairedCycleConfig
from tests.support import reference_algorithm1 as reference
from tests.support.toy_fields import RecordedFields, ToyFields, toy_network

EXACT = 1e-12


# What differs from the defaults: the package's switches, and the same in the transcription's terms.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {}),
    "weights": (
        {"lambda_cycle": 0.7, "lambda_prior": 1.9, "lambda_id": 0.4, "alpha": 0.3},
        {"lambda_cycle": 0.7, "lambda_prior": 1.9, "lambda_id": 0.4, "alpha": 0.3},
    ),
    "no routing": ({"routing": False}, {"routing": False}),
    "no bootstrap": ({"bootstrap": False}, {"bootstrap": False}),
    "no routing, no bootstrap": ({"routing": False, "bootstrap": False}, {"routing": False, "bootstrap": False}),
    "no cycle": ({"cycle": False}, {"lambda_cycle": 0.0}),
    "no direction": ({"directional": False}, {"directional": False}),
    "no reverse prior": ({"reverse_prior": False}, {"reverse_prior": False}),
    "no prior": ({"prior": False}, {"lambda_prior": 0.0}),
    "direction alone": ({"alpha": 0.0}, {"alpha": 0.0}),
    "no identity": ({"lambda_id": 0.0}, {"lambda_id": 0.0}),
    "identity alone": ({"cycle": False, "prior": False}, {"lambda_cycle": 0.0, "lambda_prior": 0.0}),
    "frozen one by one": ({"frozen_batch": 1}, {}),
    "frozen all at once": ({"frozen_batch": 4}, {}),
}
GRAPHS: dict[str, dict[str, Any]] = {
    "sequential": {"graph": "sequential"},
    "merged": {"graph": "sequential", "merge_identity": True},
    "joint": {"graph": "joint"},
}


def objective(**options: Any) -> UnpairedCycle:
    return UnpairedCycle(UnpairedCycleConfig(**options))


class Loop:
    """The loop's `backward`: `factor(loss)` is differentiated. Keeps what it was called with."""

    def __init__(self, fields: RecordedFields | None = None, factor: float = 1.0):
        self.fields, self.factor = fields, factor
        self.last: list[bool] = []

    def __call__(self, loss: Tensor, *, last: bool) -> float:
        assert self.fields is None or self.fields.active == "edit", "a backward outside the edit context"
        assert loss.ndim == 0 and loss.requires_grad
        self.last.append(last)
        (loss * self.factor).backward()
        return self.factor


def transcription(fields: ToyFields, batch: Batch, **weights: Any) -> tuple[Metrics, dict[str, Tensor]]:
    """Terms and LoRA gradients of the hand-written Algorithm 1; calls the network, not the recorded fields."""

    def one(text: Any, i: int) -> dict[str, Tensor]:
        return {name: value[i : i + 1] for name, value in text.items()}

    items = [
        reference.Tuple(
            x=batch.source[i : i + 1],
            p_src=one(batch.src_caption, i),
            p_tgt=one(batch.tgt_caption, i),
            c=one(batch.instruction, i),
            c_bar=one(batch.reverse_instruction, i),
            t=batch.t[i].item(),
            eps=batch.noise[i : i + 1],
        )
        for i in range(len(batch.t))
    ]
    terms = reference.batch_mean(
        lambda *inputs: toy_network(fields.weights, fields.lora, *inputs),
        lambda *inputs: toy_network(fields.weights, fields.ema_lora, *inputs),
        lambda *inputs: toy_network(fields.weights, None, *inputs),
        items,
        batch.nodes.tolist(),
        reference.Weights(**weights),
    )
    gradients = torch.autograd.grad(terms["loss"], list(fields.lora.values()))
    return {name: value.detach() for name, value in terms.items()}, dict(zip(fields.lora, gradients, strict=True))


def edit_calls(fields: RecordedFields, batch: Batch) -> dict[str, Any]:
    """The edit calls by role; the identity pass is the one conditioned on the source with the reverse instruction."""
    roles = {}
    for call in fields.of("edit"):
        if torch.equal(call.text["tokens"], batch.instruction["tokens"]):
            role = "forward"
        else:
            role = "identity" if torch.equal(call.source, batch.source) else "reverse"
        assert role not in roles or not call.grad_enabled or not roles[role].grad_enabled, f"{role} was differentiated twice"
        if call.grad_enabled or role not in roles:
            roles[role] = call
    return roles
