"""PNG plots of scores. matplotlib is an extra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from byg_plugin.evaluation.statistics import Difference, Table
from byg_plugin.journal import replacing

_ACROSS = 3


def plot_table(table: Table, path: Path) -> None:
    """Every column's means by edit type, with their standard errors, a panel each.

    Raises:
        ValueError: it cannot be written.
    """
    columns = list(dict.fromkeys(column for means in table.values() for column in means))
    rows = -(-len(columns) // _ACROSS)
    figure = _figure(width=11, height=max(3.0, 1.2 + 0.3 * len(table)) * rows)
    panels = figure.subplots(rows, _ACROSS, squeeze=False).flat
    for panel, column in zip(panels, [*columns, *[""] * (rows * _ACROSS - len(columns))], strict=True):
        kinds = [kind for kind in table if column in table[kind]][::-1]
        panel.set_visible(bool(kinds))
        means = [table[kind][column] for kind in kinds]
        panel.barh(kinds, [mean.mean for mean in means], xerr=[mean.sem or 0 for mean in means], color="tab:blue", capsize=2)
        panel.set_title(column)
    _save(figure, path)


def plot_differences(found: Mapping[str, Mapping[str, Difference]], path: Path) -> None:
    """Each column's differences from each other run with their intervals, a panel a column: their units differ.

    Raises:
        ValueError: it cannot be written.
    """
    columns = list(dict.fromkeys(column for each in found.values() for column in each))
    figure = _figure(width=8, height=0.6 + (0.7 + 0.3 * len(found)) * len(columns))
    for panel, column in zip(figure.subplots(len(columns), 1, squeeze=False).flat, columns, strict=True):
        panel.axvline(0, color="grey", linewidth=0.8)
        known = {name: each[column] for name, each in found.items() if column in each}
        for row, one in enumerate(known.values()):
            panel.errorbar([one.mean], [row], xerr=[[one.mean - one.low], [one.high - one.mean]], fmt="o", capsize=3)
        panel.set_yticks(range(len(known)), list(known))
        panel.set_title(column)
    figure.suptitle("this run - the other, 95 % intervals")
    _save(figure, path)


def _figure(*, width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")
