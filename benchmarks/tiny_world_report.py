"""Table and plot of a tiny-world study, of pictures or of clips, from the runs' JSONs alone."""

from __future__ import annotations

import colorsys
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]
Results = dict[str, dict[int, Record]]
"""Run -> seed -> its JSON."""
Point = dict[str, float]
"""One evaluation of a curve: step and the averages over all edits."""

CORES = 2  # a run's time is its CPU seconds over this: what it takes on the two cores that are promised
FEWEST = 0.05  # edit rate below which there is nothing to compare at
# Table 4 of the paper (GEdit-Bench, of 10): edit success, source preservation.
PAPER = {
    "full": (8.317, 7.617), "no_routing": (8.917, 7.183), "no_cycle": (8.983, 7.233), "no_directional": (8.400, 7.233),
    "no_bootstrap": (5.517, 7.050), "no_prior": (0.633, 9.767), "no_identity": (8.413, 7.450),
}  # fmt: skip
ORDER = ("truth", "copy", "base", *PAPER, "paired_steps", "paired_time")
OBJECT, BACKGROUND = "recolour_object", "recolour_background"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs with a table of their own, by edit type; the names of all of them begin alike.

    Attributes:
        title: of the table.
        about: what is above it; `{edits}` is how many edits each type has.
        runs: the study's, in their order, without what their names begin with.
        ablations: whether its runs are the method's parts, which are set beside the paper's Table 4 and the promises too.
    """

    title: str
    about: str
    runs: tuple[str, ...]
    ablations: bool = False


GROUPS: dict[str, Group] = {
    "fast_": Group(
        title="The cheaper step in smaller batches",
        about="The data of the main table, {edits} edits of each type. Batches of 2 for 8, the identity term in a quarter of the steps, "
        "second-order rollout steps on shifted nodes, the LoRA multiplied into the weights; trained in float32, in about the CPU seconds "
        "that the recipe's 800 steps took in float32 before the step was cheaper.",
        runs=("full", "no_routing", "no_cycle", "no_directional", "no_bootstrap", "no_prior", "no_identity", "paired_steps"),
        ablations=True,
    ),
    "four_": Group(
        title="Editors of four steps",
        about="The data of the main table, {edits} edits of each type, and every editor sampled in four steps: NP-Edit's by its own "
        "stochastic sampler, the others by Euler's. Trained in float32. NP-Edit's steps are those of both its adapters.",
        runs=("full", "paired_steps", "np_edit", "no_dmd", "no_vlm", "no_question"),
    ),
    "three_": Group(
        title="Removals: a critic, and a guided prior",
        about="Recolouring and removing, with training and evaluation edits of their own, {edits} of each type. Sampled in four steps by "
        "Euler; trained in float32.",
        runs=("full", "critic", "guided"),
    ),
    "six_": Group(
        title="All six edit types",
        about="Their own training and evaluation edits, {edits} of each type.",
        runs=("truth", "copy", "base", "full", "paired_steps", "paired_time"),
    ),
}
"""By the start of their runs' names."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What differs between the studies' pages."""

    title: str
    command: str
    metrics: str
    """Where they are defined."""
    columns: tuple[tuple[str, str, str], ...] = ()
    """(title, key, `percent` or `number`) of the columns that the main table has beside the common ones."""


PICTURES = Page(
    title="The tiny world",
    command="python -m benchmarks.tiny_world",
    metrics="byg_plugin/demo/metrics.py",
)
CLIPS = Page(
    title="The moving tiny world",
    command="python -m benchmarks.video_world",
    metrics="byg_plugin/demo/video_metrics.py",
    columns=(
        ("shape in every frame", "tracked", "percent"),
        ("trajectory error (px)", "trajectory_error", "number"),
        ("flicker", "flicker", "number"),
    ),
)


def read_results(folder: Path) -> Results:
    """Every JSON of a stage.

    Raises:
        ValueError: one cannot be read.
    """
    results: Results = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: cannot be read as JSON ({error}); remove it, and its run is made again") from error
        results.setdefault(record["name"], {})[record["seed"]] = record
    return results


def names(results: Results) -> list[str]:
    """Runs of the main table: the study's in its order, then what was tried."""
    known = [name for name in ORDER if name in results]
    return known + [name for name in results if name not in ORDER and not _grouped(name)]


