"""Mark tuples for validation: so many sources of each style (or edit direction), whole sources, by their names alone.

    python dataset_tools/hold_out.py data/clips/tuples.jsonl --per-style 4

Run it after clips were discarded: earlier marks are replaced. The trainer holds the marked ones out. A style with no more
sources than that is passed over, and named.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: the repository must be importable, this folder must not
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "dataset_tools"

import argparse
from collections.abc import Sequence

from byg_plugin import _cli

from .video import hold_out


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("tuples", type=_cli.given_path, metavar="FILE", help="JSONL of tuples, changed in place")
    parser.add_argument("--per-style", type=int, default=4, help="sources held out of each meta.source_style (default 4; paper: 4)")
    args = parser.parse_args(arguments)
    if not args.tuples.is_file():
        raise ValueError(f"{args.tuples}: no such file")
    if args.per_style < 0:
        raise ValueError(f"--per-style {args.per_style}: at least 0")
    _cli.say(str(hold_out(args.tuples, args.per_style)))


if __name__ == "__main__":
    _cli.run(main)
