"""Many pieces of work at once, results to disk as they come: what every tool that asks a model has in common."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

from byg_plugin.folders import make_writable
from byg_plugin.journal import Done, Journal, mend_last_line, only_process, read_records, write_records
from byg_plugin.progress import Progress

T = TypeVar("T")
_AHEAD = 64  # inputs read at once


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one input: its record, in one of the two files."""

    record: Mapping[str, Any]
    accepted: bool
    repaired: bool = False
    label: str = ""
    """What is counted in the progress line: the edit type, or the reason of a reject."""


@dataclass
class Tally:
    """Counts over all runs on these files."""

    accepted: int = 0
    repaired: int = 0
    rejected: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        if outcome.accepted:
            self.accepted += 1
            self.repaired += outcome.repaired
            self.labels[outcome.label] += 1
        else:
            self.rejected += 1
            self.reasons[outcome.label] += 1

    def __str__(self) -> str:
        return f"{self.accepted} accepted ({self.repaired} of them after a repair), {self.rejected} rejected"


class Results:
    """The two files that results go to, and the names of the inputs that are in them.

    Args:
        out: file of what is accepted; rejects go beside it.
        name: field that names the input in both.
        label: what of an accepted record is counted.
        retry: kind of rejects to take back first; "" = none, "all".

    Raises:
        ValueError: another process writes them, a line is no JSON, `out` is a folder, or they cannot be written.
    """

    def __init__(self, out: Path, *, name: str, label: Callable[[Mapping[str, Any]], str], retry: str = ""):
        if out.is_dir():
            raise ValueError(f"out = {out}: is a folder; name the JSONL file to write")
        self.out, self.rejects = out, out.with_name(f"{out.stem}.rejects.jsonl")
        self.name = name
        self.tally = Tally()
        try:
            make_writable(out.parent)
            problem = f"out = {out}: another process is writing it; for several machines give each its --shard"
            self._lock = only_process(out.with_name(f".{out.name}.lock"), problem)
            mend_last_line(self.rejects)
        except OSError as error:
            raise ValueError(f"out = {out}: cannot be written: {error.strerror or error}; choose another place") from error
        if retry and self.rejects.is_file():
            write_records(self.rejects, (r for r in read_records(self.rejects) if retry not in ("all", r.get("kind"))))
        self._accepted, self._rejected = Journal(self.out), Journal(self.rejects)
        self.done = Done()
        self.done.add(self._recall(label))

    def _recall(self, label: Callable[[Mapping[str, Any]], str]) -> Iterator[str]:
        for record in read_records(self.out):
            meta = record.get("meta")
            repaired = isinstance(meta, dict) and bool(meta.get("repaired"))
            self.tally.add(Outcome(record=record, accepted=True, repaired=repaired, label=label(record)))
            yield str(record.get(self.name))
        for record in read_records(self.rejects):
            self.tally.add(Outcome(record=record, accepted=False, label=str(record.get("reason", ""))))
            yield str(record.get(self.name))

    def write(self, outcomes: list[Outcome]) -> None:
        """Put outcomes on the disk."""
        for journal, accepted in ((self._accepted, True), (self._rejected, False)):
            if records := [outcome.record for outcome in outcomes if outcome.accepted is accepted]:
                journal.append(records)
        for outcome in outcomes:
            self.tally.add(outcome)

    def close(self) -> None:
        """Close the files; a rejects file with nothing in it is removed."""
        self._accepted.close()
        self._rejected.close()
        if self.rejects.is_file() and self.rejects.stat().st_size == 0:
            self.rejects.unlink()
        self.done.close()
        self._lock.release()


class Feed(Generic[T]):
    """Inputs that are not done, once each, however often they appear."""

    def __init__(self, items: Iterator[T], name: Callable[[T], str], results: Results, limit: int = 0):
        self._items, self._name, self._results, self._limit = items, name, results, limit
        self._lock = Lock()
        self._ended = False
        self.passed_over = self.given = 0

    def take(self) -> list[T]:
        """The next few; none at the end."""
        with self._lock:
            batch: list[T] = []
            while not self._ended and len(batch) < _AHEAD and not (self._limit and self.given >= self._limit):
                item = next(self._items, None)
                if item is None:
                    self._ended = True
                elif self._results.done.claim(self._name(item)):
                    batch.append(item)
                    self.given += 1
                else:
                    self.passed_over += 1
            return batch


async def run_pool(feed: Feed[T], work: Callable[[T], Awaitable[Outcome]], results: Results, in_flight: int, *, what: str) -> None:
    """Work on up to `in_flight` inputs at once; each result is on the disk before it is counted, and before its place is taken.

    An error of `work` ends the run: results that have come in are written, what is in flight is given up and done again
    by the next run.
    """
    finished: asyncio.Queue[tuple[Outcome, asyncio.Future[None]]] = asyncio.Queue()
    waiting: list[T] = []
    reading = asyncio.Lock()

    async def worker() -> None:
        while True:
            async with reading:
                if not waiting:
                    waiting.extend(reversed(await asyncio.to_thread(feed.take)))
                if not waiting:
                    return
                item = waiting.pop()
            outcome, written = await work(item), asyncio.get_running_loop().create_future()
            finished.put_nowait((outcome, written))
            await written

    async def writer(bar: Any) -> None:
        while True:
            batch = [await finished.get()]
            while not finished.empty():
                batch.append(finished.get_nowait())
            outcomes = [outcome for outcome, _ in batch]
            # Not to be interrupted: a line that is half written would be a defect of the file.
            await asyncio.shield(asyncio.to_thread(results.write, outcomes))
            for _, written in batch:
                if not written.done():  # its worker was given up
                    written.set_result(None)
                finished.task_done()
            bar.update(len(outcomes))
            bar.set_postfix_str(_progress(results.tally), refresh=False)

    with Progress(desc=what, unit="input", smoothing=0.05) as bar:
        workers = [asyncio.ensure_future(worker()) for _ in range(in_flight)]
        writing = asyncio.ensure_future(writer(bar))
        try:
            pending: set[asyncio.Future[None]] = {*workers, writing}
            while pending - {writing}:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            await _or_failed(finished.join(), writing)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            if not writing.done():
                await _or_failed(finished.join(), writing)
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)


async def _or_failed(joined: Any, writing: asyncio.Future[None]) -> None:
    """Wait for all results to be written, or for the writer's error."""
    join = asyncio.ensure_future(joined)
    await asyncio.wait({join, writing}, return_when=asyncio.FIRST_COMPLETED)
    if writing.done():
        join.cancel()
        writing.result()


def _progress(tally: Tally) -> str:
    total = max(1, tally.accepted)
    shares = " ".join(f"{name} {100 * count // total}%" for name, count in tally.labels.most_common(10))
    return f"accepted {tally.accepted} repaired {tally.repaired} rejected {tally.rejected} | {shares}"
