"""The vote's server as a process."""

from __future__ import annotations

from pathlib import Path

from byg_plugin.evaluation.vote.ballots import Pair, read_pairs
from tests.support.review_server import Server


class VoteServer(Server):
    """The command as a process of its own; `votes` is its file."""

    def __init__(self, a: Path, b: Path, votes: Path) -> None:
        self.a, self.b, self.votes = a, b, votes
        super().__init__(votes)

    def command(self) -> list[str]:
        """See `Server`."""
        return ["-m", "byg_plugin.evaluation.vote", "--a", str(self.a), "--b", str(self.b), "--votes", str(self.votes)]

    @property
    def pairs(self) -> list[Pair]:
        return read_pairs(self.a, self.b)
