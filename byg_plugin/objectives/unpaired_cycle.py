"""Algorithm 1 of "Bootstrap Your Generator": self-consistent flow editing without pairs.

From a source x, its caption p_src, a target caption p_tgt, an instruction c and its inverse c_bar, with noise and t:

    rollout   y_t, y_0     n Euler steps of the EMA model from the noise, one of them ending at t       (section 4.1)
    forward   v_fwd        edit(y_t, t, c, x);   y_hat = y_t - t v_fwd
    reverse   v_rev        edit(x_t, t, c_bar, y_hyb),  y_hyb = sg(y_0) + (y_hat - sg(y_hat))           (Eq. 4)
    identity  v_id         edit(x_t, t, c_bar, x)

    L_cycle = ||v_rev - (noise - x)||^2                                                                 (Eq. 3)
    L_prior = 1 - cos(v - v_src, v_tgt - v_src) + alpha ||v - v_tgt||^2                                 (Eq. 2)
              forward: the frozen base at y_t with (p_src, p_tgt); reverse: at x_t with the two swapped
    L_id    = ||v_id - (noise - x)||^2
    L       = lambda_cycle L_cycle + lambda_prior (L_prior_fwd + L_prior_rev) + lambda_id L_id          (Eq. 5)

How the gradient is taken differs from the text, its value does not. y_hyb has the *value* y_0, which the rollout
already knows, so the reverse pass need not wait for the forward pass (`graph = "sequential"`): differentiate the
reverse pass with respect to a leaf that holds y_0, keep g = dL/dy_hyb, free the graph, and give the forward pass the
term <g, y_hat>. One graph is alive at a time: the peak memory of supervised training. `graph = "joint"` is Algorithm 1
as printed, one graph, the reference.

Two options compute less, neither is the paper's. `rollout_solver = "ab2"` makes the steps of second order. With `identity_rate` or
`reverse_rate` below 1 a coin of the optimizer step leaves a term out, and where it stays it counts 1 / rate: the mean over the coins is
the whole gradient. A step without the reverse pass needs no y_0 and no frozen velocities at x_t.

With `prior_guidance` the forward prior of some edit types asks for more than the base's difference. Without `reverse_prior` the reverse
pass has the cycle loss alone, which knows its answer; the base's direction at x_t is a blurred one. Neither is the paper's.

With `critique_types` a critic judges y_hyb of the samples of those edit types: its gradient with respect to y_hyb, taken in a graph of its
own, is added to g. Not the paper's.

Everything without gradient comes first, then forward-backward pairs: the one order in which swapped blocks, swapped
experts and recomputed activations see the weights they were made with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from byg_plugin import flow, timesteps
from byg_plugin.objectives.base import (
    EDIT,
    FULL,
    IDENTITY,
    Backward,
    Batch,
    Metrics,
    Plan,
    StepMemory,
    Text,
    Velocity,
    VelocityFields,
)
from byg_plugin.randomness import coin
from byg_plugin.texts import cat_text

if TYPE_CHECKING:
    from byg_plugin.objectives.unpaired_cycle_config import UnpairedCycleConfig


class Frozen(NamedTuple):
    """The frozen base's two velocities at one noisy state: where the edit comes from and where it goes."""

    v_src: Tensor
    v_tgt: Tensor


class States(NamedTuple):
    """All that a step needs and that has no gradient."""

    x_t: Tensor
    y_t: Tensor
    """The pseudo-target at t (without bootstrapping: x_t)."""
    y_0: Tensor | None
    """The rollout's end; None where nothing is conditioned on it."""
    forward: Frozen
    """At y_t, from p_src to p_tgt."""
    reverse: Frozen
    """At x_t, from p_tgt to p_src; empty where nothing asks for it."""


class Weights(NamedTuple):
    """What a step multiplies the terms with that may be left out; 0: left out."""

    identity: float
    reverse: float


