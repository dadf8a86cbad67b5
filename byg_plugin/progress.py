"""Progress bars: a bar on a terminal, one line a minute in a log file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

_EVERY = 60.0  # seconds between lines where nobody watches a cursor


class Progress(tqdm):
    """tqdm's bar (same arguments); where its stream is no terminal, whole lines: the first, one a minute, and the last."""

    disable: bool

    def __init__(self, *args: Any, **options: Any):
        file = options.get("file") or sys.stderr
        self._lines = not _is_terminal(file)
        if self._lines:
            # Without a minimum of iterations tqdm looks at the clock at every update; its monitor thread would write between lines.
            options = {**options, "mininterval": _EVERY, "maxinterval": _EVERY, "miniters": 1, "ascii": True, "ncols": 0}
        super().__init__(*args, **options)

    @staticmethod
    def status_printer(file: Any) -> Any:
        """Carriage returns on a terminal, else lines; a line that says what the last one said is left out."""
        if _is_terminal(file):
            return tqdm.status_printer(file)
        last = ""

        def write(text: str) -> None:
            nonlocal last
            if text.strip() and text != last:
                report(text.rstrip(), file)
                last = text

        return write

    def set_postfix(self, ordered_dict: Any = None, refresh: bool = True, **figures: Any) -> None:
        """Figures beside the bar; in lines they wait for their minute."""
        super().set_postfix(ordered_dict, refresh and not self._lines, **figures)

    def close(self) -> None:
        """As tqdm's; of lines, the last one tells where it ended, and no empty one follows."""
        if not self._lines or self.disable:
            super().close()
            return
        self.refresh()
        self.disable = True
        self._decr_instances(self)

    def clear(self, *args: Any, **options: Any) -> None:
        """Asked for before a line of another writer: lines stay."""
        if not self._lines:
            super().clear(*args, **options)

    @classmethod
    def write(cls, s: str, file: Any = None, end: str = "\n", nolock: bool = False) -> None:
        """A line that no bar runs through; into a log just the line (tqdm's would print every bar again)."""
        file = sys.stdout if file is None else file
        if _is_terminal(file) or _is_terminal(sys.stderr):
            super().write(s, file, end, nolock)
        else:
            report(s, file, end)


def report(text: str, file: Any = None, end: str = "\n") -> None:
    """A line (default: on stderr) of work that goes on where nobody reads it any more.

    Ctrl-C reaches the `tee` behind a pipe too, and a terminal may be closed: that must not end a run before it has saved.
    """
    file = sys.stderr if file is None else file
    with suppress(OSError):
        file.write(text + end)
        file.flush()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bars of transformers and diffusers while they load local weights, but on a terminal: they know carriage returns alone."""
    names = () if _is_terminal(sys.stderr) else ("transformers.utils.logging", "diffusers.utils.logging")
    barring = [module for name in names if (module := sys.modules.get(name)) and module.is_progress_bar_enabled()]
    for module in barring:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in barring:
            module.enable_progress_bar()


def _is_terminal(file: Any) -> bool:
    return hasattr(file, "isatty") and file.isatty()
