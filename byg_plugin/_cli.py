"""What all commands share: `--config`, `--set`, and errors as one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def common_parser(description: str, *, config_required: bool = True) -> argparse.ArgumentParser:
    """A parser with `--config FILE` and repeatable `--set section.key=value`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", required=config_required, metavar="FILE", help="TOML configuration")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key; repeatable")
    return parser


def run(main: Callable[[], object]) -> None:
    """Run a command. A user's error (`ValueError`, a loss that is not finite) is one line and exit code 2; Ctrl-C is 130;
    anything else is our defect and keeps its traceback."""
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def say(text: str, main_process: bool = True) -> None:
    """Print once, whatever the number of processes."""
    if main_process:
        print(text, flush=True)
