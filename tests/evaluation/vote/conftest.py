"""Two runs to vote on, and the server as a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.evaluation import write_edits
from tests.support.vote_server import VoteServer


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return write_edits(tmp_path, 4, level=10), write_edits(tmp_path, 4, level=90)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[tuple[Path, Path]], VoteServer]]:
    servers: list[VoteServer] = []

    def start(runs: tuple[Path, Path]) -> VoteServer:
        servers.append(VoteServer(*runs, tmp_path / "votes" / "votes.jsonl"))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()
