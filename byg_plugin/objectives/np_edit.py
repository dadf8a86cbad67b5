"""NP-Edit, "Learning an Image Editing Model without Image Editing Pairs" (arXiv 2510.14978): a few-step editor G without pairs.

From a source x, its target caption p_tgt and an instruction c, with noises and a number k of 1 .. n that all processes share; the nodes
1 = t_1 > ... > t_n are those of the n steps that the editor shall edit in:

    unroll    x_hat = eps - G(eps, 1, c, x);   x_t = (1 - t_k) x_hat + t_k eps';   x_0 = x_t - t_k G(x_t, t_k, c, x)
              k = 1: x_0 = x_hat. The gradient passes both calls.
    L_vlm     a vision-language model's two-way cross-entropy of Yes and No: is the edit made, is the rest as it was
    L_dmd     0.5 ||x_0 - sg(x_0 - g)||^2,   g = (x_fake - x_real) / mean|x_0 - x_real|, predictions of the data at a re-noised x_0:
              x_real by the frozen base with guidance, x_fake by the fake score, both with p_tgt and without source
    L         lambda_vlm L_vlm + lambda_dmd L_dmd

An optimizer step trains one adapter: `fake_updates` steps of the fake score, by flow matching on samples of the same unroll, then one of
the editor. Now and then a step of the editor is an identity step: the instruction is "do nothing.", the caption is the source's, no
critic is asked, and ||x_0 - x||^2 is added. Before all this the editor learns to copy: flow matching on x with x for its source.

How the gradient is taken differs from one graph, its value does not. Every loss is a function of x_0, so the unroll is made without
gradient first. Then each term gives its d L / d x_0 in a graph of its own, which is freed (that of L_dmd is known without one), and the
two calls of the unroll are made again, the last one first: with `leaf` = x_t, <dL/dx_0, x_0> is differentiated, `leaf.grad` is handed on to
x_hat, and the graph is gone before the first call's is built. The peak is the larger one of the critic's graph and one pass of the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from byg_plugin import flow
from byg_plugin.objectives.base import EDIT, FAKE, FULL, IDENTITY, Backward, Batch, Metrics, Plan, StepMemory, Text, VelocityFields
from byg_plugin.objectives.np_edit_config import DO_NOTHING, NEGATIVE
from byg_plugin.randomness import coin, pick

if TYPE_CHECKING:
    from byg_plugin.objectives.np_edit_config import NpEditConfig

COPY = "copy"
"""The kind of a warm-up step."""


class Call(NamedTuple):
    """One call of the editor: its noisy input and t (B,)."""

    noisy: Tensor
    t: Tensor


class Unrolled(NamedTuple):
    """An edit without gradient."""

    calls: list[Call]
    x_0: Tensor


class NpEdit:
    """See the module. `config` is the `[objective]` section."""

    averaged = (EDIT,)
    memory = StepMemory()

    def __init__(self, config: NpEditConfig):
        self.config = config
        self.lambda_vlm, self.lambda_dmd, self.lambda_id = config.lambda_vlm, config.lambda_dmd, config.lambda_id

    @property
    def adapters(self) -> tuple[str, ...]:
        """The editor and, for distribution matching, the fake score."""
        return (EDIT, FAKE) if self.config.dmd else (EDIT,)

    def plan(self, step: int, seed: int) -> Plan:
        """Copying, then by turns the fake score's steps and one of the editor; a kind ends with k."""
        if step < self.config.identity_warmup_steps:
            return Plan(COPY)
        k = pick(seed, step, self.config.sampling_steps, "unroll")
        turns = self.config.fake_updates + 1
        if self.config.dmd and (step - self.config.identity_warmup_steps) % turns < self.config.fake_updates:
            return Plan(f"{FAKE}-{k}", (FAKE,))
        return Plan(f"{IDENTITY if coin(seed, step, self.config.identity_probability) else FULL}-{k}")

    def step(self, fields: VelocityFields, batch: Batch, backward: Backward | None) -> Metrics:
        """One micro-step of the kind that `plan` gave.

        Args:
            fields: the network as `edit`, `base` and `fake` fields, and the critic.
            batch: latents, texts, noises, t; the kind "full" without a k, of a validation, unrolls to the last node.
            backward: differentiates a loss; None computes the terms without gradient.

        Returns:
            detached scalars: `loss`, each term, and the critic's metrics.
        """
        kind, _, k = batch.kind.partition("-")
        with torch.set_grad_enabled(backward is not None):
            if kind == COPY:
                return self._copy(fields, batch, backward)
            assert batch.nodes is not None
            unrolled = Unroll(fields, batch, batch.beside[DO_NOTHING] if kind == IDENTITY else batch.instruction)
            edit = unrolled.without_gradient(int(k or self.config.sampling_steps))
            if kind == FAKE:
                return self._train_fake(fields, batch, edit.x_0, backward)
            metrics, gradient = self._judge(fields, batch, edit.x_0, identity=kind == IDENTITY, differentiate=backward is not None)
            if backward is not None:
                unrolled.differentiate(edit.calls, gradient, backward)
            return metrics

    # --- the editor ---

    def _copy(self, fields: VelocityFields, batch: Batch, backward: Backward | None) -> Metrics:
        """Flow matching on the source, with its caption [R] and itself as the source."""
        x_t = flow.interpolate(batch.source, batch.noise, batch.t)
        with fields.edit() as velocity:
            v = velocity(x_t, batch.t, batch.src_caption, batch.source)
            loss = flow.mean_squared(v - flow.path_velocity(batch.source, batch.noise)).mean()
            if backward is not None:
                backward(loss, last=True)
        return {"loss": loss.detach(), "copy": loss.detach()}

    def _judge(self, fields: VelocityFields, batch: Batch, x_0: Tensor, *, identity: bool, differentiate: bool) -> tuple[Metrics, Tensor]:
        """All terms of an edit, and d L / d x_0: term by term, each graph freed before the next one."""
        terms: list[tuple[float, Callable[[Tensor], tuple[Tensor, Metrics]]]] = []
        if self.config.dmd:
            matched = self._matched(fields, batch, x_0, identity=identity)
            terms.append((self.lambda_dmd, lambda leaf: _named("dmd", 0.5 * flow.mean_squared(leaf - matched).mean())))
        if identity:
            terms.append((self.lambda_id, lambda leaf: _named("identity", flow.mean_squared(leaf - batch.source).mean())))
        elif self.config.criticised:
            terms.append((self.lambda_vlm, lambda leaf: self._critique(fields, batch, leaf)))
        total, gradient, metrics = x_0.new_zeros(()), torch.zeros_like(x_0), Metrics()
        for weight, term in terms:
            leaf = x_0.clone().requires_grad_(differentiate)
            value, more = term(leaf)
            if differentiate:
                gradient += torch.autograd.grad(weight * value, leaf)[0]
            total, metrics = total + weight * value.detach(), metrics | more
        return {"loss": total, **metrics}, gradient

    def _critique(self, fields: VelocityFields, batch: Batch, x_0: Tensor) -> tuple[Tensor, Metrics]:
        assert fields.critique is not None, "the loop gives a critic to who asks one"
        loss, metrics = fields.critique(x_0, batch, identity_question=self.config.identity_question)
        return loss, {"vlm": loss.detach(), **metrics}

    # --- distribution matching ---

    @torch.no_grad()
    def _matched(self, fields: VelocityFields, batch: Batch, x_0: Tensor, *, identity: bool) -> Tensor:
        """x_0 - g: where the scores of the frozen base and of the editor's own results send x_0."""
        caption = batch.src_caption if identity else batch.tgt_caption
        # The law of t, which is the fake score's, on a range of its own.
        # A validation's t is not of that law, and may lie outside.
        u = ((batch.t - self.config.t_min) / (self.config.t_max - self.config.t_min)).clamp(0, 1)
        t = self.config.dmd_t_min + (self.config.dmd_t_max - self.config.dmd_t_min) * u
        x_t = flow.interpolate(x_0, batch.fresh[1], t)
        with fields.fake() as velocity:
            x_fake = flow.predict_data(x_t, velocity(x_t, t, caption, None), t)
        with fields.base() as velocity:
            v = velocity(x_t, t, caption, None)
            if self.config.guided:
                v_negative = velocity(x_t, t, batch.beside[NEGATIVE], None)
                v = v_negative + flow.expand(self._guidance(batch, identity), v) * (v - v_negative)
            x_real = flow.predict_data(x_t, v, t)
        size = (x_0 - x_real).abs().flatten(1).mean(dim=1).clamp(min=1e-8)  # [R]'s floor
        # A clone: a host's fields without gradient may run in inference mode, whose tensors autograd cannot save.
        return (x_0 - (x_fake - x_real) / flow.expand(size, x_0)).clone()

    def _guidance(self, batch: Batch, identity: bool) -> Tensor:
        """(B,) scales of the teacher's guidance, by edit type."""
        assert len(batch.words) == len(batch.t)
        strong = [not identity and words.edit_type in self.config.strong_types for words in batch.words]
        scales = [self.config.strong_guidance if each else self.config.guidance for each in strong]
        return torch.tensor(scales, dtype=batch.t.dtype, device=batch.t.device)

    def _train_fake(self, fields: VelocityFields, batch: Batch, x_0: Tensor, backward: Backward | None) -> Metrics:
        """Flow matching on the editor's result, with the target caption and without source."""
        noise = batch.fresh[1]
        x_t = flow.interpolate(x_0, noise, batch.t)
        with fields.fake() as velocity:
            loss = flow.mean_squared(velocity(x_t, batch.t, batch.tgt_caption, None) - flow.path_velocity(x_0, noise)).mean()
            if backward is not None:
                backward(loss, last=True)
        return {"loss": loss.detach(), "fake": loss.detach()}


