"""NP-Edit beside its transcription: losses, gradients of both adapters, who gets them, and the graphs that are alive."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from byg_plugin import families
from byg_plugin.config.loading import parse_config
from byg_plugin.objectives.base import EDIT, FAKE, Batch
from byg_plugin.objectives.np_edit_config import NpEditConfig
from tests.support.np_edit_runs import EXACT, KINDS, STUDENT, VARIANTS, fields_with_critic, objective, transcription
from tests.support.objective_runs import Loop
from tests.support.toy_fields import ToyFields, relative_difference, toy_batch


class AnyContext(Loop):
    """`backward` in the edit context or the fake score's."""

    def __init__(self, fields: ToyFields | None = None, factor: float = 1.0):
        super().__init__(None, factor)
        self.opened = fields

    def __call__(self, loss: Tensor, *, last: bool) -> float:
        assert self.opened is None or self.opened.active in ("edit", "fake"), "a backward outside its context"
        return super().__call__(loss, last=last)


def trained(fields: ToyFields, kind: str) -> dict[str, Tensor]:
    return fields.fake_lora if kind.startswith(FAKE) else fields.lora


# --- the transcription ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_losses_and_gradients_are_those_of_the_single_graph(variant: str, kind: str, factor: float):
    options, weights = VARIANTS[variant]
    if variant == "no dmd" and kind.startswith(FAKE):
        pytest.skip("no such step")
    if variant == "no vlm" and kind.startswith("full"):
        weights = weights | {"vlm": 0.0}
    batch, fields = toy_batch(kind=kind, steps=4), fields_with_critic()
    expected, expected_gradients = transcription(fields, batch, options, **weights)
    metrics = objective(**options).step(fields, batch, AnyContext(fields, factor))
    gradients = {name: value / factor for name, value in fields.gradients(trained(fields, kind)).items()}
    assert relative_difference(gradients, expected_gradients) <= EXACT
    assert metrics.keys() - {"yes"} == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, rtol=EXACT, atol=EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_every_ablation_changes_the_gradient():
    batch = toy_batch(kind="full-3", steps=4)

    def gradients(**options: Any) -> dict[str, Tensor]:
        fields = fields_with_critic()
        objective(**({"lambda_vlm": 1.0} | options)).step(fields, batch, AnyContext(fields))
        return fields.gradients()

    paper = gradients()
    for options in ({"dmd": False}, {"vlm": False}, {"identity_question": False}, {"strong_types": []}, {"guidance": 3.0}):
        assert relative_difference(gradients(**options), paper) > 1e-3, options


def test_a_validation_computes_the_same_terms_without_gradient():
    batch, fields = toy_batch(kind="full-4", steps=4), fields_with_critic()
    trains = objective().step(fields, batch, AnyContext(fields))
    watched = fields_with_critic()
    validates = objective().step(watched, toy_batch(steps=4), None)
    assert validates.keys() == trains.keys() and all(torch.equal(validates[name], trains[name]) for name in trains)
    assert not any(call.grad_enabled for call in watched.calls if call.state != "edit")
    assert all(value.grad is None for value in (*watched.lora.values(), *watched.fake_lora.values()))


# --- who gets gradient ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_gives_gradient_to_its_own_adapter_alone(kind: str):
    batch, fields = toy_batch(kind=kind, steps=4), fields_with_critic()
    objective().step(fields, batch, AnyContext(fields))
    other = fields.lora if kind.startswith(FAKE) else fields.fake_lora
    assert all(value.grad is not None and value.grad.any() for value in trained(fields, kind).values())
    frozen = [*other.values(), *fields.ema_lora.values(), *fields.base_weights.values(), fields.critique.weights]
    assert all(value.requires_grad and value.grad is None for value in frozen)
    assert batch.source.grad is None


@pytest.mark.parametrize("kind", ["fake-1", "fake-4"])
def test_the_fake_score_never_touches_the_editor(kind: str):
    batch, fields = toy_batch(kind=kind, steps=4), fields_with_critic()
    objective().step(fields, batch, AnyContext(fields))
    edits = fields.of("edit")
    assert len(edits) == (1 if kind == "fake-1" else 2) and not any(call.grad_enabled or call.value.requires_grad for call in edits)
    assert not fields.critique.asked and not fields.of("base")
    (fake,) = fields.of("fake")
    assert fake.source is None and torch.equal(fake.text["tokens"], batch.tgt_caption["tokens"])