def group_names(results: Results, prefix: str) -> list[str]:
    """Runs of a group's table, likewise."""
    order = [prefix + run for run in GROUPS[prefix].runs]
    return [name for name in order if name in results] + [name for name in results if name not in order and name.startswith(prefix)]


def _grouped(name: str) -> bool:
    return name.startswith(tuple(GROUPS))


# --- at matched edit rate ---


def curve(record: Record) -> list[Point]:
    """The evaluations of a run while it was training, as `{"step", "edit", "preserved", ...}`."""
    return [{"step": point["step"], **point["table"]["all"]} for point in record.get("curve", [])]


def at_rate(path: Sequence[Point], rate: float, key: str) -> float | None:
    """`key` where a curve last passes an edit rate, on straight lines between its points; None if it never does."""
    for before, after in reversed(list(zip(path, path[1:], strict=False))):
        low, high = sorted((before["edit"], after["edit"]))
        if low <= rate <= high:
            share = (rate - before["edit"]) / (after["edit"] - before["edit"]) if high > low else 1.0
            return before[key] + share * (after[key] - before[key])
    return None


def at_seconds(record: Record, seconds: float, key: str) -> float | None:
    """`key` over all edits after so many CPU seconds of training, on straight lines between evaluations; None before the first one.

    A run that was done earlier is read at its end.
    """
    return _read_at(record, seconds, lambda point: point["table"]["all"][key])


def steps_at_seconds(record: Record, seconds: float) -> float | None:
    """How many steps it had made then; see `at_seconds`."""
    return _read_at(record, seconds, lambda point: point["step"])


def _read_at(record: Record, seconds: float, value: Callable[[Mapping[str, Any]], float]) -> float | None:
    path = [(point["cpu_seconds"], value(point)) for point in record.get("curve", [])]
    times = [time for time, _ in path]
    return None if not path or seconds < times[0] else float(np.interp(seconds, times, [known for _, known in path]))


def matched(full: Sequence[Point], other: Sequence[Point], key: str) -> tuple[float, float] | None:
    """(edit rate, difference other - full) at the lower of the two final edit rates.

    The run that ends there is read at its end, the other where it last passes that rate. None where it never passes it,
    or where there are hardly edits.
    """
    if not full or not other:
        return None
    rate = min(full[-1]["edit"], other[-1]["edit"])
    values = at_rate(full, rate, key), at_rate(other, rate, key)
    if rate < FEWEST or values[0] is None or values[1] is None:
        return None
    return rate, values[1] - values[0]


def matched_over_range(full: Sequence[Point], other: Sequence[Point], key: str) -> tuple[float, float, float] | None:
    """(lowest rate, highest rate, mean difference other - full) over the edit rates that both curves pass.

    None where they share less than 5 percentage points.
    """
    if not full or not other:
        return None
    low = max(FEWEST, *(min(point["edit"] for point in path) for path in (full, other)))
    high = min(max(point["edit"] for point in path) for path in (full, other))
    if high - low < 0.05:
        return None
    differences = []
    for rate in np.linspace(low, high, 21):
        values = at_rate(full, rate, key), at_rate(other, rate, key)
        assert values[0] is not None and values[1] is not None, "a rate between a curve's extremes is on it"
        differences.append(values[1] - values[0])
    return low, high, float(np.mean(differences))


