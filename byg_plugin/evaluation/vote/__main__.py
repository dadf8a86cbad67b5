"""A blind vote between two runs on the same tuples, in the browser (paper, Appendix E).

    python -m byg_plugin.evaluation.vote --a ours/edits.jsonl --b theirs/edits.jsonl --votes votes.jsonl
    python -m byg_plugin.evaluation.vote --a ours/edits.jsonl --b theirs/edits.jsonl --votes votes.jsonl --report

The first serves a page to this machine's browsers. A rater gives a name, sees the source, the instruction and both results on random,
balanced sides, and says which is the better edit. Each vote is on disk before the page goes on; a page that is closed, loaded again or
opened elsewhere goes on where that rater stopped. Who votes again on a pair changes the vote; both lines stay. The second prints what the
votes say and writes it beside them as JSON and PNG.

The page has no password: whoever can reach it can vote. For a rater elsewhere use a tunnel: ssh -L 7861:127.0.0.1:7861 machine
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from byg_plugin import _cli
from byg_plugin.config.extras import require
from byg_plugin.evaluation.vote.ballots import Pair, Vote, Votes, read_pairs, read_votes
from byg_plugin.folders import write_text

_PORT = 7861


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m byg_plugin.evaluation.vote", allow_abbrev=False, **about)
    for run in ("--a", "--b"):
        parser.add_argument(run, required=True, type=_cli.given_path, metavar="DIR", help="folder of edit.py's results, or its edits.jsonl")
    parser.add_argument("--votes", type=_cli.given_path, default=Path("votes.jsonl"), metavar="FILE", help="default: votes.jsonl")
    parser.add_argument("--report", action="store_true", help="say what the votes say, serve nothing")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=_PORT, help=f"default {_PORT}; 0: any free one")
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name that browsers call it by; repeatable")
    args = parser.parse_args(arguments)
    if args.report:
        _cli.refuse_unused(parser, args, "--report", "host", "port", "allow_host")
    extras = {"scipy": "eval", "matplotlib": "eval"} if args.report else {"starlette": "review", "uvicorn": "review"}
    for package, extra in extras.items():
        require(package, "the vote", extra)
    pairs = read_pairs(args.a, args.b)
    if args.report:
        _report(args.votes, read_votes(args.votes), pairs)
        return
    from byg_plugin.evaluation.vote.app import make_app
    from byg_plugin.local_page import serving
    from byg_plugin.local_page.guard import LOOPBACK_NAMES

    with Votes(args.votes) as votes, serving.listen(args.host, args.port, args.allow_host) as listening:
        app = make_app(pairs, votes, [*LOOPBACK_NAMES, args.host, *args.allow_host])
        _cli.say(f"{len(pairs)} pairs; votes go to {args.votes}, {len(votes.votes)} are there")
        serving.serve(app, args.host, listening)


def _report(path: Path, votes: Sequence[Vote], pairs: Sequence[Pair]) -> None:
    from byg_plugin.evaluation.vote import report

    found = report.summarise(votes, pairs)
    write_text(path.with_suffix(".report.json"), json.dumps(found, indent=1, allow_nan=False) + "\n")
    print(report.text(found), end="")  # before the plot, which may fail
    report.plot(found, path.with_suffix(".report.png"))


if __name__ == "__main__":
    _cli.run(main)
