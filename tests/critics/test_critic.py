"""The critique of latents: its gradient in pieces is that of the whole, and it touches nothing but the edit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byg_plugin.critics.critic import Critic
from byg_plugin.critics.questions import EDITED, SOURCE, questions
from byg_plugin.objectives.base import Batch, Words
from tests.support.critic_runs import critic
from tests.support.memory import most_saved
from tests.support.tiny import tiny_texts

WORDS = (
    Words("a", "make it blue", "a red dog", "a blue dog", "attribute"),
    Words("b", "remove the dog", "a dog on grass", "grass", "remove"),
)


def batch(size: int = 2, updates: int | None = 10**6, words: tuple[Words, ...] = WORDS, dtype: torch.dtype = torch.float32) -> Batch:
    rng = torch.Generator().manual_seed(9)
    source = torch.randn(size, 16, 1, 6, 6, generator=rng).to(dtype) * 0.5
    text = tiny_texts(size, 0)
    return Batch(
        source=source,
        src_caption=text,
        tgt_caption=text,
        instruction=text,
        reverse_instruction=text,
        noise=torch.zeros_like(source),
        t=torch.zeros(size),
        words=words[:size],
        updates=updates,
    )


def edited(of: Batch) -> Tensor:
    return of.source + 0.3 * torch.randn(of.source.shape, generator=torch.Generator().manual_seed(2)).to(of.source)


def in_one_graph(judged: Critic, x0: Tensor, of: Batch, scale: float = 1.0) -> Tensor:
    """The loss as it is written, of a plain decoder: no pieces, nothing kept."""
    family, decoder = judged.decoder._family, judged.decoder._vae
    show = lambda x: (family.decode_latents(decoder, x)[:, :, 0] + 1) / 2  # noqa: E731
    terms = []
    for picture, source, words in zip(show(x0), show(of.source), of.words, strict=True):
        for question in questions(words.instruction, words.edit_type):
            shown = {EDITED: judged.vlm.features(picture), SOURCE: judged.vlm.features(source.detach())}
            no, yes = scale * judged.vlm.logits(question, [shown[name] for name in question.pictures])
            terms.append(F.softplus(no - yes) if question.answer else F.softplus(yes - no))
    return torch.stack(terms).mean()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["qwen3_vl", "internvl"])
def test_in_pieces_it_is_the_loss_and_the_gradient_of_one_graph(kind: str):
    judged, of = critic(kind, double=True), batch(dtype=torch.float64)
    x0 = edited(of).requires_grad_()
    loss, _ = judged(x0, of, identity_question=True)
    (gradient,) = torch.autograd.grad(loss, x0)
    expected = in_one_graph(judged, x0, of)
    (single,) = torch.autograd.grad(expected, x0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert single.abs().max() > 1e-6 and (gradient - single).abs().max() <= 1e-10 * single.abs().max()


@pytest.mark.usefixtures("float64")
def test_the_gradient_is_the_difference_of_the_loss():
    """In float64 through language model, vision tower, resizing and decoder, at a rising scale of the logits."""
    judged, of = critic(double=True), batch(1, updates=700, dtype=torch.float64)
    x0 = edited(of)
    loss, _ = judged(leaf := x0.clone().requires_grad_(), of, identity_question=True)
    (gradient,) = torch.autograd.grad(loss, leaf)
    direction = torch.randn(x0.shape, generator=torch.Generator().manual_seed(6), dtype=x0.dtype)
    scale, step = judged.scale(700), 1e-6
    with torch.no_grad():
        up, down = (in_one_graph(judged, x0 + sign * step * direction, of, scale) for sign in (1, -1))
    assert ((up - down) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_x0_alone_has_a_gradient_and_no_graph_is_left():
    judged, of = critic(), batch()
    of.source.requires_grad_()
    x0 = edited(of).detach().requires_grad_()
    kept, (loss, _) = most_saved(lambda: judged(x0, of, identity_question=True))
    (3 * loss).backward()
    assert x0.grad is not None and x0.grad.abs().max() > 0 and of.source.grad is None
    frozen: list[nn.Module] = [judged.vlm.model, judged.decoder._vae]
    assert not any(p.requires_grad or p.grad is not None for module in frozen for p in module.parameters())
    (once,) = torch.autograd.grad(judged(leaf := x0.detach().requires_grad_(), of, identity_question=True)[0], leaf)
    assert torch.allclose(x0.grad, 3 * once, rtol=1e-4, atol=0)
    whole, _ = most_saved(lambda: in_one_graph(judged, x0, of))
    assert kept < 0.6 * whole, (kept, whole)


def test_a_leaf_of_a_larger_graph_and_no_graph_at_all():
    judged, of = critic(), batch()
    weight = torch.tensor(0.7, requires_grad=True)
    loss, _ = judged(weight * edited(of), of, identity_question=True)
    loss.backward()
    assert weight.grad is not None and weight.grad != 0
    with torch.no_grad():
        silent, metrics = judged(edited(of), of, identity_question=True)
    assert not silent.requires_grad and not any(value.requires_grad for value in metrics.values())
    assert math.isfinite(silent.item())


def test_the_source_is_seen_once_without_a_graph(monkeypatch: pytest.MonkeyPatch):
    judged, of = critic(), batch()
    calls: list[bool] = []
    plain = judged.vlm.features
    monkeypatch.setattr(judged.vlm, "features", lambda picture: calls.append(picture.requires_grad) or plain(picture))
    first, _ = judged(edited(of).requires_grad_(), of, identity_question=True)
    assert sorted(calls) == [False, False, True, True, True, True]
    calls.clear()
    again, _ = judged(edited(of).requires_grad_(), of, identity_question=True)
    assert calls == [True] * 4 and torch.equal(first, again)


def test_no_more_sources_are_kept_than_asked_for():
    judged, of = critic(kept_sources=1), batch()
    judged(edited(of), of, identity_question=False)
    (last,) = judged._sources._kept
    judged(edited(of), of, identity_question=False)
    assert list(judged._sources._kept) == [last], "the last one that was seen"
    alone = critic(kept_sources=2)
    alone(edited(of), of, identity_question=False)
    assert list(alone._sources._kept)[-1] == last
    judged = critic(kept_sources=0)
    judged(edited(of), of, identity_question=False)
    assert not judged._sources._kept


def test_metrics_have_the_same_names_for_every_batch():
    judged, of = critic(), batch()
    names = {"vlm_made", "vlm_made_right", "vlm_kept", "vlm_kept_right"}
    for words in (WORDS, WORDS[:1] * 2, WORDS[1:] * 2):
        _, metrics = judged(edited(of), batch(words=words), identity_question=True)
        assert set(metrics) == names and all(0 <= value <= 1 for value in metrics.values())
    _, metrics = judged(edited(of), of, identity_question=False)
    assert set(metrics) == {"vlm_made", "vlm_made_right"}


def test_a_removal_is_right_where_the_answer_is_no():
    """The answers of one model to one question: its right answer decides the loss."""
    judged, of = critic(), batch(1, words=WORDS[1:])
    loss, metrics = judged(edited(of), of, identity_question=False)
    picture = judged.decoder.pixels(edited(of))[0]
    (question,) = questions("remove the dog", "remove", identity=False)
    no, yes = judged.vlm.logits(question, [judged.vlm.features(picture)])
    assert loss.item() == pytest.approx(F.softplus(yes - no).item(), rel=1e-5)
    assert metrics["vlm_made"].item() == pytest.approx(torch.sigmoid(no - yes).item(), rel=1e-5)
    assert metrics["vlm_made_right"].item() == float(no > yes)


@pytest.mark.parametrize(("updates", "scale"), [(0, 0.1), (1000, 0.55), (2000, 1.0), (10**7, 1.0)])
def test_the_logits_are_scaled_up_while_the_editor_learns(updates: int, scale: float):
    judged, of = critic(), batch(1, updates=updates)
    assert judged.scale(updates) == pytest.approx(scale)
    loss, metrics = judged(edited(of), of, identity_question=True)
    assert loss.item() == pytest.approx(in_one_graph(judged, edited(of), of, scale).item(), rel=1e-4)
    later, metrics_later = judged(edited(of), batch(1), identity_question=True)
    assert metrics == metrics_later and (scale == 1) == (loss == later)


def test_the_scale_rises_from_the_first_update_that_is_judged():
    judged = critic()
    later = Critic(judged.vlm, judged.decoder, judged._config, first=500)
    assert [later.scale(updates) for updates in (0, 500, 1500, 2500)] == pytest.approx([0.1, 0.1, 0.55, 1.0])


def test_of_a_validation_the_logits_are_as_they_are():
    judged = critic()
    validated, (late, early) = batch(1, updates=None), (batch(1, updates=updates) for updates in (10**6, 0))
    losses = [judged(edited(of), of, identity_question=True)[0] for of in (validated, late, early)]
    assert losses[0] == losses[1] != losses[2]


def test_autocast_around_it_changes_nothing():
    judged, of = critic(), batch()
    plain, _ = judged(leaf := edited(of).requires_grad_(), of, identity_question=True)
    assert plain.dtype == torch.float32
    (expected,) = torch.autograd.grad(plain, leaf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, _ = judged(leaf := edited(of).requires_grad_(), of, identity_question=True)
    assert torch.equal(plain, under) and torch.equal(expected, torch.autograd.grad(under, leaf)[0])


def test_the_critic_is_what_it_was_after_a_step():
    judged, of = critic(), batch()
    before = copy.deepcopy(judged.vlm.model.state_dict())
    judged(edited(of).requires_grad_(), of, identity_question=True)[0].backward()
    assert all(torch.equal(before[name], value) for name, value in judged.vlm.model.state_dict().items())
