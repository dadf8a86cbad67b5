"""The objective's terms, metrics and refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch
from byg_plugin.objectives.paired import Paired
from byg_plugin.objectives.paired_config import PairedConfig
from byg_plugin.objectives.unpaired_cycle import UnpairedCycle
from byg_plugin.objectives.unpaired_cycle_config import UnpairedCycleConfig
from byg_plugin.texts import cat_text
from tests.support.objective_runs import EXACT, GRAPHS, VARIANTS, Loop, objective, transcription
from tests.support.toy_fields import RecordedFields, ToyFields, numbers, relative_difference, toy_batch, toy_network

PAIRED = make_objective(PairedConfig())

# --- closed forms ---


def constant_fields(batch: Batch, forward: Tensor, reverse: Tensor, src: Tensor, tgt: Tensor) -> tuple[RecordedFields, dict[str, Tensor]]:
    """Fields that answer with given velocities, by text; the trained leaves are the two edit velocities."""
    leaves = {"forward": forward.clone().requires_grad_(), "reverse": reverse.clone().requires_grad_()}
    link = torch.zeros((), dtype=forward.dtype)

    def by_text(first: Tensor, of_first: Any, second: Tensor) -> Callable[..., Tensor]:
        def answer(noisy: Tensor, t: Tensor, text: Any, source: Tensor | None) -> Tensor:
            first_text = of_first["tokens"]
            parts = [(first if torch.equal(part, first_text) else second) for part in text["tokens"].split(len(first_text))]
            # The (zero) link to the condition: a network whose output has no path to it would not be one.
            return torch.cat(parts) + (0 if source is None else link * source)

        return answer

    edit = by_text(leaves["forward"], batch.instruction, leaves["reverse"])
    base = by_text(src, batch.src_caption, tgt)
    return RecordedFields(edit, lambda noisy, t, text, source: torch.zeros_like(noisy), base), leaves


@pytest.fixture
def velocities(batch) -> dict[str, Tensor]:
    return {name: numbers(*batch.source.shape, seed=f"velocity/{name}") for name in ("src", "tgt", "other")}


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_perfect_student_has_no_loss(graph, batch, velocities):
    """It leaves the source caption's velocity exactly for the target's, and its reverse rebuilds the source."""
    u, w = batch.noise - batch.source, velocities["tgt"]
    fields, leaves = constant_fields(batch, forward=w, reverse=u, src=u, tgt=w)
    metrics = objective(**GRAPHS[graph]).step(fields, batch, Loop(fields))
    for name in ("loss", "cycle", "identity", "prior_fwd", "prior_rev", "mse_fwd", "mse_rev"):
        assert abs(metrics[name].item()) < 1e-14, name
    assert metrics["cosine_fwd"].item() == pytest.approx(1) and metrics["cosine_rev"].item() == pytest.approx(1)
    assert all(leaf.grad.norm() < 1e-12 for leaf in leaves.values())


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("step", [1.0, 0.25, -1.0, -3.0])
def test_the_directional_term_is_0_when_aligned_and_2_when_opposed_at_any_length(graph, step, batch, velocities):
    src, tgt = velocities["src"], velocities["tgt"]
    v = src + step * (tgt - src)
    fields, leaves = constant_fields(batch, forward=v, reverse=tgt + step * (src - tgt), src=src, tgt=tgt)
    metrics = objective(alpha=0.0, cycle=False, lambda_id=0.0, **GRAPHS[graph]).step(fields, batch, Loop(fields))
    for direction in ("fwd", "rev"):
        assert metrics[f"prior_{direction}"].item() == pytest.approx(0.0 if step > 0 else 2.0, abs=1e-12)
        assert metrics[f"cosine_{direction}"].item() == pytest.approx(1.0 if step > 0 else -1.0)
        assert metrics[f"mse_{direction}"].item() == pytest.approx((1 - step) ** 2 * (tgt - src).square().mean().item())
    assert metrics["loss"].item() == pytest.approx(metrics["prior_fwd"].item() + metrics["prior_rev"].item(), abs=1e-12)


def test_a_descent_step_turns_the_velocity_towards_the_edit(batch, velocities):
    src, tgt = velocities["src"], velocities["tgt"]
    options = {"alpha": 0.0, "cycle": False, "lambda_id": 0.0}
    fields, leaves = constant_fields(batch, forward=velocities["other"], reverse=velocities["other"], src=src, tgt=tgt)
    before = objective(**options).step(fields, batch, Loop(fields))
    forward, reverse = (leaves[name] - 0.1 * leaves[name].grad for name in ("forward", "reverse"))
    assert ((forward - leaves["forward"]) * (tgt - src)).flatten(1).sum(dim=1).min() > 0
    assert ((reverse - leaves["reverse"]) * (src - tgt)).flatten(1).sum(dim=1).min() > 0
    after = objective(**options).step(constant_fields(batch, forward, reverse, src, tgt)[0], batch, None)
    assert after["cosine_fwd"] > before["cosine_fwd"] and after["cosine_rev"] > before["cosine_rev"]


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_guided_prior_asks_for_more_of_the_same_of_its_types_forwards_alone(graph, batch, velocities):
    """The toy's first sample is a removal, the others are not; the reverse prior (an object comes back) is as without."""
    assert [words.edit_type for words in batch.words] == ["remove", "add", None]
    src, tgt = velocities["src"], velocities["tgt"]
    guided = torch.cat([src[:1] + 3 * (tgt - src)[:1], tgt[1:]])
    options = {"prior_guidance": {"remove": 3.0}, "cycle": False, "lambda_id": 0.0, **GRAPHS[graph]}
    fields, leaves = constant_fields(batch, forward=guided, reverse=src, src=src, tgt=tgt)
    metrics = objective(**options).step(fields, batch, Loop(fields))
    for name in ("loss", "prior_fwd", "prior_rev", "mse_fwd", "mse_rev"):
        assert abs(metrics[name].item()) < 1e-13, name
    assert all(leaf.grad.norm() < 1e-12 for leaf in leaves.values())
    fields, leaves = constant_fields(batch, forward=tgt, reverse=src, src=src, tgt=tgt)
    metrics = objective(**options).step(fields, batch, Loop(fields))
    assert metrics["cosine_fwd"].item() == pytest.approx(1) and abs(metrics["mse_rev"].item()) < 1e-13
    assert metrics["mse_fwd"].item() == pytest.approx(4 * (tgt - src)[0].square().mean().item() / 3)
    # Downhill is further along the direction.
    assert (leaves["forward"].grad[0] * (tgt - src)[0]).sum() < 0 and not leaves["forward"].grad[1:].abs().max() > 1e-12
    plain, _ = constant_fields(batch, forward=tgt, reverse=src, src=src, tgt=tgt)
    assert abs(objective(**options | {"prior_guidance": {"replace": 3.0}}).step(plain, batch, None)["mse_fwd"].item()) < 1e-13


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("zero", ["equal captions", "no edit"])
def test_a_zero_direction_counts_as_one_has_no_gradient_and_is_counted(graph, zero, batch, velocities):
    """Sample 1 alone has no direction: captions that say the same, or an edit velocity that is the source's."""
    src, tgt, v = velocities["src"], velocities["tgt"].clone(), velocities["other"].clone()
    if zero == "equal captions":
        tgt[1] = src[1]
    else:
        v[1] = src[1]
    fields, leaves = constant_fields(batch, forward=v, reverse=v, src=src, tgt=tgt)
    metrics = objective(alpha=0.0, cycle=False, lambda_id=0.0, **GRAPHS[graph]).step(fields, batch, Loop(fields))
    assert metrics["zero_directions_fwd"].item() == 1
    assert metrics["zero_directions_rev"].item() == (1 if zero == "equal captions" else 0)
    edit, direction = (v - src).flatten(1), (tgt - src).flatten(1)
    cosines = [torch.dot(edit[i], direction[i]) / (edit[i].norm() * direction[i].norm()) for i in (0, 2)]
    assert metrics["prior_fwd"].item() == pytest.approx((1 + sum(1 - c.item() for c in cosines)) / 3)
    assert metrics["cosine_fwd"].item() == pytest.approx(sum(c.item() for c in cosines) / 3)
    assert all(value.isfinite() for value in metrics.values())
    assert not leaves["forward"].grad[1].any()
    assert all(leaves["forward"].grad[i].any() for i in (0, 2))
    assert leaves["reverse"].grad.isfinite().all()