class Unroll:
    """The editor's two calls on one batch: first without gradient, then differentiated one by one."""

    def __init__(self, fields: VelocityFields, batch: Batch, instruction: Text):
        self._fields, self._batch, self._instruction = fields, batch, instruction

    @torch.no_grad()
    def without_gradient(self, k: int) -> Unrolled:
        """From the noise at t = 1 to x_0, by way of node k (counted from 1, which is t = 1)."""
        batch = self._batch
        assert batch.nodes is not None
        calls = [Call(batch.noise, torch.ones_like(batch.t))]
        with self._fields.edit() as velocity:
            x_0 = self._predicted(velocity, calls[0])
            if k > 1:
                t = batch.nodes[k - 1].to(batch.t).expand_as(batch.t)
                calls.append(Call(flow.interpolate(x_0, batch.fresh[0], t), t))
                x_0 = self._predicted(velocity, calls[1])
        return Unrolled(calls, x_0)

    def differentiate(self, calls: list[Call], gradient: Tensor, backward: Backward) -> None:
        """Backward of <gradient, x_0> through all calls; `gradient` is that of the unscaled loss."""
        first = len(calls) == 1
        with self._fields.edit() as velocity:
            if not first:
                leaf = calls[1].noisy.clone().requires_grad_()
                scale = backward((gradient * self._predicted(velocity, Call(leaf, calls[1].t))).sum(), last=False)
                assert leaf.grad is not None
                # The loop's factor is in leaf.grad and would enter a second time; x_t = (1 - t) x_hat + t eps'.
                gradient = leaf.grad / scale * flow.expand(1 - calls[1].t, leaf)
            backward((gradient * self._predicted(velocity, calls[0])).sum(), last=True)

    def _predicted(self, velocity: Callable[..., Tensor], call: Call) -> Tensor:
        return flow.predict_data(call.noisy, velocity(call.noisy, call.t, self._instruction, self._batch.source), call.t)


def _named(name: str, loss: Tensor) -> tuple[Tensor, Metrics]:
    return loss, {name: loss.detach()}
