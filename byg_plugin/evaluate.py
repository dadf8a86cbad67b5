"""Score edits: tables, plots and a page.

    python byg_plugin/evaluate.py --edits edits --metrics clip dino error ssim --out scores
    python byg_plugin/evaluate.py --edits edits_2 --metrics clip dino error ssim --out scores_2 --compare scores [scores_3 ...]
    python byg_plugin/evaluate.py --benchmark gedit --data gedit --out scores        # tuples.jsonl, for edit.py

What is judged: `--edits`, a folder of edit.py's or its edits.jsonl; or `--tuples` with the folder `--results` of edits named by their
tuples' ids; or `--sources` and `--results`, two folders with files of the same names. Ground truths are the tuples' targets, or
`--references`; `--masks` are images whose light part may change. `--out` gets scores.jsonl (what is scored stays scored; the rest goes
on after a kill), summary.json and summary.md (mean +- standard error by edit type), scores.png and report.html. Metrics:
byg_plugin/evaluation/metrics, a file each. No model is downloaded: what is missing is told with the line that fetches it.

`--benchmark` names a published set of tasks (byg_plugin/evaluation/benchmarks, a file each): without edits the command writes what
edit.py is to edit, with them it scores them by the benchmark's groups.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from byg_plugin import _cli
from byg_plugin.config.extras import require
from byg_plugin.evaluation import benchmarks, frames
from byg_plugin.evaluation.benchmarks.base import Benchmark
from byg_plugin.evaluation.items import Item, items_of, missing_files, refuse
from byg_plugin.evaluation.metrics import METRICS, READ_BY, Options, classes
from byg_plugin.evaluation.metrics.base import check_device, missing_texts
from byg_plugin.folders import make_writable, write_text
from byg_plugin.progress import Progress

if TYPE_CHECKING:
    from byg_plugin.evaluation.scores import Row

_WITHOUT_MODEL = ("error", "psnr", "flicker")
_TO_WRITE = ("benchmark", "data", "captions", "out")  # what a benchmark's tuples are made of


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    path = {"type": _cli.given_path}
    parser.add_argument("--edits", **path, metavar="DIR", help="folder of edit.py's results, or its edits.jsonl")
    parser.add_argument("--tuples", **path, metavar="FILE", help="JSONL of tuples; with --edits, for its targets")
    parser.add_argument("--sources", **path, metavar="DIR", help="folder of sources")
    parser.add_argument("--results", **path, metavar="DIR", help="folder of edits")
    parser.add_argument("--references", **path, metavar="DIR", help="folder of exact edits, named by id or as the edits")
    parser.add_argument("--masks", **path, metavar="DIR", help="folder of images, light where the edit may change, named alike")
    parser.add_argument("--benchmark", choices=benchmarks.NAMES, help="score by the groups of this one; without edits: write its tuples")
    parser.add_argument("--data", **path, metavar="DIR", help="folder of the benchmark's data")
    parser.add_argument("--captions", **path, metavar="FILE", help="JSONL of id, src_caption, tgt_caption, for a benchmark that has none")
    parser.add_argument("--metrics", nargs="+", choices=[*METRICS], help=f"default: {' '.join(_WITHOUT_MODEL)}")
    parser.add_argument("--out", **path, default=Path("scores"), metavar="DIR", help="folder of the results (default: scores)")
    parser.add_argument("--compare", **path, nargs="+", metavar="DIR", help="--out of other runs or methods, scored on the same items")
    parser.add_argument("--sort-by", type=_cli.not_empty, metavar="COLUMN", help="whose worst come first on the page (default: the first)")
    parser.add_argument("--clip", type=_cli.not_empty, help=f"folder or hub id (default: {Options.clip})")
    parser.add_argument("--dino", type=_cli.not_empty, help=f"folder or hub id (default: {Options.dino})")
    parser.add_argument("--lpips-net", choices=["alex", "vgg", "squeeze"], help="default: alex")
    parser.add_argument("--aesthetic", **path, metavar="FILE", help="of aesthetic: LAION's linear head, .safetensors")
    parser.add_argument("--cotracker", **path, metavar="FILE", help="of motion: CoTracker3's offline weights, .safetensors (CC-BY-NC)")
    parser.add_argument("--judged", **path, nargs="+", metavar="FILE", help="of viescore, imgedit: judge.py's files")
    parser.add_argument("--vie-reading", choices=["official", "paper"], help="of viescore (default: official)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="of the models (default: cpu)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    args = _parser().parse_args(arguments)
    _check_options(args)
    if args.device is not None:
        check_device(args.device, f"--device {args.device}", "give --device cpu")
    benchmark = _benchmark(args)
    if benchmark is not None and args.edits is None and args.results is None:
        return
    items = items_of(vars(args))
    items = items if benchmark is None else benchmark.items(items)
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
    _evaluate(args, items, columns, benchmark)


def _check_options(args: argparse.Namespace) -> None:
    """Refuse what is given and nothing would read; then the default metrics stand where none are given."""
    given = [name for name, value in vars(args).items() if value is not None]
    if args.benchmark is None and (args.data is not None or args.captions is not None):
        raise ValueError("--data and --captions are a benchmark's: give --benchmark, or leave them out")
    if args.benchmark is not None:
        _refuse_options("--benchmark has its own sources and tuples, and no references", given, ("sources", "tuples", "references"))
        if args.edits is None and args.results is None:
            unread = [name for name in given if name not in _TO_WRITE]
            _refuse_options(f"--benchmark {args.benchmark} without --edits or --results writes tuples and scores nothing", given, unread)
    args.metrics = args.metrics or [*_WITHOUT_MODEL]
    for name in given:
        if name in READ_BY and not {*READ_BY[name]} & {*args.metrics}:
            raise ValueError(f"{_cli.option(name)} is read by --metrics {', '.join(READ_BY[name])} alone: add one, or leave it out")


def _refuse_options(why: str, given: Sequence[str], refused: Collection[str]) -> None:
    if foreign := [_cli.option(name) for name in given if name in refused]:
        raise ValueError(f"{why}: leave {', '.join(foreign)} out")


def _benchmark(args: argparse.Namespace) -> Benchmark | None:
    """What `--benchmark` names, with its tuples written; edits of other tools (`--results`) are named by their ids."""
    if args.benchmark is None:
        return None
    benchmark = benchmarks.read(args.benchmark, args.data, args.captions)
    tuples = benchmark.write(args.out)
    if args.results is not None:
        args.tuples = tuples
    elif args.edits is None:
        counted = f"{len(benchmark.tasks)} tasks of {args.benchmark} (published: {benchmark.published}): {tuples}"
        print(f"{counted}\nnow: python byg_plugin/edit.py ... --tuples {tuples} --out EDITS, then this command with --edits EDITS")
    return benchmark


def _evaluate(args: argparse.Namespace, items: Sequence[Item], columns: dict[str, bool], benchmark: Benchmark | None) -> None:
    from byg_plugin.evaluation import page, plots, scores, statistics
    from byg_plugin.evaluation.metrics.answers import JudgedMetric

    metrics = {name: one(_options(args)) for name, one in classes(args.metrics).items()}
    judged = {name: metric for name, metric in metrics.items() if isinstance(metric, JudgedMetric)}
    refuse([problem for metric in judged.values() for problem in metric.judged.lacking(items)], "--judged")
    unsaid = {folder: names for folder in args.compare or () if (names := scores.same_settings(items, metrics, folder))}
    with Progress(total=len(items), desc="score", unit="edit") as bar:
        rows, looked_at = scores.score(items, metrics, args.out, lambda: bar.update(1))
    table = statistics.by_type(rows) if benchmark is None else statistics.by_group(rows, benchmark.groups(), benchmark.means)
    if not table[statistics.ALL]:
        raise ValueError("no metric is defined for any of these edits: give --masks, --references or other --metrics")
    summary = {kind: {column: asdict(mean) for column, mean in means.items()} for kind, means in table.items()}
    said = statistics.markdown(table) + "".join(f"\nwarning: {one}\n" for metric in judged.values() for one in metric.sameness(items))
    if unsaid:
        listed = "; ".join(f"{_named(folder)}: {', '.join(names)}" for folder, names in unsaid.items())
        said += f"\nwarning: --compare: scores that do not say their settings are taken as made with this run's ({listed})\n"
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
    given = {field.name: value for field in fields(Options) if (value := getattr(args, field.name)) is not None}
    return Options(**given | {"judged": tuple(args.judged or ())})


def _json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    _cli.run(main)
