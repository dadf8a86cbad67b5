"""Figures of many scores: means with their standard errors, and how two runs differ on the same items."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from byg_plugin.evaluation.scores import Row

ALL = "all"
UNTYPED = "(no type)"
_RESAMPLES = 9999
ROOTS = {"vie_root_of_means": ("vie_semantic", "vie_quality")}
"""Columns of tables alone: the square root of the product of two columns' means, which is no mean of the items' roots."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Of n values; `sem` is the sample standard deviation over sqrt(n), None of a single one."""

    n: int
    mean: float
    sem: float | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean over n items of (this run - the other), with its 95 % bootstrap interval."""

    n: int
    mean: float
    low: float
    high: float


Table = dict[str, dict[str, Mean]]
"""By edit type, "all" last, then by column."""


def mean_of(values: Sequence[float]) -> Mean:
    """Of one value or more."""
    spread = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return Mean(n=len(values), mean=float(np.mean(values)), sem=spread)


def by_type(rows: Sequence[Row]) -> Table:
    """Means of every column over each edit type and over all rows; columns without a value are left out."""
    kinds = sorted({name_of(row.edit_type) for row in rows})
    groups = {kind: {row.id for row in rows if name_of(row.edit_type) == kind} for kind in kinds if kinds != [UNTYPED]}
    return by_group(rows, groups)


def name_of(edit_type: str | None) -> str:
    """Of a type's row, which is never the name of the row of all."""
    return f"{edit_type} (type)" if edit_type == ALL else edit_type or UNTYPED


def by_group(
    rows: Sequence[Row], groups: Mapping[str, Collection[str]], means: Mapping[str, Sequence[Collection[str]]] | None = None
) -> Table:
    """Means of every column over each group of ids, then over all rows; columns without a value are left out.

    Args:
        rows: of different ids.
        groups: ids by name.
        means: rows of the table that are means of groups' means, each group counting alike; `n` is how many groups have a value.
    """
    table = {name: _means([row for row in rows if row.id in ids]) for name, ids in groups.items()}
    for name, parts in (means or {}).items():
        found = [_means([row for row in rows if row.id in ids]) for ids in parts]
        columns = dict.fromkeys(column for one in found for column in one if column not in ROOTS)
        values = {column: [one[column].mean for one in found if column in one] for column in columns}
        table[name] = _with_roots({column: Mean(n=len(known), mean=float(np.mean(known)), sem=None) for column, known in values.items()})
    return table | {ALL: _means(rows)}


def _means(rows: Sequence[Row]) -> dict[str, Mean]:
    columns = dict.fromkeys(column for row in rows for column in row.scores)
    values = {column: _values(rows, column) for column in columns}
    return _with_roots({column: mean_of(known) for column, known in values.items() if known})


def _with_roots(means: dict[str, Mean]) -> dict[str, Mean]:
    for column, (one, other) in ROOTS.items():
        if one in means and other in means:
            root = (means[one].mean * means[other].mean) ** 0.5
            means[column] = Mean(n=min(means[one].n, means[other].n), mean=root, sem=None)
    return means


def differences(rows: Sequence[Row], others: Sequence[Row], seed: int = 0) -> dict[str, Difference]:
    """How this run's scores differ from another's, item by item, in every column that both have.

    The interval resamples items, not scores: both runs keep their pairs (percentiles of 9,999 means).

    Raises:
        ValueError: the runs have no item and column in common.
    """
    known = {row.id: row for row in others}
    pairs = [(row, known[row.id]) for row in rows if row.id in known]
    found = {}
    for column in dict.fromkeys(column for row in rows for column in row.scores):
        change = [
            one - other
            for row, another in pairs
            if (one := row.scores.get(column)) is not None and (other := another.scores.get(column)) is not None
        ]
        if change:
            low, high = interval(np.array(change), seed)
            found[column] = Difference(n=len(change), mean=float(np.mean(change)), low=low, high=high)
    if not found:
        raise ValueError("the two runs have no item scored by one metric in common: score both on the same tuples")
    return found


def by_run(runs: Mapping[str, Sequence[Row]]) -> Table:
    """Means of every column over the items that all runs have scored in it, a row a run; columns without such an item are left out."""
    scores = {name: {(row.id, column): value for row in rows for column, value in row.scores.items()} for name, rows in runs.items()}
    every = [key for key in next(iter(scores.values())) if all(known.get(key) is not None for known in scores.values())]
    columns: dict[str, list[tuple[str, str]]] = {}
    for key in every:
        columns.setdefault(key[1], []).append(key)
    return {
        name: {column: mean_of([value for key in keys if (value := known[key]) is not None]) for column, keys in columns.items()}
        for name, known in scores.items()
    }


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of (n,) values; of a single one, or of equal ones, that value twice."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(np.mean(values)), float(np.mean(values))
    from scipy.stats import bootstrap

    found = bootstrap((values,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(seed), batch=100)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def markdown(table: Table) -> str:
    """A row an edit type, a column a score: mean +- SEM."""
    return _markdown("edit type", list(table[ALL]), table)


def markdown_runs(table: Table) -> str:
    """A row a run, a column a score, over the same items."""
    return _markdown("run, same items", list(next(iter(table.values()))), table)


def _markdown(head: str, columns: Sequence[str], table: Table) -> str:
    lines = [f"| {head} | n | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for kind, means in table.items():
        most = max((mean.n for mean in means.values()), default=0)
        cells = [_cell(means.get(column), most) for column in columns]
        lines.append(f"| {kind} | {most} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def markdown_differences(other: str, found: Mapping[str, Difference]) -> str:
    """A row a score; `other` names the other run."""
    lines = [f"| this run - {other} | n | difference | 95 % interval |", "|---|---|---|---|"]
    lines += [f"| {column} | {one.n} | {one.mean:+.4g} | {one.low:+.4g} to {one.high:+.4g} |" for column, one in found.items()]
    return "\n".join(lines) + "\n"


def _cell(mean: Mean | None, most: int) -> str:
    """Of fewer values than the row's it says how many."""
    if mean is None:
        return "-"
    return f"{mean.mean:.4g}" + ("" if mean.sem is None else f" +- {mean.sem:.2g}") + ("" if mean.n == most else f" (n={mean.n})")


def _values(rows: Sequence[Row], column: str) -> list[float]:
    return [value for row in rows if (value := row.scores.get(column)) is not None]