# --- cells ---


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Mean, and lowest to highest over the seeds."""
    mean = show(float(np.mean(values)))
    low, high = show(min(values)), show(max(values))
    return mean if len(values) == 1 or low == high else f"{mean} ({low} to {high})"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"


def _points(value: float) -> str:
    """A difference of percentages."""
    return f"{100 * value:+.0f}"


def _error(value: float) -> str:
    return f"{value:.3f}"


def _change(value: float) -> str:
    return f"{value:+.3f}"


def _values(records: Mapping[int, Record], key: str, kind: str = "all") -> list[float]:
    return [record["table"][kind][key] for record in records.values() if kind in record["table"] and record["table"][kind][key] is not None]


def _cell(records: Mapping[int, Record], key: str, kind: str = "all", show: Callable[[float], str] = _percent) -> str:
    values = _values(records, key, kind)
    return _spread(values, show) if values else "-"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _header(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|---" * len(cells) + "|"]


def _title(records: Mapping[int, Record]) -> str:
    return next(iter(records.values()))["title"]


def _study_seeds(results: Results) -> list[int]:
    """Seeds that some row was trained with."""
    return sorted({record["seed"] for records in results.values() for record in records.values() if record["kind"] == "train"})


def _missing_seeds(results: Results, name: str) -> list[int]:
    """Seeds that some trained row has and this one has not; none of a row without randomness."""
    random = all(record["kind"] in ("train", "base") for record in results[name].values())
    return sorted(set(_study_seeds(results)) - results[name].keys()) if random else []


def _few_seeds(results: Results, name: str) -> str:
    """Says of a row that it has not all seeds of the study."""
    return _alone(results[name]) if _missing_seeds(results, name) else ""


def _alone(seeds: Iterable[int]) -> str:
    return f" (seed {', '.join(map(str, sorted(seeds)))} alone)"


def _row(results: Results, name: str) -> str:
    """A row's title, with the seeds it has where they are not all."""
    return _title(results[name]) + _few_seeds(results, name)


def _minutes(records: Mapping[int, Record], limit: float) -> str:
    values = [record["cpu_seconds"] / CORES / 60 for record in records.values() if "cpu_seconds" in record]
    if not values:
        return "-"
    return _spread(values, lambda value: f"{value:.1f}") + (" **over**" if max(values) > limit else "")


# --- the tables ---


def table(results: Results, limit: float, page: Page = PICTURES) -> str:
    """The whole page; `limit` is the stage's in minutes."""
    parts = [_heading(results, page), _main_table(results, limit, page)]
    if "full" in results:
        parts += [_beside_paper(results), _targets(results)]
    for prefix in GROUPS:
        if group_names(results, prefix):
            parts += [_by_type(results, prefix, limit), *_ablations(results, prefix)]
    parts.append(_notes(results, page))
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(results: Results, page: Page) -> str:
    records = [record for seeds in results.values() for record in seeds.values()]
    stages = sorted({record["stage"] for record in records})
    seeds = _study_seeds(results)
    main = next((seeds for name, seeds in results.items() if not _grouped(name)), {})
    edits = max((record["edits"] for record in main.values()), default=0)
    lines = [
        f"# {page.title}, stage {', '.join(stages)}",
        "",
        f"Made by `{page.command}`. Training seeds {', '.join(map(str, seeds)) or 'none'}; {edits} held-out edits, half "
        "recolour the object, half the background, the same for every run but those of tables that say they have their own. Cells are the "
        "mean over seeds, and in brackets the lowest and the highest seed; percentages without their sign. "
        f"Metrics are exact and read from pixels: `{page.metrics}`.",
    ]
    warnings = _mixtures(results)
    return "\n".join(lines + [line for warning in warnings for line in ("", warning)])


def _mixtures(results: Results) -> list[str]:
    """Whether all rows were measured on one base and one set of data."""
    lines = []
    records = [record for seeds in results.values() for record in seeds.values()]
    trained = [record for record in records if record["kind"] == "train" and not _grouped(record["name"])]
    for what, group in (("base", [record for record in records if "base" in record["identity"]]), ("data", trained)):
        found: dict[str, list[str]] = {}
        for record in group:
            found.setdefault(record["identity"][what], []).append(f"{record['name']}-{record['seed']}")
        if len(found) > 1:
            rows = " | ".join(", ".join(rows) for rows in found.values())
            lines.append(
                f"**Rows are not comparable, they differ in the {what}: {rows}.** Run the study again: what is stale is made anew."
            )
    return lines


