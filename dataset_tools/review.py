"""Look through edit tuples in the browser: keep, fix or discard.

    python dataset_tools/review.py data/tuples.jsonl
    python dataset_tools/review.py data/tuples.jsonl --export data/reviewed.jsonl

The first serves the page to this machine's browsers. Each decision and each edited text is on disk before the page says
"saved", in FILE.review.jsonl beside the tuples file, which itself is never changed: closing the page, Ctrl-C or a crash of
either side loses nothing, and the next start goes on. The second writes the tuples that are kept or fixed, at any time.

The page serves only images and clips that a tuple names and that lie, links followed, under --root. It has no password:
whoever can reach it can read and decide. On another machine, keep it on loopback and use a tunnel:
ssh -L 7860:127.0.0.1:7860 machine
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: the repository must be importable, this folder must not
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "dataset_tools"

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from byg_plugin import _cli
from byg_plugin.config.extras import require

if TYPE_CHECKING:
    from .review_page.store import Review

_PORT = 7860


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("tuples", type=_cli.given_path, metavar="FILE", help="JSONL file of tuples")
    parser.add_argument("--root", type=_cli.given_path, metavar="DIR", help="folder of the images and clips; default: the file's folder")
    parser.add_argument("--export", type=_cli.given_path, metavar="OUT", help="write the kept and fixed tuples to OUT, serve nothing")
    parser.add_argument(
        "--rules",
        choices=("error", "warn"),
        help="with --export: warn = also write tuples whose texts break a rule, to train on with dataset.rules (default error)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=_PORT, help=f"default {_PORT}; 0: any free one")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="with --host: a name that browsers call it by; repeatable"
    )
    args = parser.parse_args(arguments)
    for package in ("filelock", "starlette", "uvicorn"):
        require(package, "the review page", "review")
    if args.rules is not None and args.export is None:
        raise ValueError(f"--rules {args.rules}: is of --export, the page shows all tuples; leave it out")
    root = args.root if args.root is not None else args.tuples.parent
    if not root.is_dir():
        raise ValueError(f"--root {root}: no such folder")
    if args.export is not None:
        _cli.refuse_unused(parser, args, "--export", "host", "port", "allow_host")
        _export(args.tuples, args.export, root, args.rules or "error")
    else:
        _serve(args.tuples, root, args.host, args.port, args.allow_host)


def _export(tuples: Path, target: Path, root: Path, rules: Literal["error", "warn"]) -> None:
    from .review_page.export import export_reviewed

    counts = export_reviewed(tuples, target, root, rules=rules)
    _cli.say(f"{target}: {counts['kept'] + counts['fixed']} tuples ({_counted(counts)})")
    if target.parent.resolve() != root.resolve():
        _cli.say(f'where sources are relative paths, train with dataset.image_root = "{root}"')
    if counts["open"]:
        _cli.say(f"not in it: {counts['open']} that nobody has decided on yet")


def _serve(tuples: Path, root: Path, host: str, port: int, names: Sequence[str]) -> None:
    from byg_plugin.local_page import serving
    from byg_plugin.local_page.guard import LOOPBACK_NAMES

    from .review_page.app import make_app
    from .review_page.store import Review

    allowed = [*LOOPBACK_NAMES, host, *names]
    with Review(tuples) as review, serving.listen(host, port, names) as listening:
        app = make_app(review, root, allowed)
        _introduce(review, root)
        serving.serve(app, host, listening)


def _introduce(review: Review, root: Path) -> None:
    _cli.say(f"{review.tuples}: {len(review.items)} tuples ({_counted(Counter(item.status for item in review.items))})")
    _cli.say(f"files from {root}; decisions go to {review.journal}")
    if review.strangers:
        _cli.say(f"note: the journal knows {review.strangers} tuple(s) that the file has no longer, or otherwise; their decisions wait")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts.get(status, 0)} {status}" for status in ("kept", "fixed", "discarded", "open"))


if __name__ == "__main__":
    _cli.run(main)
