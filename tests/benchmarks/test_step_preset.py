"""The step benchmark's figures of a preset: the mean over its coins and its times, from the recipe itself, and the line of `--bar`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import step as command
from benchmarks import step_bar, step_bench, step_figures, step_host, step_peer, step_report, step_results, step_rows, step_shapes
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import IDENTITY
from byg_plugin.objectives.unpaired_cycle_config import UnpairedCycleConfig
from tests.support import ROOT

CPU = torch.device("cpu")
KEYS = ["fast_over_paired", "fast_over_paired_recomputed", "defaults_over_paired", "peak_over_paired", "peer_seconds", "peer_peak"]


def tiny(**changes: Any) -> step_shapes.Shape:
    return replace(step_shapes.shape_named("tiny"), **changes)


def objective(**changes: Any) -> UnpairedCycleConfig:
    return UnpairedCycleConfig(**changes)


def preset_file(folder: Path, **changes: Any) -> str:
    """FLUX's recipe for speed with other rates; a path that the shape takes."""
    text = (ROOT / "configs/flux_image_fast.toml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.partition(" =")[0] not in changes]
    at = lines.index("[objective]") + 1
    path = folder / "fast.toml"
    path.write_text("\n".join([*lines[:at], *(f"{key} = {value}" for key, value in changes.items()), *lines[at:]]), encoding="utf-8")
    return str(path)


# --- the kinds of step ---


def test_kinds_are_those_that_the_objective_plans_and_as_often():
    config = objective(identity_rate=0.25, reverse_rate=0.6, identity_warmup_steps=0)
    kinds = step_rows.kinds(config)
    assert kinds == pytest.approx({"full": 0.15, "full-identity": 0.45, "full-reverse": 0.1, "full-identity-reverse": 0.3})
    plans = Counter(make_objective(config).plan(step, seed=1).kind for step in range(6000))
    del plans[IDENTITY]
    assert plans.keys() == kinds.keys()
    assert {kind: n / plans.total() for kind, n in plans.items()} == pytest.approx(kinds, abs=0.02)


def test_a_term_that_is_always_there_is_no_coin():
    assert step_rows.kinds(objective()) == {"full": 1.0}
    assert step_rows.kinds(objective(reverse_rate=0.5)) == {"full": 0.5, "full-reverse": 0.5}


def test_rows_are_read_from_the_recipe(tmp_path: Path):
    rows = step_rows.preset_rows(tiny(preset=preset_file(tmp_path, identity_rate=0.5, reverse_rate=1.0, rollout_steps=7)))
    assert {row.kind: row.probability for row in rows} == {"full": 0.5, "full-identity": 0.5}
    assert all(row.objective["rollout_steps"] == 7 and row.objective["rollout_solver"] == "ab2" for row in rows)
    shipped = {row.kind for row in step_rows.preset_rows(tiny())}
    assert shipped == set(step_rows.kinds(step_shapes.preset_of(tiny()))) and len(shipped) > 1


# --- what a step pays of its rollout ---


def test_mean_calls_up_to_t_by_hand():
    # Interior nodes 0.8, 0.6, 0.4, 0.2 of a uniform t: 0.3 + 2 x 0.2 + 3 x 0.2 + 4 x 0.3.
    geometry: Any = SimpleNamespace(boundary=None, shifted_nodes=None)
    assert step_host.expected_calls(tiny(batch=1), objective(rollout_steps=5), geometry) == pytest.approx(2.5, abs=0.03)
    # Of two samples the later t ends it: sum over k of 1 - P(index <= k)^2.
    later = 4 - (0.3**2 + 0.5**2 + 0.7**2)
    assert step_host.expected_calls(tiny(batch=2), objective(rollout_steps=5), geometry) == pytest.approx(later, abs=0.03)
    # t of one expert's side alone.
    geometry = SimpleNamespace(boundary=0.9, shifted_nodes=None)
    assert step_host.expected_calls(tiny(t=(0.95, 0.97)), objective(rollout_steps=5), geometry) == 1
    assert step_host.expected_calls(tiny(t=(0.4, 0.7)), objective(rollout_steps=5), geometry) > 2.5


@pytest.mark.parametrize(("calls", "share"), [(5, 1.0), (3, 2.5 / 3)])
def test_share_of_a_rollout(calls: int, share: float):
    geometry: Any = SimpleNamespace(boundary=None, shifted_nodes=None)
    assert step_host.rollout_share(tiny(batch=1), objective(rollout_steps=5), geometry, calls) == pytest.approx(share, abs=0.01)


# --- the mean step ---

ROLLOUT, FROZEN, PASS = 2.0, 0.25, 1.5
"""Seconds of a whole rollout, one frozen pass and one differentiated pass."""


def fake_rows(identity: float, reverse: float, mean_calls: float) -> list[dict[str, Any]]:
    """Records whose phases add up by hand: a rollout without the reverse pass was measured at 3 of 5 calls."""
    rows = []
    for kind, probability in step_rows.kinds(objective(identity_rate=identity, reverse_rate=reverse)).items():
        whole = "reverse" not in kind
        phases = {"rollout": ROLLOUT * (1 if whole else 3 / 5), "frozen passes": FROZEN * (4 if whole else 2), "forward": PASS}
        phases |= {name: PASS for name in ("identity", "reverse") if name not in kind}
        slow = [{name: value * factor for name, value in (phases | {step_figures.UPDATE: 9.0}).items()} for factor in (1, 3)]
        rows.append(
            {
                "name": "fast",
                "checkpointing": False,
                "kind": kind,
                "probability": probability,
                "rollout_share": 1.0 if whole else mean_calls / 3,
                "seconds": slow,
                "paired_seconds": [PASS, 3 * PASS],
                "flops": phases,
                "bytes": {"saved": {"reverse": 5.0 if whole else 3.0}, "alive": {"forward": 2.0}},
            }
        )
    return rows


def by_hand(identity: float, reverse: float, mean_calls: float) -> float:
    rollout = ROLLOUT * (reverse + (1 - reverse) * mean_calls / 5)
    return rollout + FROZEN * (2 + 2 * reverse) + PASS * (1 + identity + reverse)


@pytest.mark.parametrize(("identity", "reverse"), [(1.0, 1.0), (0.25, 0.5), (0.1, 0.9), (1.0, 0.5)])
def test_the_mean_step_by_closed_form(identity: float, reverse: float):
    rows = fake_rows(identity, reverse, mean_calls=2.5)
    wanted = by_hand(identity, reverse, 2.5)
    assert step_figures.expected_ratios(rows) == pytest.approx([wanted / PASS] * 2)
    assert sum(step_figures.expected_flops(rows).values()) == pytest.approx(wanted)


def test_a_kind_that_is_missing_is_no_mean():
    with pytest.raises(AssertionError, match="not all"):
        step_figures.expected_ratios(fake_rows(0.5, 0.5, 2.5)[1:])


def test_the_peak_is_that_of_the_dearest_kind_and_meter():
    paired = {"name": "paired", "checkpointing": False, "bytes": {"saved": {"paired": 4.0}, "alive": {"paired": 1.5}}}
    results = {"rows": [paired, *fake_rows(0.5, 0.5, 2.5)]}
    assert step_figures.largest_peak(results, step_figures.preset(results, False)) == pytest.approx(2 / 1.5)
    assert step_figures.largest_peak({"rows": [paired | {"bytes": {"saved": {"paired": 1}, "alive": {"p": 9}}}]}, results["rows"][1:]) == 5


# --- measured ---


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With every kind of step, whatever the recipe leaves out."""
    preset = preset_file(tmp_path_factory.mktemp("preset"), identity_rate=0.25, reverse_rate=0.5)
    bench = step_bench.Bench(tiny(checkpointing=(False,), preset=preset), CPU)
    bench.plan = [(row, setting) for row, setting in bench.plan if row.name in ("paired", "frozen 2", "fast")]
    return {"rows": bench.measure(1), "machine": {"device": "cpu"}}


def test_every_kind_is_really_measured(measured: dict[str, Any]):
    rows = {row["kind"]: row for row in step_figures.preset(measured, False)}
    begin = ["rollout", "frozen passes"]
    phases = {kind: [phase for phase in row["seconds"][0] if phase != step_figures.UPDATE] for kind, row in rows.items()}
    assert phases == {
        "full": [*begin, "identity", "reverse", "forward"],
        "full-identity": [*begin, "reverse", "forward"],
        "full-reverse": [*begin, "identity", "forward"],
        "full-identity-reverse": [*begin, "forward"],
    }
    flops = {kind: row["flops"] for kind, row in rows.items()}
    assert flops["full-reverse"]["frozen passes"] == pytest.approx(flops["full"]["frozen passes"] / 2)
    whole, short = (rows[kind]["rollout_share"] * flops[kind]["rollout"] for kind in ("full", "full-reverse"))
    assert 0.3 * whole < short < 0.9 * whole and rows["full"]["rollout_share"] == 1


@pytest.fixture(scope="module")
def counted() -> dict[str, Any]:
    return step_results.count("tiny")


def test_flops_counted_without_weights_are_those_of_a_real_step(counted: dict[str, Any]):
    """But for the attention's backward: the CPU's kernel computes the scores once more, the meta device's does not."""
    found = {(row["name"], row["checkpointing"]): row["flops"] for row in counted["rows"]}
    whole = step_bench.Bench(tiny(), CPU)
    real = whole.flops(next(row for row, _ in whole.plan if row.name == "merged"), False)
    assert found["merged", False]["rollout"] == real["rollout"] and found["merged", False]["frozen passes"] == real["frozen passes"]
    assert 0.9 * real["reverse"] < found["merged", False]["reverse"] <= real["reverse"]
    assert len(found) == 2 * len(step_results.COUNTED)
    assert torch.is_autocast_enabled.__module__ != step_results.__name__


def test_flops_of_the_preset_without_weights_are_those_of_real_steps(counted: dict[str, Any], measured: dict[str, Any]):
    rows = {row["kind"]: row for row in step_figures.preset(measured, False)}
    assert len(step_figures.preset(counted, False)) > 1
    for meta in step_figures.preset(counted, False):
        row = rows[meta["kind"]]
        assert meta["rollout_share"] == row["rollout_share"]
        assert {name: meta["flops"][name] for name in ("rollout", "frozen passes")} == {
            name: row["flops"][name] for name in ("rollout", "frozen passes")
        }
    with pytest.raises((RuntimeError, NotImplementedError)):
        int(torch.ones((), device="meta"))  # as before
    shown = step_report.tables(counted)
    assert shown.count("`configs/flux_image_fast.toml`, the mean step") == 2


def test_tables_have_the_preset_where_a_file_has_it(measured: dict[str, Any]):
    lines = step_report._rollouts(measured, [False]).splitlines()
    title = step_figures.preset(measured, False)[0]["title"]
    assert title.endswith("/fast.toml`") and lines[-1].startswith(f"| {title}, the mean step | kept | 5 |")
    without = {"rows": [row for row in measured["rows"] if row["name"] != "fast"]}
    assert "fast" not in step_report._rollouts(without, [False])
    files = [measured, without | {"machine": {"device": "cpu"}}]
    both = [{**file, "rows": file["rows"] + [row | {"checkpointing": True} for row in file["rows"]]} for file in files]
    new, old = both
    flops = {**new, "machine": {"device": "meta"}}
    cells = [line.split(" | ")[1:] for line in step_report.presets(new, old, new, flops, flops).splitlines()[2:]]
    assert [bool(cell.strip(" |")) for cell in cells[1]] == [True, True, False, True, True, True]
    assert [bool(cell.strip(" |")) for cell in cells[2]] == [True, True, False, True, False, False]


# --- the line ---


def test_the_bars_figures_on_small_shapes():
    found = step_bar.bar("tiny", ("wan-tiny",), None, "wall", seconds=0)
    assert list(found) == KEYS
    assert found["peer_seconds"] is None and found["peer_peak"] is None
    numbers = {key: value for key, value in found.items() if value is not None}
    assert numbers["peak_over_paired"] >= 1 and all(value > 1 for value in numbers.values())


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(step_peer.VARIABLE, raising=False)
    given: list[Any] = []

    def fake(*arguments: Any) -> dict[str, float | None]:
        given.extend(arguments)
        return {key: None if key.startswith("peer") else 1.23456 for key in KEYS}

    monkeypatch.setattr(step_bar, "bar", fake)
    command.main(["--bar"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == {key: None if key.startswith("peer") else 1.235 for key in KEYS}
    assert given == ["cpu", ("wan-high", "wan-low"), None, "wall"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--peer"], "--peer: set MUSUBI_TUNER to the folder of a musubi-tuner checkout"),
        (["--peer", "--shape", "wan-tiny"], "--shape cpu or tiny"),
        (["--peer", "--device", "meta"], "leave --device and --out out"),
        (["--bar", "--out", "x.json"], "leave --device and --out out"),
        (["--bar", "--repeats", "2"], "leave --shape and --repeats out"),
        (["--bar", "--peer"], "not allowed with"),
    ],
)
def test_what_the_peer_and_the_bar_refuse(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv(step_peer.VARIABLE, raising=False)
    with pytest.raises(SystemExit) as stop:
        command.main(words)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--peer", "--bar"])
def test_a_wrong_checkout_is_named(word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(step_peer.VARIABLE, str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        command.main([word])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"{word}: MUSUBI_TUNER = {tmp_path}: no checkout" in said
