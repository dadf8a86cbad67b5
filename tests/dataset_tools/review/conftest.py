"""Tuples to review, and the server as a process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.review_server import Server, record, write_tuples


@pytest.fixture
def tuples(tmp_path: Path) -> Path:
    return write_tuples(tmp_path, [record(number) for number in range(4)])


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(tuples: Path, root: Path | None = None) -> Server:
        servers.append(Server(tuples, root))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.kill()
