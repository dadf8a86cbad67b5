"""Who may ask a local page's server: only pages that it served itself, under its own names."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_HEADERS = {
    # Nothing but this server's own files: a caption that got into the page as markup could neither run nor call anywhere.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    # Numbers stand for other tuples after a restart with another file.
    "cache-control": "no-store",
}


class Guard:
    """Refuses what a page of another site could send, before any route sees it; puts our headers on every answer.

    A name that an attacker's DNS turned to this machine is no name of ours: Host. Another site's, or another local server's,
    page is told by the Origin, which browsers send with every write. The port of Host is free: tunnels change it.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # start and end of the server
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *ours]}
            await send(message)

        reason = self._refusal(Request(scope))
        app = self._app if reason is None else PlainTextResponse(reason, HTTPStatus.FORBIDDEN)
        await app(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> str | None:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or _host_name(hosts[0]) not in self._names:
            return "Host is not a name of this server\n"
        if request.method in ("GET", "HEAD"):
            return None
        if request.headers.getlist("origin") != [f"http://{hosts[0]}"]:
            return "Origin is not this server's page\n"
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return "not JSON\n"
        return None


def is_host_name(name: str) -> bool:
    """Whether a browser can call a machine so: no scheme, port or path, an address as browsers shorten it."""
    try:
        return str(ipaddress.ip_address(name)) == name.lower()
    except ValueError:
        return bool(re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", name, re.IGNORECASE | re.ASCII))


def _host_name(host: str) -> str | None:
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises where it is no number
    except ValueError:
        return None
    return parts.hostname if parts.netloc == host and "@" not in host else None
