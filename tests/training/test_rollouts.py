"""One rollout for several steps: who uses whose, how old it gets, the law of t, and what a kill must not cost."""

from __future__ import annotations

import shutil
import signal
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from byg_plugin import timesteps
from byg_plugin.objectives.base import IDENTITY, Rollout
from byg_plugin.objectives.draws import draw_times, law_of_t, side_of
from byg_plugin.objectives.unpaired_cycle_config import UnpairedCycleConfig
from byg_plugin.randomness import coin, generator
from byg_plugin.training import checkpoint
from byg_plugin.training.rollouts import SPREAD, Kept, Schedule
from tests.support.diffusers_host import relative_difference
from tests.support.objective_runs import objective
from tests.support.tiny import curve, in_child, make_trainer, run_config
from tests.support.toy_fields import RecordedFields, ToyFields, toy_batch
from tests.support.training_runs import assert_same_run, kill

STEPS = 400


def schedule(uses: int, slots: int = 3) -> Schedule:
    """A fifth of the steps has no rollout."""
    return Schedule(uses, lambda step: step >= 5 and not coin(0, step, 0.2), seed=0, slots=slots)


# --- who uses whose ---


@pytest.mark.parametrize("uses", [1, 2, 4])
def test_every_rollout_is_used_as_often_as_it_is_said(uses: int):
    plan = schedule(uses)
    found: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for step in range(STEPS):
        if plan._has_rollout(step):
            for slot in range(3):
                made, use = plan.source(step, slot)
                found[made, slot].append((step, use))
    whole = {key: uses_of for key, uses_of in found.items() if plan.steps_of(*key)[-1] < STEPS and max(plan.steps_of(*key)) < STEPS}
    assert len(whole) > 100
    for (made, slot), uses_of in whole.items():
        assert [use for _, use in uses_of] == list(range(uses)) and uses_of[0][0] == made
        assert [step for step, _ in uses_of] == plan.steps_of(made, slot)


@pytest.mark.parametrize("uses", [2, 4])
def test_their_age_is_bounded_and_a_batch_is_mixed(uses: int):
    plan = schedule(uses, slots=4)
    rollout_steps = [step for step in range(STEPS) if plan._has_rollout(step)]
    number = {step: i for i, step in enumerate(rollout_steps)}
    mixed, ages, distances = 0, Counter[int](), []
    for step in rollout_steps:
        sources = [plan.source(step, slot) for slot in range(4)]
        assert len({use for _, use in sources}) == 1, "a step makes all of its rollouts, or none: steps cost the same on every process"
        mixed += len({made for made, _ in sources}) > 1
        ages.update(number[step] - number[made] for made, _ in sources)
        distances += [number[step] - number[made] for made, use in sources if use]
    assert max(ages) <= uses * SPREAD - 1
    assert ages[0] * uses == pytest.approx(4 * len(rollout_steps), rel=0.05), "one in so many makes its own"
    assert mixed > 0.9 * len(rollout_steps) * (uses - 1) / uses
    assert sum(distances) / len(distances) >= SPREAD, "a few steps apart"


def test_steps_without_rollouts_are_their_own():
    plan = schedule(4)
    for step in range(60):
        if not plan._has_rollout(step):
            assert plan.source(step, 0) == (step, 0) and plan.steps_of(step, 0) == [step]


def test_it_does_not_hang_on_what_was_asked_before():
    asked, fresh = schedule(2), schedule(2)
    every = [asked.source(step, slot) for step in range(100) for slot in range(3)]
    assert fresh.source(99, 2) == every[-1] and schedule(2).source(50, 1) == every[50 * 3 + 1]


@pytest.mark.parametrize("uses", [2, 3])
def test_what_is_pending_is_what_was_kept(uses: int):
    plan, kept = schedule(uses), Kept()
    one = torch.zeros(2, 1, 1, 1, 1)
    for step in range(100):
        wanted = {
            f"{made}/{slot}/{name}"
            for (made, slot), uses_of in plan.pending(step).items()
            for name in [*(f"y_t/{u}" for u in uses_of), "y_0"]
        }
        assert wanted == set(kept.state()), step
        for slot in range(3 if plan._has_rollout(step) else 0):
            made, use = plan.source(step, slot)
            if use:
                kept.take(made, slot, use, torch.device("cpu"))
            else:
                kept.put(step, slot, [Rollout(one, one)] * uses)
    assert len(kept.state()) <= 3 * SPREAD * uses