def _main_table(results: Results, limit: float, page: Page) -> str:
    lines = _header(
        [
            "run", "**joint**", "edit made", "... object", "... background", "source preserved", "... object edits",
            "... background edits", "pebble kept", "error outside", *(title for title, _, _ in page.columns), "steps",
            f"CPU minutes / {CORES}",
        ]
    )  # fmt: skip
    for name in names(results):
        records = results[name]
        cells = [_row(results, name), f"**{_cell(records, 'joint')}**"]
        cells += [_cell(records, "edit", kind) for kind in ("all", OBJECT, BACKGROUND)]
        cells += [_cell(records, "preserved", kind) for kind in ("all", OBJECT, BACKGROUND)]
        cells += [_cell(records, "pebble"), _cell(records, "outside_error", show=_error)]
        cells += [_cell(records, key, show=_percent if kind == "percent" else _error) for _, key, kind in page.columns]
        steps = [record["steps"] for record in records.values() if "steps" in record]
        cells += [_spread(steps, lambda value: f"{value:.0f}") if steps else "-", _minutes(records, limit)]
        lines.append(_line(cells))
    return "\n".join(lines)


def _pairs(results: Results, name: str) -> list[tuple[Record, Record]]:
    """(full, other) of every seed that both have."""
    return [(results["full"][seed], record) for seed, record in sorted(results[name].items()) if seed in results["full"]]


def _changes(results: Results, name: str, key: str, kind: str = "all") -> list[float]:
    """Final value minus that of `full`, by seed."""
    return [other["table"][kind][key] - full["table"][kind][key] for full, other in _pairs(results, name)]


def direction(changes: Sequence[float]) -> str:
    """`up` or `down` where every seed says so, else `unclear`."""
    if changes and min(changes) > 0:
        return "up"
    return "down" if changes and max(changes) < 0 else "unclear"


def _curve_edits(results: Results) -> int:
    """Edits that the points of curves are measured on."""
    return max(int(point["n"]) for seeds in results.values() for record in seeds.values() for point in curve(record))


def _beside_paper(results: Results) -> str:
    lines = [
        "## Against Table 4 of the paper, and at equal edit rate",
        "",
        "Changes against the full method of the same seed, in percentage points. *At equal edit rate*: both runs' curves over training, "
        "read at the lower of the two final edit rates (where a curve last passes it, straight lines between evaluations). *Over the "
        "shared range*: the mean over all edit rates that both curves pass. A run that only edits more, and therefore preserves less, "
        f"changes the columns of the end and not those of equal edit rate. Curves are measured on {_curve_edits(results)} of the "
        "held-out edits, the columns of the end on all. Equal edit rate mixes both types of edits, so a run that edits other types is "
        "compared at another mix; *backgrounds at the end* compares the one type that most runs edit nearly always.",
        "",
        *_header(
            [
                "run", "paper: edit, preserved (of 10)", "edit at the end", "preserved at the end",
                "preserved at equal edit rate", "error outside at equal edit rate", "preserved over the shared range",
                "backgrounds at the end: edit, preserved",
            ]
        ),
    ]  # fmt: skip
    for name in names(results):
        if name == "full" or not _pairs(results, name) or "curve" not in next(iter(results[name].values())):
            continue
        ends = [_changes(results, name, key) for key in ("edit", "preserved")]
        cells = [_row(results, name), _paper_cell(name)]
        cells += [f"{direction(changes)}: {_spread(changes, _points)}" for changes in ends]
        cells += [_matched_cell(results, name, "preserved", _points), _matched_cell(results, name, "outside_error", _change)]
        cells += [_range_cell(results, name), _backgrounds_cell(results, name)]
        lines.append(_line(cells))
    return "\n".join(lines)


