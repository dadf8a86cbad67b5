"""Tables of a results file of `benchmarks.step`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.step_figures import (
    FAST,
    UPDATE,
    Record,
    expected_flops,
    expected_ratio,
    expected_ratios,
    find,
    flop_ratio,
    largest_peak,
    peak,
    phase_ratio,
    preset,
    ratio,
    ratios,
    seconds,
    total,
)

PHASES = ("rollout", "frozen passes", "identity", "reverse", "forward", "identity + reverse", "identity, reverse, forward", "paired")
BEGIN, END = "<!-- step: made by python -m benchmarks.step --write-docs -->", "<!-- /step -->"


def read(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        ValueError: it is no file that `benchmarks.step` wrote.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"{path} is not JSON ({error}); give a file that python -m benchmarks.step --out wrote") from error
    lacking = [key for key in ("machine", "commit", "shape", "rows") if not isinstance(results, dict) or key not in results]
    if lacking:
        raise ValueError(f"{path} has no {', '.join(lacking)}; give a file that python -m benchmarks.step --out wrote")
    return results


def as_json(results: dict[str, Any]) -> str:
    """Seconds to a tenth of a millisecond, counts as whole numbers, one line a row."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [rounded(item) for item in value]
        if isinstance(value, float):
            return int(value) if value.is_integer() else round(value, 5)
        return value

    head = json.dumps(rounded({key: value for key, value in results.items() if key != "rows"}), indent=1)
    rows = ",\n".join("  " + json.dumps(rounded(row)) for row in results["rows"])
    return head[: -len("\n}")] + ',\n "rows": [\n' + rows + "\n ]\n}\n"


# --- tables ---


def tables(results: dict[str, Any]) -> str:
    """All tables of a results file, as Markdown."""
    settings = sorted({row["checkpointing"] for row in results["rows"]})
    if results["machine"]["device"] == "meta":
        return _counted(results, settings)
    parts = [
        _heading(results),
        _ladder(results, settings[0]),
        _phases(results, settings[0]),
        _rollouts(results, settings),
        _memory(results, settings),
    ]
    return "\n\n".join(parts)


def _heading(results: dict[str, Any]) -> str:
    shape, host = results["shape"], results["machine"]
    transformer = shape["transformer"]
    width = transformer["attention_head_dim"] * transformer["num_attention_heads"]
    device = host.get("gpu") or f"{host['cpu']}, {host['threads']} of {host['cores']} cores, {host['ram_gib']} GiB"
    clock = "Wall time" if results["clock"] == "wall" else "CPU time of one thread (other work ran beside it)"
    share = "" if results["matmul_share"] is None else f"; {results['matmul_share']:.0%} of a step's time is matrix products and attention"
    return (
        f"`{shape['name']}`: {_blocks(transformer)} of width {width}, "
        f"{shape['noisy_tokens']} noisy + {shape['noisy_tokens']} source + {shape['text_tokens']} text tokens, batch {shape['batch']}, "
        f"LoRA rank {shape['rank']}, {shape['dtype']}; {device}; PyTorch {host['torch']}; {_commit(results)}{share}. "
        f"{clock}: medians of {results['repeats']} repetitions, ranges in brackets."
    )


def _commit(results: dict[str, Any]) -> str:
    commit = results["commit"]
    return f"commit {commit['hash'][:10]}{' with changes' if commit['modified'] else ''}"


def _blocks(transformer: dict[str, Any]) -> str:
    if "num_single_layers" in transformer:
        return f"{transformer['num_layers']} double and {transformer['num_single_layers']} single blocks"
    return f"2 experts of {transformer['num_layers']} blocks"


def _counted(results: dict[str, Any], settings: list[bool]) -> str:
    """FLOPs alone."""
    shape = results["shape"]
    head = f"`{shape['name']}`, {shape['noisy_tokens']} noisy tokens, rank {shape['rank']}; {_commit(results)}: FLOPs over paired"
    lines = [f"| {head} | rollout steps | rollout | frozen passes | three differentiated passes | sum |", "|---|---|---|---|---|---|"]
    for setting in settings:
        paired = find(results, "paired", setting)
        assert paired is not None
        for name in ("frozen 2", "merged", "default, fewer", "merged, fewer", FAST):
            row = find(results, name, setting)
            if row is None:
                continue
            flops = expected_flops(preset(results, setting)) if name == FAST else row["flops"]
            shares = {phase: value / total(paired["flops"]) for phase, value in flops.items()}
            rollout, frozen = shares["rollout"], shares["frozen passes"]
            whole = sum(shares.values())
            title = f"{_title(row)}, activations {'recomputed' if setting else 'kept'}"
            lines.append(
                f"| {title} | {row['rollout_steps']} | {rollout:.2f} | {frozen:.2f} | {whole - rollout - frozen:.2f} | {whole:.2f} |"
            )
    return "\n".join(lines)


