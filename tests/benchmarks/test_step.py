"""The step benchmark measures what it says: its meters on graphs whose figures are known, its rows, its tables."""

from __future__ import annotations

import copy
import json
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks import provenance, step_host, step_results, step_rows, step_shapes
from benchmarks import step as command
from benchmarks import step_bench as bench
from benchmarks import step_figures as figures
from benchmarks import step_meters as meters
from benchmarks import step_report as report
from tests.support import ROOT

CPU = torch.device("cpu")
KIB = 1024


def tiny_shape(**changes: Any) -> step_shapes.Shape:
    return replace(step_shapes.shape_named("tiny"), **changes)


def tiny_bench(**changes: Any) -> bench.Bench:
    return bench.Bench(tiny_shape(**changes), CPU)


# --- meters ---


def test_saved_bytes_are_what_the_graph_holds_each_storage_once():
    weight, x = torch.randn(16, 16, requires_grad=True), torch.randn(16, 16)
    with meters.SavedBytes([weight, x]) as held:
        y = (x @ weight).exp()  # saves x and W, which live anyway, and its result: 1 KiB
        assert held.now == KIB
        z = y.view(-1).sin().sum() + y.cos().sum()  # both save y once more
        assert held.now == KIB
        z = z.exp()
        assert held.now == KIB + 4
        z.backward()
        assert held.now == 0 and held.peak == KIB + 4
        held.reset()
        assert held.peak == 0
        (x @ weight).exp()
        assert held.now == 0 and held.peak == KIB, "a graph that is dropped holds nothing"


def test_alive_bytes_also_see_what_is_not_saved():
    weight, x = torch.randn(16, 16, requires_grad=True), torch.randn(16, 16)
    with meters.AliveBytes([weight, x]) as held, torch.no_grad():
        y = x @ weight
        view = y[:2]
        assert held.now == KIB
        y = y.relu()
        assert held.now == 2 * KIB and held.peak == 2 * KIB, "the view holds the whole storage"
        del view
        assert held.now == KIB
        x.add_(1)
        assert held.now == KIB, "nothing new in place"
        del y
    assert held.now == 0


def test_alive_bytes_see_what_checkpointing_recomputes():
    weight, x = torch.randn(16, 16, requires_grad=True), torch.randn(16, 16)

    def block(x: torch.Tensor) -> torch.Tensor:
        return (x @ weight).exp().sin().exp()

    peaks = {}
    for kind in (meters.SavedBytes, meters.AliveBytes):
        with kind([weight, x]) as held:
            checkpoint(block, x, use_reentrant=False).sum().backward()
            peaks[kind] = held.peak
        weight.grad = None
    assert peaks[meters.SavedBytes] < KIB < 3 * KIB <= peaks[meters.AliveBytes]


def test_flops_of_products_and_of_the_cpus_attention():
    q, k, v = (torch.randn(2, 3, 64, 16, requires_grad=True) for _ in range(3))
    forward = 2 * 2 * (2 * 3) * 64 * 64 * 16
    with meters.flop_counter() as counter:
        meter = meters.Rises(counter.get_total_flops)
        meter.begin()
        out = F.scaled_dot_product_attention(q, k, v)
        meter.lap("forward")
        out.sum().backward()
        meter.lap("backward")
        F.linear(torch.randn(5, 7), torch.randn(11, 7))
        meter.lap("linear")
    assert meter.phases == {"forward": forward, "backward": 2.5 * forward, "linear": 2 * 5 * 7 * 11}


def test_laps_add_up_and_peaks_are_of_a_phase():
    values = iter([10.0, 11.0, 13.0, 20.0])
    rises = meters.Rises(lambda: next(values))
    rises.begin()
    for phase in ("a", "b", "a"):
        rises.lap(phase)
    assert rises.phases == {"a": 8.0, "b": 2.0}

    state = {"peak": 5.0}
    peaks = meters.Peaks(lambda: state["peak"], lambda: state.update(peak=1.0))
    peaks.begin()
    peaks.lap("a")
    state["peak"] = 7.0
    peaks.lap("b")
    assert peaks.phases == {"a": 1.0, "b": 7.0}


