"""The host's options of `key=value` words: `network_args`, `optimizer_args`, `lr_scheduler_args`."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any


def pairs(given: Mapping[str, Any], option: str) -> tuple[dict[str, str], list[str]]:
    """The words of an option as the host takes them apart, and what it would stop at, a sentence each.

    Args:
        given: `[musubi]`.
        option: one that takes a list of texts; what is none is told elsewhere.
    """
    found: dict[str, str] = {}
    wrong = []
    words = given.get(option)
    for word in words if isinstance(words, list) else []:
        parts = str(word).split("=")
        if len(parts) == 2 and parts[0]:
            found[parts[0]] = parts[1]
        elif len(parts) > 2:
            wrong.append(
                f"musubi.{option}: {word!r}: the host divides at every =, and takes one: write \\x3d for = inside quotes of the value"
            )
        else:
            wrong.append(f"musubi.{option}: {word!r}: must be key=value")
    return found, wrong


def literals(given: Mapping[str, Any], option: str) -> tuple[dict[str, Any], list[str]]:
    """As `pairs`, of an option whose values the host reads as Python's literals."""
    found, wrong = pairs(given, option)
    read = {}
    for key, text in found.items():
        try:
            read[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            wrong.append(f"musubi.{option}: {key}={text}: no literal of Python; a text needs quotes of its own, numbers none")
    return read, wrong
