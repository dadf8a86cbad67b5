"""What all commands share: `--config`, `--set`, and errors as one line."""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from byg_plugin import shipped
from byg_plugin.progress import report

_OURS = (shipped.PACKAGE, shipped.folder("dataset_tools"), shipped.PACKAGE.parent / "benchmarks")


def common_parser(description: str, *, config_required: bool = True) -> argparse.ArgumentParser:
    """A parser with `--config FILE` and repeatable `--set section.key=value`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", required=config_required, type=given_place, metavar="FILE", help="TOML configuration")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a key; repeatable, one assignment each, the last one of a key counts",
    )
    return parser


def not_empty(text: str) -> str:
    """An argument's type. An empty one, e.g. of a shell variable that is not set, must not pass for one that is not given."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: leave the option out, or say what is meant")
    return text


def given_place(text: str) -> str:
    """An argument's type: the text of a path, `~` as the user's folder, which not every shell makes of it (`--out=~/x`, Windows).

    See `not_empty`: an empty path is the folder that one happens to be in.
    """
    return os.path.expanduser(not_empty(text))


def given_path(text: str) -> Path:
    """An argument's type; see `given_place`."""
    return Path(given_place(text))


def option(name: str) -> str:
    """An attribute of the parsed arguments as it is written on a command line."""
    return f"--{name.replace('_', '-')}"


def refuse_unused(parser: argparse.ArgumentParser, args: argparse.Namespace, mode: str, *names: str) -> None:
    """Options that another mode of a command is for.

    Args:
        mode: the option that says what the command does instead, as it is written.
        names: attributes that it has no use for.

    Raises:
        ValueError: one is given (with another value than its default).
    """
    if given := [option(name) for name in names if getattr(args, name) != parser.get_default(name)]:
        raise ValueError(f"{mode} has no use for {', '.join(given)}: leave it out")


def run(main: Callable[[], object]) -> None:
    """Run a command and end the process as its outcome asks.

    Exit code 2 and a message without a traceback: a `ValueError` or `FloatingPointError` (a loss that is not finite) that
    this package raised, a device out of memory, a file that cannot be read or written, a full disk. Ctrl-C is 130. Anything else, also a
    `ValueError` raised in another library, is our defect: it keeps its traceback, and Python exits with 1.
    """
    for stream in (sys.stdout, sys.stderr):
        # A Windows console's cp1252 lacks most letters; one in a file name or caption must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        if not _raised_here(error):
            raise
        # A loader process's error is its traceback as text.
        _fail(str(error).rpartition("\nValueError: ")[2].rstrip(), error)
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise
        # Of a full disk, write() does not tell the file's name, also inside the host or a library.
        _fail(f"{error.filename or 'a file could not be written'}: {error.strerror or error}", error)
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        # What follows is advice on the allocator's settings.
        reason = " ".join(str(error).partition(" Of the allocated")[0].split())
        _fail(f"{reason} {_LESS_MEMORY}".lstrip(), error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows may lack quotas
_LESS_MEMORY = (
    'To need less memory: model.quantization = "fp8" (or int8, nf4), a smaller dataset.resolution, without pairs '
    "objective.frozen_batch = 1, model.gradient_checkpointing = true, for clips a smaller dataset.frames, of two experts "
    "model.offload_inactive_expert = true; while caching dataset.cache_batch_size = 1, for clips dataset.vae_tiling = true; in edit "
    "--quantization fp8, a smaller --resolution, --batch-size 1"
)


def _fail(message: str, error: Exception) -> NoReturn:
    report(f"error: {message}")
    raise SystemExit(2) from error


def _raised_here(error: Exception) -> bool:
    """Whether the statement that raised it is ours."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if str(error).startswith("Caught "):  # torch raised it again for a loader process
        files += re.findall(r'^  File "(.+)", line \d+', str(error), re.MULTILINE)
    return bool(files) and any(Path(files[-1]).resolve().is_relative_to(folder) for folder in _OURS)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # Not imported here: commands that only look at a configuration do without torch, whose import takes seconds.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def say(text: str, main_process: bool = True) -> None:
    """Print once, whatever the number of processes."""
    if main_process:
        report(text, sys.stdout)