# --- rows ---


@pytest.mark.parametrize(
    ("name", "side", "expert"),
    [("tiny", {}, ""), *(("wan-tiny", step_shapes.WAN_SIDES[s], f"transformer{n}.") for s, n in (("high", ""), ("low", "_2")))],
)
def test_every_row_computes_the_same(name: str, side: dict[str, Any], expert: str):
    """Losses and LoRA gradients of all rows with the full rollout; also those that others would write."""
    found = bench.Bench(replace(step_shapes.shape_named(name), **side), CPU)
    trained = [p for key, p in found.host.parameters.items() if key.startswith(expert)]
    gradients: dict[tuple[str, bool], list[torch.Tensor]] = {}
    for row, checkpointing in found.plan:
        if row is step_rows.PAIRED or row.name.endswith("fewer") or row.name == figures.FAST:
            continue
        found.optimizer.zero_grad(set_to_none=True)
        batch = found._choose(row, checkpointing)
        step_host.step(found.host, batch, meters.Meter())
        assert all(p.grad is None or not p.grad.any() for key, p in found.host.parameters.items() if not key.startswith(expert))
        gradients[row.name, checkpointing] = [p.grad.clone() for p in trained]
    wanted = gradients["printed", False]
    assert len(gradients) == len(step_rows.LADDER) + 4 and all(g.norm() > 0 for g in wanted)
    for row, values in gradients.items():
        worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(values, wanted, strict=True))
        assert worst <= 1e-5, row


def test_rows_differ_in_what_they_run():
    """FLOPs tell: LoRA products in the base, in the rollout, and recomputed blocks."""
    found = tiny_bench()
    names = ("paired", "printed", "switch", "frozen 2", "merged")
    flops = {(row.name, setting): found.flops(row, setting) for row, setting in found.plan if row.name in names and not setting}
    flops["paired", True] = found.flops(step_rows.PAIRED, True)

    def of(name: str, phase: str, checkpointing: bool = False) -> float:
        return flops[name, checkpointing][phase]

    assert of("printed", "frozen passes") > of("switch", "frozen passes") == of("frozen 2", "frozen passes")
    assert of("frozen 2", "rollout") > of("merged", "rollout") > 0
    assert of("paired", "paired", True) > 1.3 * of("paired", "paired")
    # Each differentiated pass is as dear as the paired step; the reverse pass is also differentiated by its source.
    assert of("frozen 2", "identity") == of("frozen 2", "forward") == of("paired", "paired") < of("frozen 2", "reverse")


def test_phases_are_complete_and_in_order():
    found = tiny_bench()
    phases = {row.name: list(found.seconds(row, checkpointing)) for row, checkpointing in found.plan}
    assert phases["paired"] == ["paired", figures.UPDATE]
    assert phases["printed"] == ["rollout", "frozen passes", "identity, reverse, forward", figures.UPDATE]
    assert phases["frozen 2"] == ["rollout", "frozen passes", "identity", "reverse", "forward", figures.UPDATE]
    assert phases["beside"] == ["rollout", "frozen passes", "identity + reverse", "forward", figures.UPDATE]