# --- what is computed ---


def test_one_trajectory_visits_every_time_exactly():
    """y' = 2 y: Euler's product over the nodes that the schedule says."""
    batch = toy_batch((0.13, 0.52, 0.87), steps=6)
    times = torch.stack([batch.t, batch.t.flip(0) * 0.9]).double()

    def field(noisy: Any, t: Any, text: Any, source: Any) -> Any:
        return 2 * noisy

    assert batch.nodes is not None
    made = objective().rollouts(RecordedFields(field, field, field), batch, times)
    nodes, index = timesteps.nodes_through(batch.nodes, times)
    factors = torch.cumprod(torch.cat([torch.ones(3, 1), 1 - 2 * (nodes[:, :-1] - nodes[:, 1:])], dim=1), dim=1)
    for k, rollout in enumerate(made):
        assert rollout.y_0 is not None
        for i in range(3):
            torch.testing.assert_close(rollout.y_t[i], batch.noise[i] * factors[i, index[k, i]], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(rollout.y_0[i], batch.noise[i] * factors[i, -1], rtol=1e-6, atol=1e-6)


def test_a_step_with_a_rollout_made_before_is_the_step_that_makes_its_own():
    batch, found = toy_batch(steps=5), []
    for shared in (False, True):
        fields = ToyFields()
        given = replace(batch, rollout=objective().rollouts(fields, batch, batch.t[None])[0]) if shared else batch
        metrics = objective().step(fields, given, _backward)
        found.append({**metrics, **{f"grad {n}": v.grad.clone() for n, v in fields.lora.items() if v.grad is not None}})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 8
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def _backward(loss: torch.Tensor, *, last: bool) -> float:
    loss.backward()
    return 1.0


def test_with_one_use_nothing_differs(tmp_path: Path, reference: Path):
    make_trainer(run_config(tmp_path / "out", objective={"t_per_rollout": 1})).run()
    assert_same_run(tmp_path / "out", reference)


def drawn(tmp_path: Path, steps: int = 24, **objective_keys: Any) -> list[tuple[int, Any]]:
    """(step, batch) of a run."""
    config = run_config(
        tmp_path / "out", objective={"t_per_rollout": 2, "rollout_steps": 4} | objective_keys, train={"steps": steps, "save_every": 0}
    )
    trainer, seen = make_trainer(config), []
    plain = trainer.objective.step

    def step(fields: Any, batch: Any, backward: Any) -> Any:
        seen.append((trainer.step, batch))
        return plain(fields, batch, backward)

    trainer.objective.step = step  # type: ignore[method-assign]
    trainer.run()
    return seen


def test_a_later_step_has_the_source_and_noise_of_the_rollout_and_a_time_of_its_own(tmp_path: Path):
    seen = [(step, batch) for step, batch in drawn(tmp_path) if batch.kind != IDENTITY]
    by_noise: dict[float, list[Any]] = defaultdict(list)
    for _, batch in seen:
        by_noise[batch.noise.sum().item()].append(batch)
    twice = [found for found in by_noise.values() if len(found) == 2]
    assert len(twice) >= 8 and all(len(found) <= 2 for found in by_noise.values())
    for first, second in twice:
        assert torch.equal(first.source, second.source) and torch.equal(first.noise, second.noise)
        assert all(torch.equal(first.instruction[name], second.instruction[name]) for name in first.instruction)
        assert not torch.equal(first.t, second.t) and not torch.equal(first.rollout.y_t, second.rollout.y_t)
        assert torch.equal(first.rollout.y_0, second.rollout.y_0)
    assert {"rollout_age"} <= curve(tmp_path / "out")[-1].keys()


@pytest.mark.parametrize("boundary", [None, 0.875])
@pytest.mark.parametrize("law", [{"t_distribution": "uniform", "t_shift": 4.0}, {"t_distribution": "logit_normal", "t_max": 0.95}])
def test_each_use_has_the_law_of_t(law: dict[str, Any], boundary: float | None):
    """10^5 times of each use, on the sides that optimizer steps toss, by Kolmogorov and Smirnov."""
    config = UnpairedCycleConfig(t_per_rollout=3, **law)
    share = None if boundary is None else timesteps.probability_above(boundary, **law_of_t(config))
    found = torch.stack(
        [
            draw_times(config, 20, generator(0, "noise", index), boundary, [side_of(0, share, 3 * index + use) for use in range(3)])
            for index in range(5000)
        ],
        dim=1,
    ).flatten(1)
    assert found.shape == (3, 100_000)
    for times in found.double():
        ordered = times.sort().values[::100]
        expected = torch.tensor([1 - timesteps.probability_above(t, **law_of_t(config)) for t in ordered.tolist()])
        # Twenty times of one side come together: as few independent tosses as steps.
        independent = 100_000 if boundary is None else 5000
        assert (expected - torch.arange(0, 1, 0.001)).abs().max() < 1.95 / independent**0.5
    assert (found.diff(dim=0).abs() > 1e-6).float().mean() > 0.99


# --- kill and resume ---


def shared_config(out: Path, **sections: Any) -> Any:
    return run_config(
        out,
        objective={"t_per_rollout": 2, "rollout_steps": 4, "identity_probability": 0.1},
        train={"steps": 10, "save_every": 1, "keep_last": 0},
        **sections,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    make_trainer(shared_config(out)).run()
    return out


def test_killed_in_the_middle_of_a_block_it_goes_on_as_if_it_had_not_been(tmp_path: Path, whole: Path):
    config = shared_config(tmp_path / "out")

    def work() -> None:
        trainer = make_trainer(config)
        trainer.on_step = lambda trainer: kill() if trainer.step == 5 else None
        trainer.run()

    assert in_child(work) == -signal.SIGKILL
    saved = load_file(checkpoint.checkpoints(tmp_path / "out" / "checkpoints")[-1] / checkpoint.TENSORS)
    assert any(name.startswith("rollouts/") for name in saved)
    make_trainer(config, "latest").run()
    assert_same_run(tmp_path / "out", whole)


def test_the_states_matter(tmp_path: Path, whole: Path):
    """The comparison above would see rollouts that were lost or mixed up."""
    out = tmp_path / "out"
    path = _cut(whole, out, 5) / checkpoint.TENSORS
    tensors = load_file(path)
    changed = {name: value * 0 if name.startswith("rollouts/") else value for name, value in tensors.items()}
    save_file(changed, path)
    make_trainer(shared_config(out), "latest").run()
    a, b = (load_file(folder / "byg_lora.safetensors") for folder in (out, whole))
    assert relative_difference(a, b) > 1e-4


def _cut(whole: Path, out: Path, step: int) -> Path:
    shutil.copytree(whole, out)
    for path in checkpoint.checkpoints(out / "checkpoints"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    return checkpoint.checkpoints(out / "checkpoints")[-1]


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "dtype"])
def test_a_checkpoint_with_other_rollouts_is_refused_by_name(tmp_path: Path, whole: Path, damage: str):
    path = _cut(whole, tmp_path / "out", 5) / checkpoint.TENSORS
    tensors = load_file(path)
    name = next(key for key in tensors if key.startswith("rollouts/") and "/y_t/" in key)
    value = tensors.pop(name)
    entry = name.removeprefix("rollouts/")
    expected = {
        "missing": f"{entry} is missing",
        "unknown": r"999/0/y_t/1 is not part of this run",
        "shape": rf"{entry} is torch.float32 \(2, 3\), here it is torch.float32 \(",
        "dtype": rf"{entry} is torch.float64",
    }
    more = {
        "missing": {},
        "unknown": {name: value, "rollouts/999/0/y_t/1": value.clone()},
        "shape": {name: torch.zeros(2, 3)},
        "dtype": {name: value.double()},
    }
    save_file(tensors | more[damage], path)
    with pytest.raises(ValueError, match=rf"{expected[damage]}.*objective.t_per_rollout"):
        make_trainer(shared_config(tmp_path / "out"), "latest")


def test_a_run_with_another_number_of_uses_does_not_go_on_from_it(tmp_path: Path, whole: Path):
    _cut(whole, tmp_path / "out", 5)
    config = run_config(
        tmp_path / "out", objective={"rollout_steps": 4, "identity_probability": 0.1}, train={"steps": 10, "save_every": 1, "keep_last": 0}
    )
    with pytest.raises(ValueError, match="is not part of this run; set objective.t_per_rollout"):
        make_trainer(config, "latest")
