"""Texts, JSON and TOML that others wrote: what they hold, or a `ValueError`, whatever is in them.

Python's readers raise `RecursionError` for nesting without end, which no caller expects of a text file. Integers of
thousands of digits are a `ValueError` of Python's own already.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TOO_DEEP = "nested too deeply to be meant"


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
        raise ValueError(_TOO_DEEP) from None


def toml_table(text: str) -> dict[str, Any]:
    """A TOML document.

    Raises:
        ValueError: it is none (`tomllib.TOMLDecodeError` where a place can be told), is nested too deeply, or holds an integer of
            more digits than Python reads.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} appears twice in one object")
    return dict(pairs)