class UnpairedCycle:
    """See the module. `config` is the `[objective]` section."""

    adapters = averaged = (EDIT,)

    def __init__(self, config: UnpairedCycleConfig):
        self.config = config
        self.lambda_cycle = config.lambda_cycle if config.cycle else 0.0
        self.lambda_prior = config.lambda_prior if config.prior else 0.0

    @property
    def memory(self) -> StepMemory:
        """One pass at a time; `joint` has all three in one graph, `merge_identity` two in one batch."""
        merged_weights = self.config.merges_rollout
        if self.config.graph == "joint":
            return StepMemory(graphs=3, merged_weights=merged_weights)
        return StepMemory(rows=2 if self.config.merge_identity else 1, merged_weights=merged_weights)

    def plan(self, step: int, seed: int) -> Plan:
        """Identity steps in the warm-up, then by a toss; of the other steps, which terms are left out, by a toss each."""
        if step < self.config.identity_warmup_steps or coin(seed, step, self.config.identity_probability):
            return Plan(IDENTITY)
        left_out = [term for term, rate in self._rates.items() if rate < 1 and not coin(seed, step, rate, f"{term} term")]
        return Plan("-".join([FULL, *left_out]))

    @property
    def _rates(self) -> dict[str, float]:
        return {"identity": self.config.identity_rate, "reverse": self.config.reverse_rate}

    def _weights(self, batch: Batch, training: bool) -> Weights:
        """What a step multiplies its terms with: 1 / rate where a term is there by chance, so that the mean over steps is the whole."""
        left_out = batch.kind.split("-")[1:]
        identity, reverse = (0.0 if term in left_out else 1 / rate if training else 1.0 for term, rate in self._rates.items())
        return Weights(identity if self.config.lambda_id else 0.0, reverse if self._reverse_pass else 0.0)

    def step(self, fields: VelocityFields, batch: Batch, backward: Backward | None) -> Metrics:
        """One micro-step: every term of Algorithm 1, differentiated in memory's order.

        Args:
            fields: the network as `edit`, `ema` and `base` velocity fields.
            batch: latents, texts, noise, t; of the kind `IDENTITY` the identity term alone is trained.
            backward: differentiates a loss; None computes the terms without gradient.

        Returns:
            detached scalars: `loss` (Eq. 5), each term, the cosines, and the counts `zero_directions_fwd` and `zero_directions_rev`
            of samples whose cosine is undefined.
        """
        with torch.set_grad_enabled(backward is not None):
            if batch.identity_step:
                return self._identity_step(fields, batch, backward)
            assert self._reverse_pass or self.config.lambda_id, "the configuration refuses an objective without a term"
            weights = self._weights(batch, training=backward is not None)
            x_t = flow.interpolate(batch.source, batch.noise, batch.t)
            y_t, y_0 = self._rollout(fields, batch, reverse=bool(weights.reverse))
            if not self.config.bootstrap:
                y_t = x_t
            prior_of_reverse = bool(weights.reverse) and self.config.reverse_prior
            forward, reverse = self._frozen_velocities(fields, batch, y_t, x_t, reverse=prior_of_reverse)
            states = States(x_t, y_t, y_0, self._guided(forward, batch), reverse)
            if self.config.graph == "joint":
                return self._joint(fields, batch, states, weights, backward)
            return self._sequential(fields, batch, states, weights, backward)

    # --- 1. without gradient: the pseudo-targets and the frozen base ---

    @torch.no_grad()
    def _rollout(self, fields: VelocityFields, batch: Batch, *, reverse: bool) -> tuple[Tensor, Tensor | None]:
        """From the noise: y_t exactly at each sample's t, and y_0 where something (the reverse pass) is conditioned on it."""
        needs_y0 = reverse and self.config.routing
        if not needs_y0 and not (self._reverse_pass and self.config.bootstrap):
            return batch.noise, None  # nothing reads them
        assert batch.nodes is not None
        schedule, index = timesteps.nodes_through(batch.nodes, batch.t)
        last = schedule.shape[1] - 1 if needs_y0 else int(index.max())
        y, y_t = batch.noise, torch.zeros_like(batch.noise)
        with fields.ema() as velocity:
            slope = _Slope(self.config.rollout_solver, batch.boundary)
            for k in range(last):
                s, s_next = schedule[:, k], schedule[:, k + 1]
                y = flow.euler_step(y, slope(velocity(y, s, batch.instruction, batch.source), s, s_next), s, s_next)
                y_t = torch.where(flow.expand(index == k + 1, y).bool(), y, y_t)
        # Clones: a host's fields without gradient may run in inference mode, whose tensors autograd cannot save.
        return y_t.clone(), y.clone() if needs_y0 else None

    @torch.no_grad()
    def _frozen_velocities(self, fields: VelocityFields, batch: Batch, y_t: Tensor, x_t: Tensor, *, reverse: bool) -> tuple[Frozen, Frozen]:
        """v_src and v_tgt at y_t, and, for the reverse pass with the captions swapped, at x_t; `frozen_batch` of the four at once."""
        unused = Frozen(torch.zeros(()), torch.zeros(()))
        if not self.lambda_prior:
            return unused, unused
        src, tgt = batch.src_caption, batch.tgt_caption
        queries = [(y_t, src), (y_t, tgt), *([(x_t, tgt), (x_t, src)] if reverse else [])]
        velocities: list[Tensor] = []
        with fields.base() as velocity:
            for first in range(0, len(queries), self.config.frozen_batch):
                some = queries[first : first + self.config.frozen_batch]
                noisy = torch.cat([state for state, _ in some])
                t = batch.t.repeat(len(some))
                velocities += velocity(noisy, t, cat_text(*[text for _, text in some]), None).chunk(len(some))
        at_y, at_x = velocities[:2], velocities[2:]
        return Frozen(*(v.clone() for v in at_y)), Frozen(*(v.clone() for v in at_x)) if reverse else unused  # clones as in the rollout

    def _guided(self, frozen: Frozen, batch: Batch) -> Frozen:
        """v_src + g (v_tgt - v_src) for v_tgt where the edit type has a g in `prior_guidance`: the MSE asks for more, the cosine alike."""
        if not self.config.prior_guidance or not self.lambda_prior:
            return frozen
        scales = [self.config.prior_guidance.get(words.edit_type or "", 1.0) for words in batch.words]
        g = flow.expand(torch.tensor(scales, device=frozen.v_tgt.device), frozen.v_tgt)
        return Frozen(frozen.v_src, frozen.v_src + g * (frozen.v_tgt - frozen.v_src))

    # --- 2. the terms, as pure functions of a velocity ---

    def _prior(self, v: Tensor, frozen: Frozen, direction: str) -> tuple[Tensor, Metrics]:
        """L_dir + alpha L_MSE, a mean over the batch; a zero direction counts as 1 and has no gradient."""
        mse = flow.mean_squared(v - frozen.v_tgt)
        similarity, defined = flow.cosine(v - frozen.v_src, frozen.v_tgt - frozen.v_src)
        loss = self.config.alpha * mse
        if self.config.directional:
            loss = loss + (1 - similarity)
        metrics = {
            f"prior_{direction}": loss.mean().detach(),
            f"cosine_{direction}": similarity.mean().detach(),
            f"mse_{direction}": mse.mean().detach(),
            f"zero_directions_{direction}": (~defined).sum().to(loss.dtype),
        }
        return loss.mean(), metrics

    def _reconstruction(self, v: Tensor, batch: Batch) -> Tensor:
        """||v - (noise - x)||^2: the cycle and the identity loss."""
        return flow.mean_squared(v - flow.path_velocity(batch.source, batch.noise)).mean()

    def _reverse_loss(self, v_rev: Tensor, batch: Batch, frozen: Frozen, weight: float) -> tuple[Tensor, Metrics]:
        cycle = self._reconstruction(v_rev, batch)
        loss, metrics = self.lambda_cycle * cycle, {"cycle": cycle.detach()}
        if self.lambda_prior and self.config.reverse_prior:
            prior, more = self._prior(v_rev, frozen, "rev")
            loss, metrics = loss + self.lambda_prior * prior, metrics | more
        return weight * loss, metrics

    def _critique(self, fields: VelocityFields, batch: Batch, y: Tensor) -> tuple[Tensor, Metrics]:
        """The critic's loss of the samples that it is asked about, as a mean over the batch: 0 where there is none."""
        asked = [row for row, words in enumerate(batch.words) if words.edit_type in self.config.critique_types]
        if not asked:
            return y.new_zeros(()), {"critique": y.new_zeros(())}
        assert fields.critique is not None, "the loop gives a critic to who asks one"
        judged, _ = fields.critique(y[asked], batch.rows(asked), identity_question=True)
        loss = judged * (len(asked) / len(y))
        return self.config.critique_weight * loss, {"critique": loss.detach()}

    def _identity_loss(self, v_id: Tensor, batch: Batch, weight: float) -> tuple[Tensor, Metrics]:
        identity = self._reconstruction(v_id, batch)
        return weight * self.config.lambda_id * identity, {"identity": identity.detach()}

    def _forward_loss(self, v_fwd: Tensor, frozen: Frozen) -> tuple[Tensor, Metrics]:
        if not self.lambda_prior:
            return v_fwd.new_zeros(()), {}
        prior, metrics = self._prior(v_fwd, frozen, "fwd")
        return self.lambda_prior * prior, metrics

    @property
    def _reverse_pass(self) -> bool:
        return bool(self.lambda_cycle or self.lambda_prior)

    # --- 3. with gradient ---

    def _identity_step(self, fields: VelocityFields, batch: Batch, backward: Backward | None) -> Metrics:
        x_t = flow.interpolate(batch.source, batch.noise, batch.t)
        with fields.edit() as velocity:
            identity = self._reconstruction(velocity(x_t, batch.t, batch.reverse_instruction, batch.source), batch)
            loss = self.config.identity_step_weight * identity
            if backward is not None:
                backward(loss, last=True)
        return {"loss": loss.detach(), "identity": identity.detach()}

    def _sequential(self, fields: VelocityFields, batch: Batch, states: States, weights: Weights, backward: Backward | None) -> Metrics:
        """Identity, reverse and forward pass, each differentiated and freed before the next."""
        c, c_bar, x, t = batch.instruction, batch.reverse_instruction, batch.source, batch.t
        x_t, y_t, y_0, forward, reverse = states
        terms = _Terms()

        def differentiate(loss: Tensor, *, last: bool) -> float:
            return 1.0 if backward is None else backward(loss, last=last)

        with fields.edit() as velocity:
            leaf = None
            if weights.reverse:
                leaf = y_0 if self.config.routing else self._one_step_prediction(velocity, y_t, t, c, x)
                assert leaf is not None
                leaf = leaf.detach().clone().requires_grad_(backward is not None)

            judged = None
            if leaf is not None and self.config.criticised:
                loss, metrics = self._critique(fields, batch, leaf)
                terms.add(weights.reverse * loss, metrics)
                if loss.requires_grad:
                    (judged,) = torch.autograd.grad(weights.reverse * loss, leaf)
                del loss

            if weights.identity and not (leaf is not None and self.config.merge_identity):
                loss = terms.add(*self._identity_loss(velocity(x_t, t, c_bar, x), batch, weights.identity))
                differentiate(loss, last=not self._reverse_pass)
                del loss
            if not self._reverse_pass:
                return terms.metrics()

            scale = 1.0
            if leaf is not None:
                if weights.identity and self.config.merge_identity:
                    both = velocity(torch.cat([x_t, x_t]), t.repeat(2), cat_text(c_bar, c_bar), torch.cat([leaf, x]))
                    v_rev, v_id = both.chunk(2)
                    loss = terms.add(*self._identity_loss(v_id, batch, weights.identity))
                    loss = loss + terms.add(*self._reverse_loss(v_rev, batch, reverse, weights.reverse))
                    del both, v_rev, v_id
                else:
                    loss = terms.add(*self._reverse_loss(velocity(x_t, t, c_bar, leaf), batch, reverse, weights.reverse))
                scale = differentiate(loss, last=False)
                del loss  # with it goes the reverse pass's graph

            v_fwd = velocity(y_t, t, c, x)
            loss = terms.add(*self._forward_loss(v_fwd, forward))
            if backward is not None and leaf is not None:
                assert leaf.grad is not None, "the network cut the gradient at its source tokens: the cycle would train nothing"
                # dL/dy_hyb of the unscaled loss: the loop's factor is in leaf.grad and would enter a second time here.
                g = leaf.grad / scale
                if judged is not None:
                    g = g + judged
                loss = loss + (g * flow.predict_data(y_t, v_fwd, t)).sum()
            differentiate(loss, last=True)
        return terms.metrics()

    @torch.no_grad()
    def _one_step_prediction(self, velocity: Velocity, y_t: Tensor, t: Tensor, c: Text, x: Tensor) -> Tensor:
        """The value of y_hat before its graph is built; only without routing is it needed."""
        return flow.predict_data(y_t, velocity(y_t, t, c, x), t)

    def _joint(self, fields: VelocityFields, batch: Batch, states: States, weights: Weights, backward: Backward | None) -> Metrics:
        """Algorithm 1, lines 13-36, as one graph."""
        c, c_bar, x, t = batch.instruction, batch.reverse_instruction, batch.source, batch.t
        x_t, y_t, y_0, forward, reverse = states
        terms = _Terms()
        with fields.edit() as velocity:
            loss = x_t.new_zeros(())
            if self._reverse_pass:
                v_fwd = velocity(y_t, t, c, x)
                loss = terms.add(*self._forward_loss(v_fwd, forward))
            if weights.reverse:
                y_hat = flow.predict_data(y_t, v_fwd, t)
                y_hyb = y_hat
                if self.config.routing:
                    assert y_0 is not None
                    y_hyb = y_0.detach() + (y_hat - y_hat.detach())  # Eq. 4: value of y_0, gradient of y_hat
                loss = loss + terms.add(*self._reverse_loss(velocity(x_t, t, c_bar, y_hyb), batch, reverse, weights.reverse))
                if self.config.criticised:
                    judged, metrics = self._critique(fields, batch, y_hyb)
                    loss = loss + terms.add(weights.reverse * judged, metrics)
            if weights.identity:
                loss = loss + terms.add(*self._identity_loss(velocity(x_t, t, c_bar, x), batch, weights.identity))
            if backward is not None:
                backward(loss, last=True)
        return terms.metrics()