def test_sequential_peaks_like_paired_and_joint_like_three():
    """At the benchmark's own depth: the fewer the blocks, the more the reverse pass's gradient at its source weighs."""
    cpu = step_shapes.shape_named("cpu")
    transformer = cpu.transformer | {"attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    found = tiny_bench(transformer=transformer, side=16, text_tokens=32, batch=1)
    over = {}
    for row in (step_rows.PAIRED, *(row for row in step_rows.ladder(2) if row.name in ("printed", "frozen 2", "merged", "beside"))):
        step_host.step(found.host, found._choose(row, False), meters.Meter())  # makes gradients and merged weights: they live anyway
        over[row.name] = {kind: max(phases.values()) for kind, phases in found.peaks(row, False).items()}
    for kind in ("saved", "alive"):
        ratios = {name: peaks[kind] / over["paired"][kind] for name, peaks in over.items()}
        assert 1.0 <= ratios["frozen 2"] <= 1.05 and 1.0 <= ratios["merged"] <= 1.05
        assert 2.5 < ratios["printed"] < 3.2 and 1.9 < ratios["beside"] < 2.2


def test_the_host_is_as_it_was_after_every_row():
    found = tiny_bench()
    modules = {name: id(module) for name, module in found.host.networks["transformer"].named_modules()}
    for row in step_rows.all_rows(found.shape):
        step_host.step(found.host, found._choose(row, False), meters.Meter())
        assert {name: id(module) for name, module in found.host.networks["transformer"].named_modules()} == modules
        assert all(layer.scaling["byg"] == 1.0 and not layer.disable_adapters for layer in found.host._lora_layers)


def test_the_gpus_shape_is_full_size_and_its_steps_run_in_16_bit():
    shape = step_shapes.shape_named("flux.1-dev")
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        network = FluxTransformer2DModel(**shape.transformer)
    assert sum(p.numel() for p in network.parameters()) > 11.8e9
    assert (shape.side // 2) ** 2 == 1024, "512 px"
    found = tiny_bench(dtype=shape.dtype, mixed_precision=shape.mixed_precision, checkpointing=shape.checkpointing)
    assert next(p for p in found.host.networks["transformer"].parameters() if not p.requires_grad).dtype == torch.bfloat16
    for row, checkpointing in found.plan:
        assert found.seconds(row, checkpointing)
    assert [row.name for row, _ in found.plan] == [row.name for row in step_rows.all_rows(shape)]


# --- results and tables ---


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("step") / "step.json"
    with pytest.MonkeyPatch.context() as patch:
        names = ("paired", "printed", "frozen 4", "merged", "merged, fewer")
        whole, shape = bench.plan, tiny_shape(batch=1, checkpointing=(False,))
        patch.setattr(bench, "plan", lambda shape: [(row, setting) for row, setting in whole(shape) if row.name in names])
        patch.setattr(step_results, "shape_named", lambda name: shape)
        threads = torch.get_num_threads()
        command.main(["--shape", "tiny", "--repeats", "2", "--clock", "process", "--threads", "1", "--out", str(out)])
        torch.set_num_threads(threads)
    return report.read(out)


def test_a_results_file_has_all_and_names_no_machine(results: dict[str, Any]):
    text = json.dumps(results)
    assert platform.node() not in text and str(Path.home()) not in text and str(ROOT) not in text
    assert results["machine"]["torch"] == torch.__version__ and re.fullmatch("[0-9a-f]{40}|unknown", results["commit"]["hash"])
    assert 0 < results["matmul_share"] < 1
    assert results["resident_bytes"]["merged weights"] > 0
    for row in results["rows"]:
        assert len(row["seconds"]) == len(row["paired_seconds"]) == 2 and row["flops"] and row["bytes"]["saved"] and row["bytes"]["alive"]


def synthetic(results: dict[str, Any]) -> dict[str, Any]:
    """The same file with figures whose tables are known."""
    made = copy.deepcopy(results)
    for row in made["rows"]:
        seconds = {"paired": 1.0, "printed": 9.0, "merged": 6.0}.get(row["name"], 8.0)
        phase = "paired" if row["name"] == "paired" else "rollout"
        row["seconds"] = [{phase: seconds * slow, figures.UPDATE: 5.0} for slow in (1.0, 3.0)]
        row["paired_seconds"] = [1.0, 3.0]
        row["flops"] = {phase: seconds * 7}
    return made


def test_ratios_are_taken_inside_a_repetition_and_without_the_updates(results: dict[str, Any]):
    made = synthetic(results)
    lines = report.tables(made).splitlines()
    printed = next(line for line in lines if "as printed" in line and "FLOPs" not in line and line.count("|") == 6)
    assert "| 18 | 9.00 (9.00 to 9.00) | 9.00 |" in printed
    merged = next(line for line in lines if line.startswith("| + rollout on merged weights"))
    assert "6.00 (6.00 to 6.00)" in merged and "-25.0 %" in merged
    assert any(line.startswith(f"| ({figures.UPDATE}, apart) | 3.33") for line in lines)


def test_documents_have_the_tables_of_the_results():
    """Run: python -m benchmarks.step --write-docs."""
    shown = report.documents(ROOT / "benchmarks/results")
    assert shown.keys() == {"docs/step_cost.md"}
    for name, tables in shown.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text.partition(report.BEGIN)[2].partition(report.END)[0].strip() == tables, name


def test_tables_are_written_between_the_marks_alone(tmp_path: Path):
    folder = ROOT / "benchmarks/results"
    shown = report.documents(folder)
    for name in shown:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    report.write_documents(tmp_path, folder)
    for name, tables in shown.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == f"before\n{report.BEGIN}\n{tables}\n{report.END}\nafter\n"
    (tmp_path / "docs/step_cost.md").write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match=r"docs/step_cost.md has no <!-- step"):
        report.write_documents(tmp_path, folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cuda"], "--device cuda: PyTorch sees no CUDA"),
        (["--device", "mps"], "--device: invalid choice: 'mps'"),
        (["--clock", "process"], "--clock process counts"),
        (["--clock", "process", "--threads", "2"], "--clock process counts"),
        (["--repeats", "0"], "--repeats 0: at least 1"),
        (["--repeats", "-3"], "--repeats -3: at least 1"),
        (["--threads", "0"], "--threads 0: at least 1"),
        (["--threads", "-1"], "--threads -1: at least 1"),
        (["--out", "FOLDER"], "name the file"),
        (["--table", "FOLDER/words.json"], "words.json is not JSON"),
        (["--table", "FOLDER/other.json"], "other.json has no machine, shape, rows; give a file that"),
        (["--table", "FOLDER/other.json", "--out", "x", "--repeats", "2"], "--table has no use for --repeats, --out: leave it out"),
        (["--write-docs", "--threads", "1"], "--write-docs has no use for --threads: leave it out"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_work(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    if torch.cuda.is_available() and "cuda" in words:
        pytest.skip("there is a GPU")
    (tmp_path / "words.json").write_text("not JSON", encoding="utf-8")
    (tmp_path / "other.json").write_text('{"commit": "abc"}', encoding="utf-8")
    monkeypatch.setattr(step_results, "measure", lambda *rest: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        shape = [] if words[0] in ("--table", "--write-docs") else ["--shape", "tiny"]
        command.main([*shape, *(word.replace("FOLDER", str(tmp_path)) for word in words)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and words[0] in said and "python -m benchmarks.step" in said


def test_a_missing_results_file_is_one_line():
    command = [sys.executable, "-m", "benchmarks.step", "--table", "nosuch.json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "nosuch.json: No such file" in ended.stderr and "Traceback" not in ended.stderr


def test_the_merged_copy_is_named_beside_the_peaks(results: dict[str, Any]):
    made = results | {"resident_bytes": {"frozen weights": 40 * 2**20, "LoRA": 2**20, "merged weights": 30 * 2**20}}
    assert "30.0 MiB: 75% of the frozen weights once more" in report.tables(made)


def test_no_measurement_is_lost_outside_a_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit("benchmarks") == ("unknown", False)
    assert step_results.commit() == {"hash": "unknown", "modified": False}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() == ("unknown", False)


def test_a_commit_says_whether_the_code_differs_from_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "code.py").write_text("one", encoding="utf-8")
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    head, changed = provenance.commit("*.py")
    assert re.fullmatch("[0-9a-f]{40}", head) and not changed
    (tmp_path / "code.py").write_text("two", encoding="utf-8")
    assert provenance.commit("*.py") == (head, True) and provenance.commit("docs") == (head, False)


def test_the_commit_is_asked_for_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    monkeypatch.setattr(step_results, "commit", lambda: order.append("commit") or {"hash": "h", "modified": False})
    monkeypatch.setattr(bench.Bench, "measure", lambda self, repeats: order.append("measure") or [])
    monkeypatch.setattr(bench.Bench, "matmul_share", lambda self: None)
    assert step_results.measure("tiny", CPU, 1, "wall")["commit"]["hash"] == "h" and order == ["commit", "measure"]