def _title(row: Record) -> str:
    """Of the tables that have rows with few and with many rollout steps."""
    if row["name"] == FAST:
        return f"{row['title']}, the mean step"
    return "merged" if row["name"].startswith("merged") else "defaults"


def _ladder(results: dict[str, Any], checkpointing: bool) -> str:
    paired = find(results, "paired", checkpointing)
    assert paired is not None
    lines = ["| step by step, each exact | seconds | over paired | by FLOPs | step gets |", "|---|---|---|---|---|"]
    lines.append(f"| {paired['title']} | {seconds(paired):.3g} | 1 | 1 | |")
    before = None
    for row in (row for row in results["rows"] if row["checkpointing"] == checkpointing and row["in_ladder"]):
        gain = "" if before is None else _change(before, row)
        plus = "" if before is None else "+ "
        lines.append(f"| {plus}{row['title']} | {seconds(row):.3g} | {_spread(ratios(row))} | {flop_ratio(results, row):.2f} | {gain} |")
        before = row
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _change(before: Record, row: Record) -> str:
    """Median over the repetitions of what the step's time became, beside paired steps of the same moment."""
    quotients = [new / old for new, old in zip(ratios(row), ratios(before), strict=True)]
    return f"{100 * (statistics.median(quotients) - 1):+.1f} %"


def _phases(results: dict[str, Any], checkpointing: bool) -> str:
    columns = [("printed", "as printed"), ("frozen 2", "defaults"), ("merged", "merged"), ("beside", "identity beside")]
    rows = [(title, row) for name, title in columns if (row := find(results, name, checkpointing))]
    lines = ["| phase, in paired steps | " + " | ".join(title for title, _ in rows) + " |", "|---|" + "---|" * len(rows)]
    for phase in PHASES:
        cells = [f"{phase_ratio(row, phase):.2f}" if phase in row["seconds"][0] else "" for _, row in rows]
        if any(cells):
            lines.append(f"| {phase} | " + " | ".join(cells) + " |")
    updates = [f"{phase_ratio(row, UPDATE):.2f}" for _, row in rows]
    return "\n".join([*lines, f"| ({UPDATE}, apart) | " + " | ".join(updates) + " |"])


def _rollouts(results: dict[str, Any], settings: list[bool]) -> str:
    lines = ["| over paired | activations | rollout steps | measured | by FLOPs |", "|---|---|---|---|---|"]
    for checkpointing in settings:
        for name in ("frozen 2", "default, fewer", "merged", "merged, fewer"):
            if row := find(results, name, checkpointing):
                lines.append(_rollout_line(row, checkpointing, ratios(row), flop_ratio(results, row)))
        if rows := preset(results, checkpointing):
            paired = find(results, "paired", checkpointing)
            assert paired is not None
            flops = total(expected_flops(rows)) / total(paired["flops"])
            lines.append(_rollout_line(rows[0], checkpointing, expected_ratios(rows), flops))
    return "\n".join(lines)


def _rollout_line(row: Record, checkpointing: bool, measured: list[float], flops: float) -> str:
    kept = "recomputed" if checkpointing else "kept"
    return f"| {_title(row)} | {kept} | {row['rollout_steps']} | {_spread(measured)} | {flops:.2f} |"


