"""Score edits: tables, plots and a page.

    python byg_plugin/evaluate.py --edits edits --metrics clip dino error ssim --out scores
    python byg_plugin/evaluate.py --edits edits_2 --metrics clip dino error ssim --out scores_2 --compare scores [scores_3 ...]

What is judged: `--edits`, a folder of edit.py's or its edits.jsonl; or `--tuples` with the folder `--results` of edits named by their
tuples' ids; or `--sources` and `--results`, two folders with files of the same names. Ground truths are the tuples' targets, or
`--references`; `--masks` are images whose light part may change. `--out` gets scores.jsonl (what is scored stays scored; the rest goes
on after a kill), summary.json and summary.md (mean +- standard error by edit type), scores.png and report.html. Metrics:
byg_plugin/evaluation/metrics, a file each. No model is downloaded: what is missing is told with the line that fetches it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from byg_plugin import _cli
from byg_plugin.config.extras import require
from byg_plugin.evaluation import frames
from byg_plugin.evaluation.items import Item, from_folders, from_manifest, from_tuples, missing_files, refuse, with_files
from byg_plugin.evaluation.metrics import METRICS, Options, classes
from byg_plugin.evaluation.metrics.base import missing_texts
from byg_plugin.folders import make_writable, write_text
from byg_plugin.progress import Progress

if TYPE_CHECKING:
    from byg_plugin.evaluation.scores import Row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    path = {"type": _cli.given_path}
    parser.add_argument("--edits", **path, metavar="DIR", help="folder of edit.py's results, or its edits.jsonl")
    parser.add_argument("--tuples", **path, metavar="FILE", help="JSONL of tuples; with --edits, for its targets")
    parser.add_argument("--sources", **path, metavar="DIR", help="folder of sources")
    parser.add_argument("--results", **path, metavar="DIR", help="folder of edits")
    parser.add_argument("--references", **path, metavar="DIR", help="folder of exact edits, named by id or as the edits")
    parser.add_argument("--masks", **path, metavar="DIR", help="folder of images, light where the edit may change, named alike")
    without_model = ["error", "psnr", "flicker"]
    parser.add_argument("--metrics", nargs="+", choices=[*METRICS], default=without_model, help=f"default: {' '.join(without_model)}")
    parser.add_argument("--out", **path, default=Path("scores"), metavar="DIR", help="folder of the results (default: scores)")
    parser.add_argument("--compare", **path, nargs="+", metavar="DIR", help="--out of other runs or methods, scored on the same items")
    parser.add_argument("--sort-by", type=_cli.not_empty, metavar="COLUMN", help="whose worst come first on the page (default: the first)")
    parser.add_argument("--clip", type=_cli.not_empty, default=Options.clip, help=f"folder or hub id (default: {Options.clip})")
    parser.add_argument("--dino", type=_cli.not_empty, default=Options.dino, help=f"folder or hub id (default: {Options.dino})")
    parser.add_argument("--lpips-net", choices=["alex", "vgg", "squeeze"], default=Options.lpips_net, help="default: alex")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the models (default: cpu)")
    return parser


def items_of(args: argparse.Namespace) -> list[Item]:
    """What the command line asks to judge.

    Raises:
        ValueError: nothing, too much, or something missing.
    """
    ways = {
        ("edits",): lambda: from_manifest(args.edits),
        ("edits", "tuples"): lambda: from_manifest(args.edits, args.tuples),
        ("tuples", "results"): lambda: from_tuples(args.tuples, args.results),
        ("sources", "results"): lambda: from_folders(args.sources, args.results),
    }
    given = tuple(name for name in ("edits", "tuples", "sources", "results") if getattr(args, name) is not None)
    if given not in ways:
        raise ValueError("give --edits DIR, or --tuples FILE --results DIR, or --sources DIR --results DIR")
    items = ways[given]()
    for option, role in (("references", "reference"), ("masks", "mask")):
        if getattr(args, option) is not None:
            items = with_files(items, getattr(args, option), role)
    return items


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    args = _parser().parse_args(arguments)
    items = items_of(args)
    refuse(missing_files(items), "files")
    require("matplotlib", "the plots", "eval")
    if args.compare is not None:
        require("scipy", "--compare", "eval")
    try:
        make_writable(args.out)
    except OSError as error:
        raise ValueError(f"--out {args.out} is not writable: {error.strerror}; choose another folder") from error
    made = classes(args.metrics)
    refuse([problem for item in items for name, one in made.items() for problem in missing_texts(name, one.texts, item)], "--metrics")
    refuse([problem for item in items for problem in frames.problems(item)], "the edits")
    columns = {column: more for one in made.values() for column, more in one.columns.items()}
    if args.sort_by is not None and args.sort_by not in columns:
        raise ValueError(f"--sort-by {args.sort_by}: not a column of these metrics, which are {', '.join(columns)}")
    if args.compare is not None:
        _others(args)  # what is wrong with them is told before the work
    _evaluate(args, items, columns)


def _evaluate(args: argparse.Namespace, items: Sequence[Item], columns: dict[str, bool]) -> None:
    from byg_plugin.evaluation import page, plots, scores, statistics

    metrics = {name: one(_options(args)) for name, one in classes(args.metrics).items()}
    with Progress(total=len(items), desc="score", unit="edit") as bar:
        rows, looked_at = scores.score(items, metrics, args.out, lambda: bar.update(1))
    table = statistics.by_type(rows)
    if not table[statistics.ALL]:
        raise ValueError("no metric is defined for any of these edits: give --masks, --references or other --metrics")
    summary = {kind: {column: asdict(mean) for column, mean in means.items()} for kind, means in table.items()}
    said = statistics.markdown(table)
    _json(args.out / "summary.json", summary)
    plots.plot_table(table, args.out / "scores.png")
    if args.compare is not None:
        others = _others(args)
        found = {name: statistics.differences(rows, other) for name, other in others.items()}
        _json(args.out / "comparison.json", {name: {column: asdict(one) for column, one in each.items()} for name, each in found.items()})
        plots.plot_differences(found, args.out / "comparison.png")
        said += "\n" + statistics.markdown_runs(statistics.by_run({_named(args.out): rows, **others}))
        said += "".join("\n" + statistics.markdown_differences(name, each) for name, each in found.items())
    write_text(args.out / "summary.md", said)
    sort_by = args.sort_by or next(iter(table[statistics.ALL]))
    page.write_page(args.out / "report.html", f"{len(items)} edits", items, rows, sort_by, columns[sort_by])
    print(f"{said}\n{len(items)} edits, {looked_at} of them scored now; look at {args.out / 'report.html'}")


def _others(args: argparse.Namespace) -> dict[str, list[Row]]:
    """The rows of the runs to compare with, by their folders' names."""
    from byg_plugin.evaluation.scores import read

    names = [_named(path) for path in (args.out, *args.compare)]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"--compare: {twice[0]} is the name of two runs' folders, which name the table's rows: rename one")
    return dict(zip(names[1:], map(read, args.compare), strict=True))


def _named(folder: Path) -> str:
    return folder.resolve().name


def _options(args: argparse.Namespace) -> Options:
    return Options(clip=args.clip, dino=args.dino, lpips_net=args.lpips_net, device=args.device)


def _json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    _cli.run(main)