@pytest.mark.parametrize("graph", GRAPHS)
def test_terms_are_weighted_means_of_hand_made_errors(graph, batch, velocities):
    """Constant errors whose squares are known: cycle and identity 4, both MSE of the prior 9 and 16."""
    u, tgt = batch.noise - batch.source, velocities["tgt"]
    fields, _ = constant_fields(batch, forward=tgt + 3, reverse=u + 2, src=u + 6, tgt=tgt)
    options = {"lambda_cycle": 0.5, "lambda_prior": 3.0, "lambda_id": 0.25, "alpha": 0.1, "directional": False}
    metrics = objective(**options, **GRAPHS[graph]).step(fields, batch, Loop(fields))
    expected = {"cycle": 4.0, "identity": 4.0, "mse_fwd": 9.0, "mse_rev": 16.0, "prior_fwd": 0.9, "prior_rev": 1.6}
    expected["loss"] = 0.5 * 4 + 3 * (0.9 + 1.6) + 0.25 * 4
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value), name


# --- identity steps ---


@pytest.mark.parametrize("graph", GRAPHS)
def test_an_identity_step_trains_the_identity_term_alone(graph):
    batch, fields = toy_batch(identity_step=True), ToyFields()
    expected, gradients = transcription(fields, batch, lambda_cycle=0.0, lambda_prior=0.0, lambda_id=1.7)
    loop = Loop(fields)
    metrics = objective(identity_step_weight=1.7, lambda_id=0.3, **GRAPHS[graph]).step(fields, batch, loop)
    assert relative_difference(fields.gradients(), gradients) <= EXACT
    assert metrics.keys() == {"loss", "identity"}
    torch.testing.assert_close(metrics["identity"], expected["identity"], rtol=EXACT, atol=0)
    torch.testing.assert_close(metrics["loss"], 1.7 * expected["identity"], rtol=EXACT, atol=0)
    assert [call.state for call in fields.calls] == ["edit"], "no rollout, no base"
    assert torch.equal(fields.calls[0].text["tokens"], batch.reverse_instruction["tokens"])
    assert torch.equal(fields.calls[0].source, batch.source)
    assert loop.last == [True]


