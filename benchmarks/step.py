"""What one unpaired step costs over one paired step: seconds, FLOPs and peak memory, phase by phase.

    python -m benchmarks.step --out benchmarks/results/step_cpu.json          on a quiet machine, else --clock process --threads 1
    python -m benchmarks.step --shape demo                                     the demo's own network and batch
    python -m benchmarks.step --shape wan-high --out benchmarks/results/step_wan_high.json    either expert of a two-expert Wan: wan-low
    python -m benchmarks.step --shape flux.1-dev --device cuda --repeats 3 --out benchmarks/results/step_cuda.json
    python -m benchmarks.step --shape flux.1-dev --device meta --out benchmarks/results/step_flux_flops.json    FLOPs alone, no weights
    python -m benchmarks.step --shape wan2.2-t2v-a14b --device meta --out benchmarks/results/step_wan_flops.json
    python -m benchmarks.step --table benchmarks/results/step_cpu.json        the tables, from the results alone
    python -m benchmarks.step --peer                                           a paired step beside musubi-tuner's (checkout: MUSUBI_TUNER)
    python -m benchmarks.step --bar                                            few figures in 4 minutes, a line of JSON last
    python -m benchmarks.step --write-docs                                    the documents' tables, from benchmarks/results

Run it from the repository's root. Network, batch and machine are the same for every row; weights are random. The rows of a
repetition are timed one after another, with paired steps between them, and a row's ratio is taken over the paired steps of the
same repetition: a machine that slows down slows both sides. The optimizer's and the EMA's update are timed apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import step_bar as bar
from benchmarks import step_peer as peer
from benchmarks import step_report as report
from benchmarks import step_results as results_file
from benchmarks.provenance import ROOT
from benchmarks.step_shapes import SHAPES, shape_named
from byg_plugin import _cli

PEER_SHAPES = ("cpu", "tiny")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--device", choices=("cpu", "cuda", "meta"), default="cpu", help="meta counts FLOPs and measures nothing")
    parser.add_argument("--repeats", type=int, default=7, help="times each row is timed")
    parser.add_argument(
        "--clock", choices=("wall", "process"), default="wall", help="process = CPU time, for a machine with other work; with --threads 1"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own")
    parser.add_argument("--out", type=Path, help="results file to write")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--table", type=Path, help="print the tables of a results file and measure nothing")
    instead.add_argument("--peer", action="store_true", help="the paired step beside musubi-tuner's, whose checkout MUSUBI_TUNER names")
    instead.add_argument(
        "--bar",
        action="store_true",
        help="the preset, the defaults and peak memory over the paired step, and the peer where MUSUBI_TUNER is set: JSON in the last line",
    )
    instead.add_argument(
        "--write-docs",
        action="store_true",
        help="put the tables of the committed results into docs/step_cost.md and measure nothing",
    )
    return parser


_OF_MEASURING = ("shape", "device", "repeats", "clock", "threads", "out")


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message where options cannot be honoured, before anything is measured."""
    if options.table or options.write_docs:
        try:
            _cli.refuse_unused(parser, options, "--table" if options.table else "--write-docs", *_OF_MEASURING)
        except ValueError as error:
            parser.error(str(error))
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads {options.threads}: at least 1, or leave it out for PyTorch's own choice")
    if options.clock == "process" and (options.device != "cpu" or options.threads != 1):
        parser.error("--clock process counts the time in which threads wait for each other: give --device cpu and --threads 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here; leave --device out")
    if options.out and options.out.is_dir():
        parser.error(f"--out {options.out}: a folder; name the file, e.g. {options.out / 'step.json'}")
    if (options.peer or options.bar) and (options.device != "cpu" or options.out):
        parser.error(f"{'--peer' if options.peer else '--bar'} measures on the CPU and prints: leave --device and --out out")
    if options.peer and options.shape not in PEER_SHAPES:
        parser.error(f"--peer compares float32 FLUX with musubi-tuner's own LoRA targets: --shape {' or '.join(PEER_SHAPES)}")
    if options.bar and (options.shape, options.repeats) != (parser.get_default("shape"), parser.get_default("repeats")):
        parser.error("--bar has its own shapes and repeats until its time is over: leave --shape and --repeats out")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    try:
        if options.write_docs:
            report.write_documents(ROOT, ROOT / "benchmarks/results")
            return
        if options.table:
            print(report.tables(report.read(options.table)))
            return
        checkout = peer.checkout() if options.peer or options.bar else None
    except ValueError as error:
        asked = next(name for name in ("table", "peer", "bar", "write_docs") if getattr(options, name))
        parser.error(f"--{asked.replace('_', '-')}: {error}")
    if options.peer and checkout is None:
        parser.error(f"--peer: set {peer.VARIABLE} to the folder of a musubi-tuner checkout")
    _measure_as_asked(options, checkout)


def _measure_as_asked(options: argparse.Namespace, checkout: Path | None) -> None:
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.bar:
        print(bar.as_line(bar.bar(options.shape, bar.WAN, checkout, options.clock)))
        return
    if options.peer:
        assert checkout is not None
        print(peer.table(peer.compare(shape_named(options.shape), checkout, options.repeats, options.clock)))
        return
    if options.device == "meta":
        results = results_file.count(options.shape)
    else:
        results = results_file.measure(options.shape, torch.device(options.device), options.repeats, options.clock)
    if options.out:
        options.out.write_text(report.as_json(results), encoding="utf-8")
    print(report.tables(results))


if __name__ == "__main__":
    _cli.run(main)