def _paper_cell(name: str) -> str:
    if name not in PAPER:
        return "-"
    edit, preserved = PAPER[name]
    up = ["up" if value > reference else "down" for value, reference in zip(PAPER[name], PAPER["full"], strict=True)]
    return f"{up[0]} {edit:.2f}, {up[1]} {preserved:.2f}"


def _matched_cell(results: Results, name: str, key: str, show: Callable[[float], str]) -> str:
    found = [matched(curve(full), curve(other), key) for full, other in _pairs(results, name)]
    known = [pair for pair in found if pair is not None]
    if not known:
        return "curves do not overlap"
    lacking = _lacking(len(known), len(found))
    return f"{_spread([pair[1] for pair in known], show)} at {_spread([pair[0] for pair in known], _percent)} % edits{lacking}"


def _lacking(known: int, seeds: int) -> str:
    """What a mean over fewer than all seeds says of it."""
    return f"; {seeds - known} of {seeds} seeds do not overlap" if known < seeds else ""


def _range_cell(results: Results, name: str) -> str:
    found = [matched_over_range(curve(full), curve(other), "preserved") for full, other in _pairs(results, name)]
    known = [triple for triple in found if triple is not None]
    if not known:
        return "curves do not overlap"
    low, high = (float(np.mean([triple[i] for triple in known])) for i in (0, 1))
    lacking = _lacking(len(known), len(found))
    return f"{_spread([triple[2] for triple in known], _points)} over {_percent(low)} to {_percent(high)} % edits{lacking}"


def _backgrounds_cell(results: Results, name: str) -> str:
    return ", ".join(_spread(_changes(results, name, key, BACKGROUND), _points) for key in ("edit", "preserved"))


def _targets(results: Results) -> str:
    """What was to be shown, and whether it is."""
    lines = ["## What was to be shown", "", *_header(["target", "measured", "reached"])]

    def add(name: str, target: str, measured: str, reached: bool) -> None:
        if name in results:
            # One seed against a promise decides; seeds that keep it do when all are there.
            kept = "so far" if _missing_seeds(results, name) else "yes"
            lines.append(_line([target, measured, (kept if reached else "**no**") + _few_seeds(results, name)]))

    joint = _values(results["full"], "joint")
    add("full", "full method: joint success of at least 90 %", _spread(joint, _percent) + " %", float(np.mean(joint)) >= 0.9)
    if "no_prior" in results:
        edits = _values(results["no_prior"], "edit")
        add("no_prior", "without prior: edits in less than 5 %", _spread(edits, _percent) + " %", max(edits) < 0.05)
    for name, what in (("no_cycle", "cycle"), ("no_routing", "gradient routing"), ("no_directional", "directional term")):
        if name in results:
            found = [matched(curve(full), curve(other), "preserved") for full, other in _pairs(results, name)]
            below = bool(found) and all(pair is not None and pair[1] < 0 for pair in found)
            cell = _matched_cell(results, name, "preserved", _points)
            add(name, f"without {what}: preserves less than full at equal edit rate, every seed", cell, below)
    for name, target, wanted in (
        ("no_bootstrap", "without bootstrapping: fewer edits and less preserved, every seed", ("down", "down")),
        ("no_identity", "without identity steps: more edits and less preserved, every seed", ("up", "down")),
    ):
        if name in results:
            ends = [_changes(results, name, key) for key in ("edit", "preserved")]
            cell = f"edit {_spread(ends[0], _points)}, preserved {_spread(ends[1], _points)}" if ends[0] else "-"
            add(name, target, cell, tuple(direction(changes) for changes in ends) == wanted)
    return "\n".join(lines)


