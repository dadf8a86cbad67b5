"""Texts, JSON and TOML that others wrote: what they hold, or a `ValueError`, whatever is in them.

Python's readers raise `RecursionError` for nesting without end, which no caller expects of a text file. Integers of
thousands of digits are a `ValueError` of Python's own already.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TOO_DEEP = "nested too deeply to be meant"
_TOO_LONG = "it holds an integer of more digits than are read"
_MOST_DEPTH = 100  # dotted keys nest without recursion, and whoever prints or checks the value recurses
_QUOTED = re.compile(r"'[^']*'|" r'"(?:[^"\\]|\\.)*"')
_KEY_PART = re.compile(r"[ \t]*[A-Za-z0-9_-]*[ \t]*")
BACKSLASH = """in "..." a backslash begins an escape: write a path in single quotes, 'C:\\models\\flux', or with /"""


class TooDeep(ValueError):
    """Nesting without end."""


_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def utf8(data: bytes) -> str:
    """The text of a file in UTF-8, without its byte order mark.

    Raises:
        ValueError: it is in UTF-16 or another encoding; says which where that can be told, and the remedy.
    """
    if other := other_encoding(data):
        raise ValueError(f"{other} text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason}); save it as UTF-8") from error


def other_encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 by the first bytes of a file, with or without a byte order mark; None where it is neither."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    # What begins with a letter of ASCII, a quote or a brace has a zero beside it there.
    return "UTF-16" if len(head) > 1 and (head[0] == 0) != (head[1] == 0) else None


def json_value(text: str | bytes, *, unique_keys: bool = False, strict: bool = True) -> Any:
    """A JSON value.

    Args:
        text: the document.
        unique_keys: an object with one key twice is an error; Python's reader keeps the last and drops the other in silence.
        strict: control characters inside strings are an error.

    Raises:
        ValueError: it is none (`json.JSONDecodeError` where a place can be told), is nested too deeply, or holds an integer of
            more digits than Python reads.
    """
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = _unique if unique_keys else None
    try:
        return json.loads(text, object_pairs_hook=pairs, strict=strict)
    except RecursionError:
        raise TooDeep(_TOO_DEEP) from None
    except ValueError as error:
        if _is_of_digits(error):
            raise ValueError(_TOO_LONG) from None
        raise


def toml_table(document: str | bytes) -> dict[str, Any]:
    """A TOML document; of bytes also what editors put around it: a byte order mark, any line ends.

    Raises:
        ValueError: it is none (`tomllib.TOMLDecodeError` where a place can be told), is not in UTF-8, is nested too deeply, or holds
            an integer of more digits than Python reads.
    """
    text = document if isinstance(document, str) else utf8(document).replace("\r\n", "\n").replace("\r", "\n")
    # Before it is read: the reader's time for a dotted key grows with the square of its parts.
    if any(line.count(".") > _MOST_DEPTH and _dotted(line) > _MOST_DEPTH for line in text.split("\n")):
        raise TooDeep(_TOO_DEEP)
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise TooDeep(_TOO_DEEP) from None
    except tomllib.TOMLDecodeError as error:
        raise tomllib.TOMLDecodeError(f"{error}{_advice(text, str(error))}") from error
    except ValueError as error:
        if _is_of_digits(error):
            raise ValueError(_TOO_LONG) from None
        raise
    if _depth_above(table, _MOST_DEPTH):
        raise TooDeep(_TOO_DEEP)
    return table


def _dotted(line: str) -> int:
    """Parts of the longest dotted key that a line can hold. Dots of quoted texts, comments, sentences and lists of numbers are none."""
    longest = run = 1
    for part in _QUOTED.sub("", line).partition("#")[0].split("."):
        run = run + 1 if _KEY_PART.fullmatch(part) else 1
        longest = max(longest, run)
    return longest


def _is_of_digits(error: ValueError) -> bool:
    """Whether it is Python's own for an integer of thousands of digits, whose advice is for programmers."""
    return "set_int_max_str_digits" in str(error)


def _advice(text: str, message: str) -> str:
    """A Windows path in a string with escapes is the usual reason for a backslash in the line that is wrong."""
    where = re.search(r"line (\d+)", message)
    lines = text.split("\n")
    line = lines[int(where[1]) - 1] if where and int(where[1]) <= len(lines) else ""
    return f"; {BACKSLASH}" if re.search(r'".*\\', line) else ""


def _depth_above(value: Any, most: int) -> bool:
    """Level by level: no recursion."""
    level = [value]
    for _ in range(most):
        level = [part for one in level if isinstance(one, dict | list) for part in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if twice := sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1):
        raise ValueError(f"{', '.join(twice)} appears twice in one object")
    return dict(pairs)
