"""The demos' commands without a process each: a start takes seconds, and one test of each demo's is enough for it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from byg_plugin.demo import commands


@contextmanager
def commands_here() -> Iterator[None]:
    """The demo's `-m MODULE ...` are calls of that module's `main`, in this process."""

    def call(*command: str | Path) -> None:
        option, module, *words = map(str, command)
        assert option == "-m"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module, *words])
            importlib.import_module(module).main()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "run", call)
        yield