def _by_type(results: Results, prefix: str, limit: float) -> str:
    group, found = GROUPS[prefix], group_names(results, prefix)
    tables = [record["table"] for name in found for record in results[name].values()]
    types = sorted({kind for table in tables for kind in table} - {"all"})
    edits = max(int(table[kind]["n"]) for table in tables for kind in types if kind in table)
    lines = [f"## {group.title}", "", group.about.format(edits=edits), ""]
    columns = ["run", "edits", "**joint**", "edit made", "source preserved", "pebble kept", "error outside", "mask IoU", "steps"]
    lines += _header([*columns, f"CPU minutes / {CORES}"])
    for name in found:
        records = results[name]
        steps = [record["steps"] for record in records.values() if "steps" in record]
        for kind in [*types, "all"]:
            cells = [_row(results, name), kind, f"**{_cell(records, 'joint', kind)}**", _cell(records, "edit", kind)]
            cells += [_cell(records, "preserved", kind), _cell(records, "pebble", kind)]
            cells += [_cell(records, "outside_error", kind, _error), _cell(records, "iou", kind, lambda value: f"{value:.2f}")]
            last = kind == "all"
            cells += [_spread(steps, lambda value: f"{value:.0f}") if last and steps else "", _minutes(records, limit) if last else ""]
            lines.append(_line(cells))
    lines += _in_the_time_of_pairs(results, prefix)
    lacking = group_lacking(results, prefix)
    return "\n".join([*lines, "", f"**Not measured yet: {'; '.join(lacking)}.**"] if lacking else lines)


def _ablations(results: Results, prefix: str) -> list[str]:
    """The two tables below the main one, of a group's own full method and the runs beside it."""
    own = {name.removeprefix(prefix): results[name] for name in group_names(results, prefix)}
    if not GROUPS[prefix].ablations or "full" not in own or len(own) == 1:
        return []
    return [f"#{part}" for part in (_beside_paper(own), _targets(own))]


def _in_the_time_of_pairs(results: Results, prefix: str) -> list[str]:
    """The group's runs, read where they had taken the CPU seconds of *paired, equal steps* of their seed; none without that run."""
    pairs = results.get(f"{prefix}paired_steps", {})
    if not pairs:
        return []
    seconds = _spread([record["cpu_seconds"] for record in pairs.values()], lambda value: f"{value:.0f}")
    edits = _curve_edits({name: results[name] for name in group_names(results, prefix)})
    lines = [
        "",
        f"In the CPU seconds of *{_title(pairs)}* of the same seed ({seconds}), on the {edits} edits of the curves; the other runs' "
        "learning rates have not ended there, and a run that other work slowed down had made fewer steps:",
        "",
        *_header(["run", "**joint**", "edit made", "source preserved", "steps"]),
    ]
    for name in group_names(results, prefix):
        alike = {seed: record for seed, record in results[name].items() if _timed_alike(record, pairs.get(seed))}
        read = {seed: steps_at_seconds(record, pairs[seed]["cpu_seconds"]) for seed, record in alike.items()}
        steps = {seed: known for seed, known in read.items() if known is not None}
        if steps:
            shares = [
                [at_seconds(alike[seed], pairs[seed]["cpu_seconds"], key) for seed in steps] for key in ("joint", "edit", "preserved")
            ]
            joint, *others = [_spread([value for value in values if value is not None], _percent) for values in shares]
            title = _title(results[name]) + ("" if steps.keys() >= set(_study_seeds(results)) else _alone(steps))
            lines.append(_line([title, f"**{joint}**", *others, _spread(list(steps.values()), lambda value: f"{value:.0f}")]))
    return lines


def _timed_alike(record: Record, pairs: Record | None) -> bool:
    """Seconds of float32 and of bfloat16 were taken on machines that are fast with one of them."""
    return pairs is not None and _precision(record) == _precision(pairs)


def _precision(record: Record) -> str | None:
    return record.get("config", {}).get("train", {}).get("mixed_precision")


def group_lacking(results: Results, prefix: str) -> list[str]:
    """The study's rows that a group's table has not, or not in all seeds."""
    found = []
    for run in GROUPS[prefix].runs:
        name = prefix + run
        if name not in results:
            found.append(_title(results.get(run, {0: {"title": name}})))
        elif missing := _missing_seeds(results, name):
            found.append(f"{_title(results[name])} (seed {', '.join(map(str, missing))})")
    return found