def test_an_identity_step_trains_even_where_the_full_loss_has_no_identity_term():
    fields = ToyFields()
    objective(lambda_id=0.0).step(fields, toy_batch(identity_step=True), Loop(fields))
    assert all(value.norm() > 0 for value in fields.gradients().values())


# --- metrics and validation ---

PRIOR_METRICS = {f"{name}_{way}" for name in ("prior", "cosine", "mse", "zero_directions") for way in ("fwd", "rev")}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize(
    "options, keys",
    [
        ({}, {"loss", "cycle", "identity"} | PRIOR_METRICS),
        ({"prior": False}, {"loss", "cycle", "identity"}),
        ({"lambda_id": 0.0}, {"loss", "cycle"} | PRIOR_METRICS),
        ({"prior": False, "cycle": False}, {"loss", "identity"}),
        ({"reverse_prior": False}, {"loss", "cycle", "identity"} | {name for name in PRIOR_METRICS if name.endswith("_fwd")}),
    ],
)
def test_metrics_are_detached_scalars_by_name(options, keys, graph, fields, batch):
    metrics = objective(**options, **GRAPHS[graph]).step(fields, batch, Loop())
    assert metrics.keys() == keys
    assert all(value.ndim == 0 and not value.requires_grad and value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("identity_step", [False, True])
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_validation_computes_the_same_values_without_a_graph(variant, graph, identity_step):
    batch, fields = toy_batch(identity_step=identity_step), ToyFields()
    step = objective(**(VARIANTS[variant][0] | GRAPHS[graph]))
    validation = step.step(fields, batch, None)
    assert not any(call.grad_enabled or call.value.requires_grad for call in fields.calls)
    assert all(value.grad is None for value in fields.lora.values())
    assert torch.is_grad_enabled()
    training = step.step(fields, batch, Loop())
    assert validation.keys() == training.keys()
    for name, value in training.items():
        torch.testing.assert_close(validation[name], value, rtol=EXACT, atol=EXACT)


# --- bad input, the registry, the supervised baseline ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reverse_prior": False, "cycle": False}, "reverse_prior = false leaves the reverse pass to the cycle loss"),
        ({"reverse_prior": False, "lambda_cycle": 0.0}, "reverse_prior = false leaves the reverse pass to the cycle loss"),
        ({"reverse_prior": False, "prior": False}, "reverse_prior = false: there is no prior, set it to true"),
        ({"prior_guidance": {"remove": 3.0}, "alpha": 0.0}, "prior_guidance = {'remove': 3.0} guides the prior's MSE"),
        ({"prior_guidance": {"remove": 3.0}, "lambda_prior": 0.0}, "prior_guidance = {'remove': 3.0} guides the prior's MSE"),
        ({"prior_guidance": {"remove": 3.0}, "prior": False}, "prior_guidance = {'remove': 3.0} guides the prior's MSE"),
    ],
)
def test_options_of_a_prior_that_is_not_there_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        UnpairedCycleConfig(**options)


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="nothing is left to train"):
        objective(cycle=False, prior=False, lambda_id=0.0)