def test_the_gradient_passes_both_calls_of_the_unroll():
    """Cut between them, the first call would get nothing, and the gradient would be another one."""
    batch, fields = toy_batch(kind="full-3", steps=4), fields_with_critic()
    seen: list[Tensor] = []
    plain = fields.functions["edit"]

    def edit(*inputs: Any) -> Tensor:
        value = plain(*inputs)
        if value.requires_grad:
            value.register_hook(lambda gradient: seen.append(gradient))
        return value

    fields.functions["edit"] = edit
    objective().step(fields, batch, AnyContext(fields))
    assert len(seen) == 2 and all(gradient.flatten(1).norm(dim=1).min() > 1e-6 for gradient in seen)


@pytest.mark.parametrize(("kind", "text"), [("full-3", "instruction"), ("identity-3", "do_nothing")])
def test_what_the_editor_and_the_scores_are_asked(kind: str, text: str):
    batch, fields = toy_batch(kind=kind, steps=4), fields_with_critic()
    objective().step(fields, batch, AnyContext(fields))
    instruction = batch.beside["do_nothing"] if text == "do_nothing" else batch.instruction
    edits = fields.of("edit")
    assert [call.t.unique().tolist() for call in edits] == [[1.0], [0.5], [0.5], [1.0]], "two without gradient, then the last one first"
    assert all(torch.equal(call.text["tokens"], instruction["tokens"]) for call in edits)
    caption = batch.src_caption if text == "do_nothing" else batch.tgt_caption
    asked = [call.text["tokens"] for call in (*fields.of("fake"), *fields.of("base"))]
    assert [torch.equal(each, caption["tokens"]) for each in asked] == [True, True, False]
    assert torch.equal(asked[2], batch.beside["negative"]["tokens"])
    times = fields.of("fake")[0].t
    torch.testing.assert_close(times, 0.02 + 0.96 * batch.t)
    assert len(fields.critique.asked) == (0 if text == "do_nothing" else 1)


@pytest.mark.parametrize(
    ("section", "times"), [({"t_min": 0.3}, (0.02, 0.98 * 2 / 7 + 0.02 * 5 / 7, 0.98 * 6 / 7 + 0.02 / 7)), ({"t_max": 0.5}, None)]
)
def test_a_validation_outside_the_law_of_t_asks_the_scores_inside_their_range(section: dict[str, float], times: tuple[float, ...] | None):
    fields = fields_with_critic()
    objective(**section).step(fields, toy_batch(t=(0.1, 0.5, 0.9), steps=4), None)
    expected = torch.tensor(times or (0.02 + 0.96 * 0.2, 0.98, 0.98), dtype=torch.float64)
    torch.testing.assert_close(fields.of("fake")[0].t.double(), expected)


def test_a_critic_of_weight_0_is_not_asked():
    fields = fields_with_critic()
    made = objective(lambda_vlm=0.0)
    assert not made.config.criticised
    made.step(fields, toy_batch(kind="full-1", steps=4), AnyContext(fields))
    assert not fields.critique.asked


def test_the_second_question_is_left_out_by_its_key():
    for question in (True, False):
        fields = fields_with_critic()
        objective(identity_question=question).step(fields, toy_batch(kind="full-1", steps=4), AnyContext(fields))
        assert [asked for _, asked in fields.critique.asked] == [question]


# --- one graph at a time ---


def graphs_alive(fields: ToyFields, batch: Batch, **options: Any) -> tuple[dict[str, list[int]], int]:
    """Saved tensors alive when each pass with gradient begins, by what it is, and the most that ever were."""

    class Saved:
        def __init__(self, value: Tensor):
            self.value = value

    alive: weakref.WeakSet[Saved] = weakref.WeakSet()
    entries: dict[str, list[int]] = {"edit": [], "critic": []}
    peak = 0

    def pack(value: Tensor) -> Saved:
        nonlocal peak
        saved = Saved(value)
        alive.add(saved)
        peak = max(peak, len(alive))
        return saved

    critic = fields.critique
    assert critic is not None

    def critique(*args: Any, **kwargs: Any) -> Any:
        entries["critic"].append(len(alive))
        return critic(*args, **kwargs)

    fields.critique = critique
    fields.before_call = lambda state: entries["edit"].append(len(alive)) if state == "edit" and torch.is_grad_enabled() else None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.value):
        objective(**options).step(fields, batch, AnyContext())
    return entries, peak