def _notes(results: Results, page: Page) -> str:
    records = [record for seeds in results.values() for record in seeds.values()]
    trained = [record for record in records if record["kind"] == "train"]
    lines = [
        "## How to read it",
        "",
        "- Time is CPU seconds of training alone (evaluations and start-up are not in it) over the number of cores: runs have one thread "
        "each and are made side by side. *Paired, equal time* has as many steps as take the CPU seconds of the full method of its seed.",
        "- *Without identity steps* keeps the identity warm-up and drops the random identity steps after it, as Table 4 does; it has more "
        "other steps instead. *Without directional term* keeps alpha. The paired baseline has no identity steps at all.",
        "- Curves are evaluated with the averaged weights. A curve that is read before its end is read at a higher learning rate than "
        "that of a run that ends there. Between two evaluations it is a straight line: at edit rates below its first point after the "
        "warm-up it was not measured.",
        "- A preserved source needs a small error outside the edit and every bystander's colour: a run that edits nothing preserves all. "
        "The mask's IoU of at least 0.8 is asked for joint success alone, which is the same wherever it is asked.",
        "- The base has read instructions too: a share of its pictures (`INSTRUCTED`) came with an instruction that would have led to "
        "them in place of their caption (`benchmarks/bases/common.py`); benchmarks/README.md says what that was worth.",
    ]
    if trained:
        bases = sorted({record["identity"]["base"] for record in trained})
        commits = sorted({record["commit"] for record in records})
        machine = trained[0]["machine"]
        lines.append(
            f"- Base {', '.join(bases)}; commits {', '.join(commits)}; torch {machine['torch']}, diffusers {machine['diffusers']}, "
            f"{machine['threads']} thread a run."
        )
    return "\n".join(lines)


# --- the plot ---

# Okabe and Ito's colours, told apart by all; each line has a marker of its own too.
STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "#000000", "marker": "o", "linewidth": 3.2},
    "no_routing": {"color": "#0072B2", "marker": "s"},
    "no_cycle": {"color": "#D55E00", "marker": "^"},
    "no_directional": {"color": "#CC79A7", "marker": "D"},
    "no_bootstrap": {"color": "#009E73", "marker": "v"},
    "no_prior": {"color": "#E69F00", "marker": "P"},
    "no_identity": {"color": "#56B4E9", "marker": "X"},
    "paired_steps": {"color": "#7a7a7a", "marker": "<", "linestyle": (0, (5, 2))},
    "paired_time": {"color": "#7a7a7a", "marker": ">", "linestyle": (0, (1, 1.5))},
}


def styles(results: Results) -> dict[str, dict[str, Any]]:
    """How each run that has a curve is drawn; one that STYLES does not know has a dark hue and a letter of its own."""
    drawn = [name for name in names(results) if any(curve(record) for record in results[name].values())]
    others = [name for name in drawn if name not in STYLES]
    letters = {name: {"color": _hue(index), "marker": f"${chr(97 + index % 26)}$"} for index, name in enumerate(others)}
    return {name: (STYLES | letters)[name] for name in drawn}


def _hue(index: int) -> tuple[float, float, float]:
    """A dark colour (RGB in 0..1), far from those of the indices beside it: golden-ratio steps around the wheel."""
    return colorsys.hsv_to_rgb(index * 0.618 % 1, 1.0, 0.7)


