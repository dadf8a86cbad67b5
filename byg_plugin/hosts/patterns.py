"""Regular expressions of users, matched where a wrong one can be stopped.

Python's `re` tries every way to match: some patterns, e.g. with a repetition inside a repetition, take longer than the age of
the universe on a name of 40 letters, and nothing in the process can interrupt them. A child process can be killed, on every
system.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import lru_cache

SECONDS = 10.0  # a usual pattern takes milliseconds for all names of a network
_REPEATS = re.compile(r"[*+?{]")
_CHILD = "import json, re, sys; p, names = json.load(sys.stdin); print(json.dumps([n for n in names if re.fullmatch(p, n)]))"


def full_matches(pattern: str, names: Iterable[str], what: str, seconds: float = SECONDS) -> list[str]:
    """The names that a pattern matches whole, in their order.

    Args:
        pattern: a regular expression.
        names: e.g. of the modules of a network.
        what: the option's key, for messages.
        seconds: what matching may take.

    Raises:
        ValueError: it is not a regular expression, or took too long.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{what} = {pattern!r} is not a regular expression: {error}") from error
    if not _REPEATS.search(pattern):  # nothing to try twice
        return [name for name in names if compiled.fullmatch(name)]
    return list(_matched_apart(pattern, tuple(names), what, seconds))


@lru_cache(maxsize=16)
def _matched_apart(pattern: str, names: tuple[str, ...], what: str, seconds: float) -> tuple[str, ...]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD],
            input=json.dumps([pattern, names]),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"{what} = {pattern!r} took more than {seconds:g} s to match {len(names)} names: a repetition inside a repetition, or several "
            "that can match the same letters, are tried in every combination; write it without"
        ) from error
    except subprocess.CalledProcessError as error:  # e.g. memory
        raise ValueError(f"{what} = {pattern!r} cannot be matched: {error.stderr.strip().rpartition(chr(10))[2]}") from error
    return tuple(json.loads(done.stdout))
