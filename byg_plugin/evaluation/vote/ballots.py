"""What is voted on, in which order and on which sides; and the votes, one line each."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

from byg_plugin.editing import manifest
from byg_plugin.evaluation.items import Item, from_manifest, missing_files, refuse
from byg_plugin.journal import Journal, mend_last_line, numbered_records, only_process
from byg_plugin.user_files import file_digest

RUNS = ("a", "b")
MOST_NAME = 64  # characters


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One edit by both runs. `key` also names the very files: a vote on others is another's."""

    key: str
    a: Item
    b: Item


@dataclass(frozen=True, kw_only=True)
class Vote:
    """A rater's choice of a run on a pair."""

    key: str
    rater: str
    choice: str


def read_pairs(a: Path, b: Path) -> list[Pair]:
    """The edits that two folders of edit.py's share, by id.

    Raises:
        ValueError: they are one, they share none, files are gone, or one id has two instructions or sources.
    """
    if _folder(a) == _folder(b):
        raise ValueError(f"--a and --b are the same run ({_folder(a)}); name two")
    one, other = ({item.id: item for item in from_manifest(path)} for path in (a, b))
    shared = [name for name in one if name in other]
    if not shared:
        raise ValueError(f"{a} and {b} have no edit of the same tuple or name: edit the same tuples with both")
    problems = missing_files([run[name] for name in shared for run in (one, other)])
    for name in shared:
        if one[name].instruction != other[name].instruction or one[name].source.resolve() != other[name].source.resolve():
            problems.append(f"{name}: the runs have different sources or instructions")
    refuse(problems, "the two runs")
    return [Pair(key=_key(name, one[name], other[name]), a=one[name], b=other[name]) for name in shared]


def _folder(run: Path) -> Path:
    return (run.parent if run.name == manifest.NAME else run).resolve()


def _key(name: str, *edits: Item) -> str:
    digest = hashlib.sha256(name.encode(errors="surrogatepass"))
    for edit in edits:
        digest.update(bytes.fromhex(file_digest(edit.edit)))
    return digest.hexdigest()[:16]


def order(pairs: Sequence[Pair], rater: str) -> list[tuple[int, str]]:
    """(index of a pair, run on the left) in the order that a rater sees them.

    It follows from the rater's name: a page that is loaded again, elsewhere too, goes on. Each run is on the left as often as on the
    right, but for one of an odd number.
    """
    draw = random.Random(f"{rater}/{'/'.join(pair.key for pair in pairs)}")
    sides = [RUNS[number % 2] for number in range(len(pairs))]
    if draw.random() < 0.5:
        sides = [RUNS[1 - RUNS.index(side)] for side in sides]
    draw.shuffle(sides)
    return list(zip(draw.sample(range(len(pairs)), len(pairs)), sides, strict=True))


def read_votes(path: Path) -> list[Vote]:
    """The votes of a file, in order; of two of one rater on one pair the later counts, see `counted`.

    Raises:
        ValueError: a line is no vote.
    """
    votes = []
    for number, record in numbered_records(path) if path.is_file() else ():
        key, rater, choice = (record.get(name) for name in ("key", "rater", "choice"))
        if not (isinstance(key, str) and isinstance(rater, str) and choice in RUNS):
            raise ValueError(f"{path}: line {number} is no vote; remove it")
        votes.append(Vote(key=key, rater=rater, choice=str(choice)))
    return votes


def counted(votes: Sequence[Vote], pairs: Sequence[Pair]) -> list[Vote]:
    """The last vote of each rater on each of these pairs."""
    known = {pair.key for pair in pairs}
    return list({(vote.rater, vote.key): vote for vote in votes if vote.key in known}.values())


class Votes:
    """A file of votes that is being written. Each is on disk before `add` returns.

    Raises:
        ValueError: another process has it, it is damaged, or it cannot be written.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._change = path, threading.Lock()
        problem = f"--votes {path}: another process writes it; use its page, end it, or name another file"
        self._one_process = only_process(Path(f"{path}.lock"), problem)
        try:
            mend_last_line(path)
            self.votes = read_votes(path)
            self._journal = Journal(path)
        except BaseException:
            self._one_process.release()
            raise

    def __enter__(self) -> Votes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._journal.close()
        self._one_process.release()

    def add(self, vote: Vote, pair: Pair, left: str) -> None:
        """Write a vote down.

        Raises:
            ValueError: the disk is full.
        """
        said = {"key": vote.key, "rater": vote.rater, "choice": vote.choice}
        # For people; what counts stands above.
        about = {"id": pair.a.id, "left": left, "time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        with self._change:
            self._journal.append([said | about])
            self.votes.append(vote)