def plot(results: Results, path: Path, page: Page = PICTURES) -> bool:
    """Edits against preservation over training, one line a run; False when no run has a curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = styles(results)
    if not drawn:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(15, 6.4), constrained_layout=True)
    for axis, key, label in (
        (axes[0], "preserved", "source preserved (% of edits)"),
        (axes[1], "outside_error", "error outside the edit (mean absolute, colours in 0..1)"),
    ):
        _panel(axis, results, drawn, key, label)
    axes[1].invert_yaxis()  # better is up in both
    figure.suptitle(
        f"{page.title}: what each part of the method is worth, over training\n"
        f"thick: mean over seeds, thin: each seed; {_curve_edits(results)} held-out edits a point; "
        "from the first evaluation (the end of the identity warm-up, where there is one) to the large marker",
        fontsize=12,
    )
    for axis in axes:
        _label(axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _scale(key: str) -> float:
    return 1.0 if key == "outside_error" else 100.0


def _panel(axis: Any, results: Results, drawn: Mapping[str, Mapping[str, Any]], key: str, label: str) -> None:
    axis.set_xlabel("edit made (% of edits)")
    axis.set_ylabel(label)
    axis.set_xlim(-4, 104)
    axis.grid(color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.ends = []
    for name, own in drawn.items():
        style = {"linewidth": 2.0, **own}
        paths = [curve(record) for record in results[name].values() if curve(record)]
        for path in paths if len(paths) > 1 else []:
            axis.plot(*_xy(path, key), color=style["color"], linewidth=0.7, alpha=0.35)
        x, y = _xy(mean_curve(paths), key)
        axis.plot(x, y, markersize=4.5, **style)
        # The reference lies on top of the ends that it is compared with, and lets them be seen behind it.
        end = {"markersize": 9, "zorder": 4} if name == "full" else {"markersize": 13, "zorder": 3}
        axis.plot(x[-1], y[-1], marker=style["marker"], color=style["color"], markeredgecolor="white", markeredgewidth=1.2, **end)
        axis.ends.append((x[-1], y[-1], _row(results, name), style["color"]))
    for name in ("truth", "copy", "base"):
        if name in results:
            x, y = (float(np.mean(_values(results[name], k))) * _scale(k) for k in ("edit", key))
            axis.plot(x, y, marker="*", color="#444444", markersize=15, markeredgecolor="white", linestyle="none", zorder=5)
            axis.ends.append((x, y, _title(results[name]), "#444444"))


def _xy(path: Sequence[Point], key: str) -> tuple[list[float], list[float]]:
    return [100 * point["edit"] for point in path], [_scale(key) * point[key] for point in path]


def mean_curve(paths: Sequence[Sequence[Point]]) -> list[Point]:
    """Point by point over seeds: evaluations have one place in training each, whatever the number of steps."""
    keys = ("edit", "preserved", "outside_error")
    return [{key: float(np.mean([point[key] for point in points])) for key in keys} for points in zip(*paths, strict=False)]


def _label(axis: Any) -> None:
    """Names beside the frame, those of ends at the left beside these, where no curve passes; each with a line to its end."""
    axis.figure.canvas.draw()
    to_axes = axis.transData + axis.transAxes.inverted()
    ends = sorted(((*to_axes.transform(end[:2]), *end) for end in axis.ends), key=lambda end: -end[1])
    for left, column in ((True, 0.2), (False, 1.05)):
        side = [end for end in ends if (end[0] < 0.3) == left]
        heights = spread_out([end[1] for end in side], min(0.06, 1 / max(1, len(side))))
        for (_, _, x, y, text, colour), height in zip(side, heights, strict=True):
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.7, "shrinkA": 1, "shrinkB": 6, "relpos": (0, 0.5)}
            look = {"color": colour, "va": "center", "fontsize": 10.5, "arrowprops": line}
            axis.annotate(text, (x, y), (column, height), textcoords="axes fraction", **look)


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Falling heights in 0..1 moved as little as it takes for neighbours to be `gap` apart."""
    placed: list[float] = []
    for height in heights:
        placed.append(min(height, placed[-1] - gap) if placed else min(height, 1.0))
    # What was pushed below the frame goes up again, and pushes in turn.
    floor = 0.0
    for index in reversed(range(len(placed))):
        placed[index] = max(placed[index], floor)
        floor = placed[index] + gap
    return placed
