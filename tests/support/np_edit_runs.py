"""NP-Edit on the toy, beside its transcription by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from byg_plugin.objectives.base import Batch, Metrics
from byg_plugin.objectives.np_edit import NpEdit
from byg_plugin.objectives.np_edit_config import NpEditConfig
from tests.support import reference_np_edit as reference
from tests.support.toy_fields import CHANNELS, ToyFields, numbers, toy_network

EXACT = 1e-10
# What differs from the defaults: the package's keys, and the same in the transcription's terms.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {}),
    "weights": ({"lambda_vlm": 0.7, "lambda_dmd": 0.3, "lambda_id": 2.5}, {"vlm": 0.7, "dmd": 0.3, "identity": 2.5}),
    "one guidance": ({"guidance": 2.0, "strong_types": []}, {"guidance": 2.0, "strong_guidance": 2.0}),
    "no guidance": ({"guidance": 1.0, "strong_types": []}, {"guidance": 1.0, "strong_guidance": 1.0}),
    "strong guidance alone": ({"guidance": 1.0, "strong_guidance": 2.0}, {"guidance": 1.0, "strong_guidance": 2.0}),
    "ranges of t": (
        {"t_min": 0.05, "t_max": 0.95, "dmd_t_min": 0.1, "dmd_t_max": 0.7},
        {"law": (0.05, 0.95), "scores": (0.1, 0.7)},
    ),
    "no dmd": ({"dmd": False}, {"dmd": 0.0}),
    "no vlm": ({"vlm": False}, {}),
    "no identity question": ({"identity_question": False}, {}),
}
STUDENT = ("full-1", "full-2", "full-4", "identity-1", "identity-3")
KINDS = (*STUDENT, "fake-1", "fake-4", "copy")


def objective(**options: Any) -> NpEdit:
    return NpEdit(NpEditConfig(**options))


class ToyCritic:
    """A small network that looks at the edit, the source and the question; a mean over the batch."""

    def __init__(self) -> None:
        self.weights = numbers(7, 2 * CHANNELS, seed="critic", scale=0.7).requires_grad_()
        self.asked: list[tuple[Tensor, bool]] = []

    def __call__(self, x0: Tensor, batch: Batch, *, identity_question: bool) -> tuple[Tensor, Metrics]:
        self.asked.append((x0, identity_question))
        losses = [self.one(x0[i : i + 1], batch.source[i : i + 1], identity_question) for i in range(len(x0))]
        loss = torch.stack(losses).mean()
        return loss, {"yes": torch.exp(-loss.detach())}

    def one(self, x0: Tensor, source: Tensor, identity_question: bool) -> Tensor:
        both = torch.cat([x0, source], dim=1).flatten(2).transpose(1, 2)
        seen = torch.tanh(both @ self.weights.T)
        edit = torch.nn.functional.softplus(-seen[..., :4].sum(dim=-1)).mean()
        rest = torch.nn.functional.softplus(seen[..., 4:].sum(dim=-1)).mean()
        return 0.5 * (edit + rest) if identity_question else edit


def fields_with_critic() -> ToyFields:
    fields = ToyFields()
    fields.critique = ToyCritic()
    return fields


def samples_of(batch: Batch) -> list[reference.Sample]:
    def one(text: Any, i: int) -> dict[str, Tensor]:
        return {name: value[i : i + 1] for name, value in text.items()}

    return [
        reference.Sample(
            x=batch.source[i : i + 1],
            c=one(batch.instruction, i),
            nothing=one(batch.beside["do_nothing"], i),
            p_src=one(batch.src_caption, i),
            p_tgt=one(batch.tgt_caption, i),
            negative=one(batch.beside["negative"], i),
            t=batch.t[i].item(),
            eps=batch.noise[i : i + 1],
            eps_unroll=batch.fresh[0][i : i + 1],
            eps_score=batch.fresh[1][i : i + 1],
            removal=batch.words[i].edit_type == "remove",
        )
        for i in range(len(batch.t))
    ]


def transcription(fields: ToyFields, batch: Batch, options: dict[str, Any], **weights: Any) -> tuple[Metrics, dict[str, Tensor]]:
    """Terms by hand, and the gradients of the adapter that a step of the batch's kind trains."""
    editor = lambda *inputs: toy_network(fields.weights, fields.lora, *inputs)  # noqa: E731
    teacher = lambda *inputs: toy_network(fields.weights, None, *inputs)  # noqa: E731
    fake = lambda *inputs: toy_network(fields.weights, fields.fake_lora, *inputs)  # noqa: E731
    kind, _, k = batch.kind.partition("-")
    assert batch.nodes is not None
    t_k = batch.nodes[int(k or 4) - 1].item()
    toy_critic = ToyCritic()
    question = options.get("identity_question", True)
    critic = None if options.get("vlm") is False else lambda x_0, s: toy_critic.one(x_0, s.x, question)
    losses = []
    for sample in samples_of(batch):
        if kind == "copy":
            losses.append(reference.copy_loss(editor, sample))
        elif kind == "fake":
            losses.append(reference.fake_loss(editor, fake, sample, t_k))
        else:
            losses.append(
                reference.editor_loss(editor, teacher, fake, critic, sample, t_k, reference.Weights(**weights), kind == "identity")
            )
    terms = {name: sum(each[name] for each in losses) / len(losses) for name in losses[0]}
    trained = fields.fake_lora if kind == "fake" else fields.lora
    gradients = torch.autograd.grad(terms["loss"], list(trained.values()))
    return {name: value.detach() for name, value in terms.items()}, dict(zip(trained, gradients, strict=True))
