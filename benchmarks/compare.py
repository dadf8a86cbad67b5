"""Editors of the tiny world against one of them, edit by edit: `python -m benchmarks.compare NAME=LORA NAME=LORA ... [--edits 576]`.

Every editor makes the same held-out edits from the same noise, so that a difference is known better than two shares are: its standard
error is that of the mean of the edits' own differences to the first editor. `preserved_where_both` is the comparison at equal edit rate:
sources kept among the edits that both have made. Two minutes of one core an editor.

The files are what the study leaves in `--work`: `report/NAME-SEED/editor-ema.safetensors`, the weights that its tables are made with.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import tiny_world_run as runs
from benchmarks.editors import Editors, named_loras
from benchmarks.provenance import commit
from byg_plugin.demo import metrics, world

SHARES = ("joint", "edit", "preserved", "pebble")
WHERE_BOTH = "preserved_where_both"


def difference(of: Sequence[metrics.Score], to: Sequence[metrics.Score]) -> dict[str, dict[str, float | None]]:
    """Mean difference of two editors' verdicts on the same edits, with its standard error and the number of edits it is a mean of.

    A pebble that is not wholly visible has no verdict and is left out; so is, for `preserved_where_both`, an edit that one did not make.
    None: there are no edits, or for the error no two.
    """
    pairs = [(asdict(one), asdict(other)) for one, other in zip(of, to, strict=True)]
    both = [pair for pair in pairs if pair[0]["edit"] and pair[1]["edit"]]
    found = {name: _mean([(one[name], other[name]) for one, other in pairs]) for name in SHARES}
    return found | {WHERE_BOTH: _mean([(one["preserved"], other["preserved"]) for one, other in both])}


def _mean(pairs: Sequence[tuple[bool | None, bool | None]]) -> dict[str, float | None]:
    known = np.array([float(one) - float(other) for one, other in pairs if one is not None and other is not None])
    some, several = len(known) > 0, len(known) > 1
    error = float(known.std(ddof=1)) / len(known) ** 0.5 if several else None
    return {"mean": float(known.mean()) if some else None, "error": error, "edits": float(len(known))}


def shares(scores: Sequence[metrics.Score]) -> dict[str, float]:
    """Of one editor."""
    rows = [asdict(score) for score in scores]
    return {name: float(np.mean([row[name] for row in rows if row[name] is not None])) for name in SHARES}


def by_type(edits: Sequence[world.Edit], scores: Sequence[metrics.Score]) -> dict[str, list[metrics.Score]]:
    """The scores of each type of edit, and of all."""
    kinds = sorted({edit.edit_type for edit in edits})
    return {kind: [score for edit, score in zip(edits, scores, strict=True) if kind in (edit.edit_type, "all")] for kind in [*kinds, "all"]}


def table(record: Mapping[str, Any]) -> str:
    """Percentages of the first editor, then points by which the others differ from it."""
    names = [*SHARES, WHERE_BOTH]
    lines = ["| editor | edits | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * (2 + len(names)) + "|"]
    for editor, rows in record["editors"].items():
        for kind, row in rows.items():
            points = row.get("difference")
            cells = [f"{100 * row['shares'][name]:.1f}" if name in row["shares"] else "" for name in names]
            if points:
                told = [_points(points[name]) for name in names]
                cells = [f"{cell} ({change})" if cell else change for cell, change in zip(cells, told, strict=True)]
            lines.append(f"| {editor} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _points(known: Mapping[str, float | None]) -> str:
    mean, error = (
        f"{100 * value:{sign}.1f}" if (value := known[name]) is not None else "?" for name, sign in (("mean", "+"), ("error", ""))
    )
    return f"{mean} ± {error}"


def compared(editors: Editors, loras: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """By editor and type of edit: `shares`, and of all but the first the `difference` to it."""
    found: dict[str, dict[str, Any]] = {}
    first: dict[str, list[metrics.Score]] = {}
    for name, lora in loras.items():
        images = editors.evaluator.decoded(editors.latents(lora))
        scores = by_type(editors.edits, [metrics.score(images[edit.id], edit) for edit in editors.edits])
        found[name] = {kind: {"shares": shares(some)} for kind, some in scores.items()}
        for kind, some in scores.items() if first else ():
            found[name][kind]["difference"] = difference(some, first[kind])
        first = first or scores
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("loras", nargs="+", metavar="NAME=FILE", help="the first is what the others are compared with")
    parser.add_argument("--edits", type=int, default=576, help="of the report split, half of them objects; the study has the first 192")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args(arguments)
    if options.edits < 2:
        parser.error(f"--edits {options.edits}: at least 2, one of each type")
    loras = named_loras(parser, options.loras)
    made_by, modified = commit("benchmarks/compare.py", "byg_plugin")
    editors = Editors(runs.eval_edits(options.edits, 2, "report", world.DEFAULT_TYPES))
    record = {
        "commit": made_by,
        "modified": modified,
        "torch": torch.__version__,
        "edits": len(editors.edits),
        "editors": compared(editors, loras),
    }
    print(table(record), end="\n\n")
    if options.out:
        runs.write_json(options.out, record)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
