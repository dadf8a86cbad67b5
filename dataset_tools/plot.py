"""A picture of a tuples file: edit types beside what was aimed at, and lengths of the four texts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from byg_plugin.config.extras import require
from byg_plugin.data.rules import ROLES
from byg_plugin.journal import read_records, replacing

from . import backend_rules
from .balance import PRIORITY


def plot_summary(tuples: Path) -> Path:
    """Draw `<stem>.summary.png` beside the file, which has at least one record.

    Raises:
        ValueError: matplotlib is missing, a line is no JSON, or it cannot be written.
    """
    require("matplotlib", "the summary's picture", "data")
    from matplotlib.figure import Figure

    types: Counter[str] = Counter()
    lengths: dict[str, Counter[int]] = {role: Counter() for role in ROLES}
    for record in read_records(tuples):
        types[str(record.get("edit_type", "(none)"))] += 1
        for role in ROLES:
            lengths[role][len(str(record.get(role, "")).split())] += 1
    total = sum(types.values())
    by_priority = set(types) <= set(PRIORITY) and not set(types) <= set(backend_rules.TYPES)
    if by_priority:
        types.update(dict.fromkeys(PRIORITY, 0))  # those that were never used too
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [name for name, _ in types.most_common()][::-1]
    left.barh(names, [types[name] for name in names], color="tab:blue")
    if by_priority:
        aimed = [total * PRIORITY[name] / sum(PRIORITY.values()) for name in names]
        left.plot(aimed, names, "k|", markersize=14, label="proportional to priority")
        left.legend()
    left.set_title(f"{total} tuples by edit type")
    longest = max(max(counts) for counts in lengths.values())
    for role, counts in lengths.items():
        right.stairs([counts[words] for words in range(longest + 1)], [words - 0.5 for words in range(longest + 2)], label=role, alpha=0.8)
    right.set_title("length of the texts")
    right.set_xlabel("words")
    right.set_ylabel("tuples")
    right.legend()
    path = tuples.with_name(f"{tuples.stem}.summary.png")
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")
    return path
