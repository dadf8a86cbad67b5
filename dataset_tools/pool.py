"""Many pieces of work at once, results to disk as they come: what every tool that asks a model has in common."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar

from byg_plugin.folders import make_writable
from byg_plugin.journal import Done, Journal, mend_last_line, numbered_records, only_process, write_records
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


def only_writer(out: Path, remedy: str) -> Any:
    """The lock of a file of results, taken; it ends with `release` or with the process.

    Raises:
        ValueError: another process has it.
    """
    return only_process(out.with_name(f".{out.name}.lock"), f"out = {out}: another process is writing it; {remedy}")


def refuse_inputs(out: Path, inputs: Mapping[str, str | None]) -> None:
    """What is read must not be written; `inputs` are paths by their settings' names.

    Raises:
        ValueError: `out` is one of the inputs.
    """
    for name, path in inputs.items():
        if path is not None and out.is_file() and Path(path).exists() and out.samefile(path):
            raise ValueError(f"out = {out}: is the file that {name} = {path} reads, and would be spoilt; name another file to write")


class Results:
    """The two files that results go to, and the names of the inputs that are in them.

    Args:
        out: file of what is accepted; rejects go beside it.
        name: field that names the input in both, the first of each line.
        label: what of an accepted record is counted.
        fields: more that each accepted record has.
        retry: kind of rejects to take back first; "" = none, "all".
        check: raises for a record of either file that these results must not stand beside; not for rejects that are taken back where
            nothing is accepted yet.
        alias: another name that a recalled one may have now.

    Raises:
        ValueError: another process writes them, a line is no JSON or no result, `out` is a folder, or they cannot be written.
    """

    def __init__(
        self,
        out: Path,
        *,
        name: str,
        label: Callable[[Mapping[str, Any]], str],
        fields: Sequence[str] = (),
        retry: str = "",
        check: Callable[[Path, Mapping[str, Any]], None] | None = None,
        alias: Callable[[str], str] | None = None,
    ):
        if out.is_dir():
            raise ValueError(f"out = {out}: is a folder; name the JSONL file to write")
        self.out, self.rejects = out, out.with_name(f"{out.stem}.rejects.jsonl")
        self.name, self._fields, self._alias = name, (name, *fields), alias
        self.tally = Tally()
        self._refuse_another_file()
        try:
            make_writable(out.parent)
            self._lock = only_writer(out, "for several machines give each its --shard")
            for path in (self.out, self.rejects):
                mend_last_line(path)
        except OSError as error:
            raise ValueError(f"out = {out}: cannot be written: {error.strerror or error}; choose another place") from error
        self.done = Done()
        try:
            self.done.add(self._recall(label, retry, check))
            if retry and self.rejects.is_file():
                write_records(self.rejects, (record for _, record in numbered_records(self.rejects) if not _is_taken_back(record, retry)))
            self._accepted, self._rejected = Journal(self.out), Journal(self.rejects)
        except BaseException:
            self.done.close()
            self._lock.release()
            raise

    def _refuse_another_file(self) -> None:
        """Before it is mended: the last line of a file that is none of results must not be cut off as a torn one."""
        if not self.out.is_file():
            return
        with self.out.open("rb") as file:
            first = file.readline()
        head = f'{{"{self.name}": '.encode()
        if first.endswith(b"\n") or not (first.startswith(head) or head.startswith(first)):
            for number, record in islice(numbered_records(self.out), 1):
                self._refuse_another_line(number, record)

    def _refuse_another_line(self, number: int, record: Mapping[str, Any]) -> None:
        if lacking := [name for name in self._fields if name not in record]:
            raise ValueError(
                f"out = {self.out}: line {number} has no {', '.join(lacking)}, so this command did not write it; name another file"
            )

    def _recall(
        self, label: Callable[[Mapping[str, Any]], str], retry: str, check: Callable[[Path, Mapping[str, Any]], None] | None
    ) -> Iterator[str]:
        for path, accepted in ((self.out, True), (self.rejects, False)):
            for number, record in numbered_records(path) if path.is_file() else ():
                taken_back = not accepted and _is_taken_back(record, retry)
                if check is not None and not (taken_back and not self.tally.accepted):
                    check(path, record)
                if accepted:
                    self._refuse_another_line(number, record)
                elif taken_back:
                    continue
                meta = record.get("meta")
                repaired = isinstance(meta, dict) and bool(meta.get("repaired"))
                counted = label(record) if accepted else str(record.get("reason", ""))
                self.tally.add(Outcome(record=record, accepted=accepted, repaired=repaired, label=counted))
                recalled = str(record.get(self.name))
                yield recalled
                if self._alias is not None:
                    yield self._alias(recalled)

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


def _is_taken_back(record: Mapping[str, Any], retry: str) -> bool:
    return bool(retry) and retry in ("all", record.get("kind"))


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