class _Slope:
    """The slope of each step of one rollout, in order: the velocity (Euler), or with the one before it (`ab2`).

    At the experts' boundary the field is another one: the step after it is Euler's.
    """

    def __init__(self, solver: str, boundary: float | None):
        self._solver, self._boundary = solver, boundary
        self._before: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, v: Tensor, s: Tensor, s_next: Tensor) -> Tensor:
        if self._solver == "euler":
            return v
        h = s - s_next
        before, self._before = self._before, (v, s, h)
        if before is None:
            return v
        v_before, s_before, h_before = before
        if self._boundary is not None:
            crossed = timesteps.is_high(s_before, self._boundary) != timesteps.is_high(s, self._boundary)
            h_before = torch.where(crossed, torch.zeros_like(h_before), h_before)
        return flow.ab2_slope(v, v_before, h, h_before)


class _Terms:
    """The weighted sum and the metrics of a step, collected term by term, detached."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self._metrics: Metrics = {}

    def add(self, weighted: Tensor, metrics: Metrics) -> Tensor:
        """Record a weighted term; gives it back, to be differentiated."""
        value = weighted.detach()
        self._total = value if self._total is None else self._total + value
        self._metrics |= metrics
        return weighted

    def metrics(self) -> Metrics:
        """`loss` (Eq. 5) and the terms."""
        assert self._total is not None
        return {"loss": self._total, **self._metrics}