def test_the_peak_is_the_larger_of_critic_and_one_pass_never_their_sum():
    entries, peak = graphs_alive(fields_with_critic(), toy_batch(kind="full-3", steps=4))
    assert entries == {"edit": [0, 0], "critic": [0]}, "every graph begins where none is alive"
    _, one_pass = graphs_alive(fields_with_critic(), toy_batch(kind="identity-1", steps=4))
    large = fields_with_critic()
    plain = large.critique

    def heavy(x0: Tensor, batch: Batch, *, identity_question: bool) -> Any:
        for _ in range(200):
            x0 = torch.tanh(x0)
        return plain(x0, batch, identity_question=identity_question)

    large.critique = heavy
    _, with_heavy = graphs_alive(large, toy_batch(kind="full-3", steps=4))
    assert peak < 1.4 * one_pass, "a step of two calls holds the graph of one, whose input has gradient too"
    assert with_heavy > 200 and with_heavy < 200 + one_pass, "a critic larger than a pass is the peak alone"


# --- contexts ---


@pytest.mark.parametrize("failing", ["edit", "fake", "base", "critic"])
def test_an_exception_leaves_no_context_open_and_gradients_enabled(failing: str):
    fields = fields_with_critic()

    def fail(state: str) -> None:
        if state == failing:
            raise RuntimeError(f"out of memory in {state}")

    def critique(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory in critic")

    fields.before_call = fail
    if failing == "critic":
        fields.critique = critique
    for backward in (AnyContext(), None):
        with pytest.raises(RuntimeError, match=failing):
            objective().step(fields, toy_batch(kind="full-2", steps=4), backward)
        assert fields.active is None and torch.is_grad_enabled()


@pytest.mark.parametrize("kind", KINDS)
def test_backward_is_last_exactly_once_and_finally(kind: str):
    fields = fields_with_critic()
    loop = AnyContext(fields)
    objective().step(fields, toy_batch(kind=kind, steps=4), loop)
    calls = 2 if kind in STUDENT and not kind.endswith("-1") else 1
    assert loop.last == [False] * (calls - 1) + [True]


# --- the plan ---


def test_the_turns_of_the_adapters():
    plan = objective(identity_warmup_steps=3, fake_updates=2, identity_probability=0.0).plan
    kinds = [plan(step, 7) for step in range(9)]
    assert [each.kind.partition("-")[0] for each in kinds] == ["copy"] * 3 + ["fake", "fake", "full"] * 2
    assert [each.adapters for each in kinds] == [(EDIT,)] * 3 + [(FAKE,), (FAKE,), (EDIT,)] * 2
    alone = objective(dmd=False, identity_warmup_steps=0)
    assert alone.adapters == (EDIT,) and all(alone.plan(step, 0).adapters == (EDIT,) for step in range(20))
    assert objective().adapters == (EDIT, FAKE) and objective().averaged == (EDIT,)


def test_the_plan_is_a_pure_function_and_draws_every_k_alike_often():
    made = objective(identity_warmup_steps=0, identity_probability=0.25)
    kinds = [made.plan(step, 3).kind for step in range(6000)]
    assert kinds == [objective(identity_warmup_steps=0, identity_probability=0.25).plan(step, 3).kind for step in range(6000)]
    assert kinds != [made.plan(step, 4).kind for step in range(6000)]
    counts = Counter(kind.partition("-")[2] for kind in kinds)
    assert counts.keys() == set("1234") and all(abs(count - 1500) < 150 for count in counts.values())
    drawn = Counter(kind.partition("-")[0] for kind in kinds)
    assert drawn["fake"] == 5000 and abs(drawn["identity"] - 250) < 50


# --- its section ---

FLUX, Z_IMAGE = families.named("flux"), families.named("z-image")


def test_the_teachers_other_branch_is_the_familys_own_or_the_configurations():
    assert NpEditConfig().texts_beside(Z_IMAGE)["negative"] == Z_IMAGE.negative
    assert NpEditConfig(negative="low quality, artifacts").texts_beside(Z_IMAGE)["negative"] == "low quality, artifacts"
    assert NpEditConfig(negative="").texts_beside(Z_IMAGE)["negative"] == ""
    assert "negative" not in NpEditConfig(negative="x", dmd=False).texts_beside(FLUX)
    with pytest.raises(ValueError, match="objective.negative = 'x' is of the branch that guidance leads away from"):
        NpEditConfig(negative="x", guidance=1.0, strong_types=[])


@pytest.mark.parametrize(
    ("section", "first"), [({}, 1005), ({"dmd": False}, 1000), ({"identity_warmup_steps": 0}, 5), ({"fake_updates": 2}, 1002)]
)
def test_steps_that_train_no_edit_are_refused(section: dict[str, Any], first: int):
    made = NpEditConfig(**section)
    kinds = [objective(**section).plan(step, 0).kind.partition("-")[0] for step in range(first + 1)]
    assert made.trains_nothing(first + 1) is None and kinds[-1] in ("full", "identity") and not {"full", "identity"} & {*kinds[:-1]}
    said = made.trains_nothing(first)
    assert said is not None and f"train.steps = {first} are all" in said and f"set train.steps to {first + 1} or more" in said
    every = NpEditConfig(**section | {"identity_probability": 1.0}).trains_nothing(25_000)
    assert every is not None and "objective.identity_probability = 1 makes every step" in every
    raw = {"model": {"path": "m"}, "dataset": {"tuples": "t", "cache_dir": "c"}, "output": {"dir": "o"}}
    with pytest.raises(ValueError, match="no edit would be trained"):
        parse_config({**raw, "train": {"steps": first}, "objective": {"name": "np_edit", **section}})


@pytest.mark.parametrize(
    ("section", "every"), [({}, 6), ({}, 3), ({"fake_updates": 1}, 10), ({"fake_updates": 4}, 10), ({"fake_updates": 2}, 30)]
)
def test_a_log_of_one_adapter_alone_is_warned_of(section: dict[str, Any], every: int):
    made = NpEditConfig(**section)
    plans = [objective(**section).plan(step - 1, 0) for step in range(every, 25_001, every) if step > 1000]
    shown = {FAKE in plan.adapters for plan in plans}
    assert len(shown) == 1
    (said,) = made.doubts_of_log(every, 25_000)
    assert f"train.log_every = {every}" in said and f"of {'the fake score' if True in shown else 'the editor'} and none of" in said
    assert made.doubts_of_log(1, 25_000) == () == NpEditConfig(dmd=False, **section).doubts_of_log(every, 25_000)
    raw = {"model": {"path": "m"}, "dataset": {"tuples": "t", "cache_dir": "c"}, "output": {"dir": "o"}}
    of_run = {**raw, "train": {"steps": 25_000, "log_every": every}, "objective": {"name": "np_edit", **section}}
    assert said in parse_config(of_run).doubts()


@pytest.mark.parametrize("every", [1, 10, 7])
@pytest.mark.parametrize("fake_updates", [1, 2, 5])
def test_no_other_log_is_warned_of(every: int, fake_updates: int):
    plans = [objective(fake_updates=fake_updates).plan(step - 1, 0) for step in range(every, 25_001, every) if step > 1000]
    both = len({FAKE in plan.adapters for plan in plans}) == 2
    assert (NpEditConfig(fake_updates=fake_updates).doubts_of_log(every, 25_000) == ()) == both


@pytest.mark.parametrize("key", ["guidance", "strong_guidance"])
def test_a_teacher_is_not_guided_to_its_negative_text(key: str):
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        NpEditConfig(**{key: 0.0})


def test_a_distilled_base_is_not_guided_twice_without_a_word():
    (said,) = NpEditConfig().doubts(FLUX)
    assert "guide its teacher a second time" in said
    assert NpEditConfig().doubts(Z_IMAGE) == () == NpEditConfig(guidance=1.0, strong_guidance=1.0).doubts(FLUX)
    assert NpEditConfig(guidance=1.0).doubts(FLUX), "strong_guidance alone does too"


@pytest.mark.parametrize(("key", "value"), [("sampling_steps", "x"), ("schedule", 3), ("sampling_steps", True)])
def test_a_wrong_key_is_told_alone(key: str, value: Any):
    raw = {"model": {"path": "m"}, "dataset": {"tuples": "t", "cache_dir": "c"}, "output": {"dir": "o"}}
    with pytest.raises(ValueError, match=f"objective.{key}") as raised:
        parse_config({**raw, "objective": {"name": "np_edit", key: value}})
    assert "sample." not in str(raised.value)


@pytest.mark.parametrize(
    ("types", "section", "said"),
    [
        ({"remove", "colour"}, {}, []),
        ({"style_change", None}, {}, ["no tuple has edit_type = 'remove' (edit_type in dataset.tuples is 'style_change')"]),
        (
            {"b", "a"},
            {"vlm": False},
            ["objective.strong_types = ['remove', 'shape_adjustment', 'style_change', 'action_change']: no tuple"],
        ),
        ({None}, {"vlm": False}, ["(edit_type in dataset.tuples is never set); all get objective.guidance"]),
        ({None}, {"dmd": False}, ["the critic is asked of removals as of other edits"]),
        ({None}, {"vlm": False, "strong_types": []}, []),
        ({None}, {"vlm": False, "guidance": 7.5}, []),
    ],
)
def test_edit_types_that_no_tuple_has_are_doubted(types: set[str | None], section: dict[str, Any], said: list[str]):
    doubts = NpEditConfig(**section).doubts_of_types(types)
    assert len(doubts) == len(said) and all(part in doubt for part, doubt in zip(said, doubts, strict=True))