def _memory(results: dict[str, Any], settings: list[bool]) -> str:
    kinds = [(kind, checkpointing) for checkpointing in settings for kind in results["rows"][0]["bytes"]]
    names = {"saved": "saved for backward", "alive": "all tensors alive", "allocator": "allocator"}
    heads = [f"{names[kind]}, activations {'recomputed' if checkpointing else 'kept'}" for kind, checkpointing in kinds]
    lines = ["| peak memory of a step | " + " | ".join(heads) + " |", "|---|" + "---|" * len(kinds)]
    paired = {setting: find(results, "paired", setting) for setting in settings}
    lines.append("| paired | " + " | ".join(f"{peak(paired[setting], kind) / 2**20:.1f} MiB" for kind, setting in kinds) + " |")  # type: ignore[arg-type]
    titles = {
        "printed": "`joint` (as printed), over paired",
        "frozen 2": "`sequential` (the defaults)",
        "merged": "with all four frozen passes at once, and merged (beside the copy)",
        "beside": "with identity beside the reverse pass, too",
    }
    for name, title in titles.items():
        cells = []
        for kind, setting in kinds:
            row = find(results, name, setting)
            cells.append(f"{peak(row, kind) / peak(paired[setting], kind):.3f}" if row else "")  # type: ignore[arg-type]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    if preset(results, settings[0]):
        cells = []
        for kind, setting in kinds:
            worst = max(peak(row, kind) for row in preset(results, setting))
            cells.append(f"{worst / peak(paired[setting], kind):.3f}")  # type: ignore[arg-type]
        lines.append(f"| {preset(results, settings[0])[0]['title']}, its dearest kind of step | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _resident(results["resident_bytes"])])


def _resident(sizes: dict[str, int]) -> str:
    """What lives anyway, and is in no peak."""
    frozen, lora, copy = (sizes[part] for part in ("frozen weights", "LoRA", "merged weights"))
    return (
        f"Not in these peaks, because it lives whether a step runs or not: frozen weights {frozen / 2**20:.1f} MiB, the LoRA "
        f"{lora / 2**20:.1f} MiB (its gradients, moments and average come on top), and for the merged rows alone the merged copy of the "
        f"matrices that the LoRA adapts, {copy / 2**20:.1f} MiB: {copy / frozen:.0%} of the frozen weights once more."
    )


def headline(results: dict[str, Any]) -> str:
    """The few rows to begin with."""
    lines = ["| one step over a paired one | 10 rollout steps | 5 | 10, activations recomputed | 5 |", "|---|---|---|---|---|"]
    titles = {
        "printed": ("Algorithm 1 as printed", ""),
        "frozen 2": ("the defaults", "default, fewer"),
        "merged": ('`frozen_batch = 4`, `rollout_weights = "merged"`', "merged, fewer"),
    }
    for name, (title, fewer) in titles.items():
        cells = []
        for checkpointing in (False, True):
            for row in (find(results, name, checkpointing), find(results, fewer, checkpointing)):
                cells.append(f"{ratio(row):.1f}" if row else "")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    for title, name in (("as printed, one graph", "printed"), ("of the defaults", "frozen 2")):
        cells = []
        for checkpointing in (False, True):
            paired, row = (find(results, which, checkpointing) for which in ("paired", name))
            assert paired and row
            cells += [f"{peak(row, 'saved') / peak(paired, 'saved'):.2f}", ""]
        lines.append(f"| peak memory {title} (saved for backward) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def presets(cpu: dict[str, Any], wan_high: dict[str, Any], wan_low: dict[str, Any], flux: dict[str, Any], wan: dict[str, Any]) -> str:
    """The recipes for speed in one table: measured, and by FLOPs at full size. A file from before them leaves its cells empty."""
    columns = {
        "FLUX": (cpu, False),
        "FLUX, recomputed": (cpu, True),
        "Wan, high-noise expert": (wan_high, False),
        "Wan, low-noise expert": (wan_low, False),
        "FLUX.1-dev, recomputed, by FLOPs": (flux, True),
        "Wan2.2 A14B, recomputed, by FLOPs": (wan, True),
    }
    found: dict[str, list[str]] = {"the defaults": [], "`flux_image_fast`, `wan22_video_fast`": [], "their largest peak memory": []}
    for results, setting in columns.values():
        counted, rows = results["machine"]["device"] == "meta", preset(results, setting)
        paired, default = (find(results, name, setting) for name in ("paired", "frozen 2"))
        assert paired and default
        flops = total(expected_flops(rows)) / total(paired["flops"])
        cells = [
            f"{flop_ratio(results, default) if counted else ratio(default):.1f}",
            f"{flops if counted else expected_ratio(rows):.2f}" if rows else "",
            f"{largest_peak(results, rows):.3f}" if rows and not counted else "",
        ]
        for line, cell in zip(found.values(), cells, strict=True):
            line.append(cell)
    lines = ["| one step over a paired one | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {title} | " + " | ".join(cells) + " |" for title, cells in found.items())])


def documents(folder: Path) -> dict[str, str]:
    """What each document shows of a results folder, by its path from the repository's root."""
    names = ("cpu", "flux_flops", "wan_high", "wan_low", "wan_flops")
    cpu, flux_flops, wan_high, wan_low, wan_flops = every = [read(folder / f"step_{name}.json") for name in names]
    summary = presets(cpu, wan_high, wan_low, flux_flops, wan_flops)
    return {"docs/step_cost.md": "\n\n".join([headline(cpu), summary, *map(tables, every)])}


def write_documents(root: Path, folder: Path) -> None:
    """Put a results folder's tables between the marks of each document.

    Raises:
        ValueError: the marks are missing.
    """
    for name, shown in documents(folder).items():
        path = root / name
        text = path.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{name} has no {BEGIN} ... {END}: put both lines where the tables belong")
        path.write_text(f"{before}{BEGIN}\n{shown}\n{END}{after}", encoding="utf-8")