def test_a_rollout_of_one_step_is_refused(fields, batch):
    with pytest.raises(ValueError, match="at least 2 steps"):
        objective().step(fields, dataclasses.replace(batch, nodes=batch.nodes[[0, -1]]), Loop())


def test_t_of_another_batch_is_refused(fields, batch):
    with pytest.raises(ValueError, match="one value a sample"):
        objective().step(fields, dataclasses.replace(batch, t=batch.t[:2]), Loop())


def test_objectives_by_name():
    assert isinstance(make_objective(UnpairedCycleConfig()), UnpairedCycle)
    assert isinstance(make_objective(PairedConfig()), Paired)


def test_cat_text_keeps_the_order_and_every_name(batch):
    both = cat_text(batch.src_caption, batch.tgt_caption)
    for name, value in both.items():
        assert torch.equal(value, torch.cat([batch.src_caption[name], batch.tgt_caption[name]]))
    assert both.keys() == batch.src_caption.keys()


def test_paired_is_equation_1(fields, batch):
    t = batch.t.view(-1, 1, 1, 1, 1)
    y_t = (1 - t) * batch.target + t * batch.noise
    v = toy_network(fields.weights, fields.lora, y_t, batch.t, batch.instruction, batch.source)
    loss = torch.stack([((batch.noise[i] - batch.target[i] - v[i]) ** 2).mean() for i in range(3)]).mean()
    expected = dict(zip(fields.lora, torch.autograd.grad(loss, list(fields.lora.values())), strict=True))
    loop = Loop(fields)
    metrics = PAIRED.step(fields, batch, loop)
    assert relative_difference(fields.gradients(), expected) <= EXACT
    torch.testing.assert_close(metrics["loss"], loss.detach(), rtol=EXACT, atol=0)
    assert loop.last == [True] and fields.opened == ["edit"]
    validation = ToyFields()
    torch.testing.assert_close(PAIRED.step(validation, batch, None)["loss"], loss.detach(), rtol=EXACT, atol=0)
    assert all(value.grad is None for value in validation.lora.values())


def test_paired_without_a_target_says_what_is_missing(fields, batch):
    with pytest.raises(ValueError, match='"paired" needs a `target`'):
        PAIRED.step(fields, dataclasses.replace(batch, target=None), Loop())
