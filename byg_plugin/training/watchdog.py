"""Ends a process that waits too long for the others, and says in which collective: a hang costs cards and says nothing."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

from torch import nn

from byg_plugin.progress import report
from byg_plugin.training.engine import Engine

EXIT_CODE = 75
_GRACE = 10.0  # seconds for the first process to save, before the others' end makes the launcher kill it
_INTERRUPTED = 5.0  # seconds that an interrupted step may take; `docker stop` kills 10 after the signal, torch's launcher and Slurm 30
_COLLECTIVES = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")
_WRAPPERS = {"wrapper", "wait", "_wait", "log_wrapper"}


class Watchdog:
    """A thread that looks at how long the main thread has been in what it waits for, and in what it was told to stop.

    Args:
        minutes: that are waited.
        rank: of this process.
        rescue: called before the end (`ends=True`), and where an interrupted process is not done in time; saves what can be saved
            without the others, and says what is saved.
        others: whether there are any.
    """

    def __init__(self, minutes: float, rank: int, rescue: Callable[..., str], *, others: bool = True):
        self._seconds, self._rank, self._rescue, self._others = 60 * minutes, rank, rescue, others
        self._main = threading.main_thread().ident
        self._waits: tuple[str, float] | None = None
        self._over = threading.Event()
        self._interrupted: float | None = None

    def interrupted(self) -> None:
        """The process was told to stop, and works on to the end of its step."""
        self._interrupted = time.monotonic()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around work that needs the other processes; the innermost one is looked at."""
        before, self._waits = self._waits, (what, time.monotonic())
        try:
            yield
        finally:
            self._waits = before
            self.heard()

    def heard(self) -> None:
        """The others have just been heard from: what is waited for begins anew."""
        if self._waits is not None:
            self._waits = (self._waits[0], time.monotonic())

    @contextmanager
    def running(self) -> Iterator[None]:
        """The thread lives inside."""
        self._over.clear()
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            waits = self._waits
            if self._others and waits is not None and time.monotonic() - waits[1] > self._seconds:
                self._end(waits[0])
            if self._interrupted is not None and time.monotonic() - self._interrupted > _INTERRUPTED:
                self._interrupted = None
                if self._rank == 0:
                    self._save(ends=False)

    def _end(self, what: str) -> None:
        inside = _collective(sys._current_frames().get(self._main or 0))
        report(f"process {self._rank} has waited {self._seconds / 60:g} minutes (train.collective_timeout) for the others: {what}{inside}")
        try:
            if self._rank == 0:
                self._save(ends=True)
            else:
                time.sleep(_GRACE)
        finally:
            os._exit(EXIT_CODE)  # the main thread does not come back

    def _save(self, *, ends: bool) -> None:
        try:
            report(self._rescue(ends=ends))
        except BaseException:  # noqa: BLE001 - said here or nowhere; this thread has to end the process, and to watch on
            report(traceback.format_exc().rstrip())


def _collective(frame: FrameType | None) -> str:
    """The innermost function of torch's or DeepSpeed's communication on a stack."""
    while frame is not None:
        code = frame.f_code
        if any(part in code.co_filename for part in _COLLECTIVES) and code.co_name not in _WRAPPERS:
            return f", in {code.co_name}"
        frame = frame.f_back
    return ""


_SAID = {
    "backward": "a backward pass",
    "step": "the gradients of an optimizer step",
    "any": "an agreement",
    "mean": "the means of the log",
    "broadcast": "the first process's weights",
    "gathered": "weights to save",
    "state": "the optimizer's state to save",
}


class _Watched:
    def __init__(self, engine: Engine, watchdog: Watchdog, alone: frozenset[str]):
        self._engine, self._watchdog, self._alone = engine, watchdog, alone

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        if name not in _SAID or name in self._alone:
            return found

        def call(*args: Any, **options: Any) -> Any:
            with self._watchdog.waiting(_SAID[name]):
                return found(*args, **options)

        return call


def watched(engine: Engine, watchdog: Watchdog, *, sharded: bool) -> Engine:
    """The engine, whose collectives are watched.

    Args:
        engine: of the run.
        watchdog: of this process.
        sharded: the base lies in shards, so that a backward pass needs the others.
    """
    alone = frozenset() if sharded or not engine.whole else frozenset({"backward"})
    return cast(Engine, _Watched(engine, watchdog, alone))


def hear_in(blocks: Iterable[nn.Module], watchdog: Watchdog) -> None:
    """A block in shards that has computed was gathered from all processes."""
    for block in blocks:
        block.register_forward_hook(lambda *_: watchdog.heard())
