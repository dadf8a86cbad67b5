"""A local page's connections: who begins a request and does not end it is let go of."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 20.0  # seconds for a request's headers, and as many for its body
_MOST = 256  # connections at once; a page takes six


def server_config(app: ASGIApp, patience: float = PATIENCE) -> uvicorn.Config:
    """How uvicorn serves the app. It has no time limit of its own for a request that does not end."""

    class Connection(_Connection):
        seconds = patience

    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",  # no websockets
        limit_concurrency=_MOST,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2,  # requests in flight at Ctrl-C are short
    )


class _Connection(H11Protocol):
    """A connection that is closed where a request's headers, once it is open or has sent a byte, are not whole within `seconds`.

    One that sends nothing after an answer is uvicorn's to close.
    """

    seconds = PATIENCE
    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # the request is being served
            self._stop()
        elif self._limit is None:
            self._limit = self.loop.call_later(self.seconds, self._let_go)

    def _stop(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _let_go(self) -> None:
        if self.transport.is_closing():  # and the rest of an answer is not fetched
            self.transport.abort()
            return
        self.transport.close()
        self._limit = self.loop.call_later(self.seconds, self._let_go)
