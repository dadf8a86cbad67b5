"""The vote's server: a page, the pairs on the sides that a rater sees them, and one kind of write. Which run is where it does not say."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from http import HTTPStatus
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from byg_plugin.evaluation.vote.ballots import MOST_NAME, RUNS, Pair, Vote, Votes, counted, order
from byg_plugin.local_page import serving
from byg_plugin.local_page.guard import LOOPBACK_NAMES
from byg_plugin.local_page.wire import PATIENCE

_STATIC = Path(__file__).with_name("static")
_FILES = {
    **{"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")},
    **{"/page.svg": ("page.svg", "image/svg+xml")},
}
_SIDES = ("left", "right")


def make_app(pairs: Sequence[Pair], votes: Votes, names: Collection[str] = LOOPBACK_NAMES, patience: float = PATIENCE) -> ASGIApp:
    """The server of one vote, of its own files alone; the other arguments as of the review page's."""
    served = _Served(pairs, votes, patience)
    routes = [
        Route("/api/pairs", served.session, methods=["GET"]),
        Route("/api/pairs/{position}", served.write, methods=["POST"]),
        Route("/media/{position}/{role}", served.media, methods=["GET"]),
    ]
    return serving.guarded(routes, _STATIC, _FILES, names)


class _Served:
    def __init__(self, pairs: Sequence[Pair], votes: Votes, patience: float):
        self._pairs, self._votes, self._patience = pairs, votes, patience
        files = {file for pair in pairs for file in (pair.a.source, pair.a.edit, pair.b.edit)}
        # Each file's own: on Windows those of two drives have no folder in common.
        self._folders = {file: file.resolve(strict=True).parent for file in files}

    async def session(self, request: Request) -> Response:
        """All that a rater sees, in order, with the votes so far."""
        rater = _rater(request)
        own = {vote.key: vote.choice for vote in counted(self._votes.votes, self._pairs) if vote.rater == rater}
        shown = []
        for index, left in order(self._pairs, rater):
            pair = self._pairs[index]
            choice = own.get(pair.key)
            side = None if choice is None else _SIDES[choice != left]
            kind = serving.shown_as(pair.a.edit)
            shown.append({"instruction": pair.a.instruction, "kind": kind, "voted": side})
        return JSONResponse({"token": self._token(rater), "pairs": shown})

    async def write(self, request: Request) -> Response:
        rater = _rater(request)
        body = await serving.json_body(request, self._patience)
        if not isinstance(body, dict) or body.get("side") not in _SIDES:
            raise HTTPException(HTTPStatus.BAD_REQUEST, "expected token and side, left or right")
        if body.get("token") != self._token(rater):  # a page of an earlier server at this port: sides may be others now
            raise HTTPException(HTTPStatus.GONE, "the server has other edits now; reload this page and go on")
        pair, left = self._shown(request)
        choice = left if body["side"] == "left" else RUNS[1 - RUNS.index(left)]
        try:
            await run_in_threadpool(self._votes.add, Vote(key=pair.key, rater=rater, choice=choice), pair, left)
        except ValueError as error:
            raise HTTPException(HTTPStatus.INSUFFICIENT_STORAGE, str(error)) from error
        return JSONResponse({"voted": body["side"]})

    async def media(self, request: Request) -> Response:
        """A file by its side: neither address nor answer tells whose it is."""
        _rater(request)
        pair, left = self._shown(request)
        right = RUNS[1 - RUNS.index(left)]
        files = {"reference": pair.a.source, "left": getattr(pair, left).edit, "right": getattr(pair, right).edit}
        role = request.path_params["role"]
        if role not in files:
            raise HTTPException(HTTPStatus.NOT_FOUND)
        try:
            file = files[role]
            return await serving.send(await run_in_threadpool(serving.find, self._folders[file], str(file.absolute()), role))
        except ValueError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, str(error)) from error

    def _token(self, rater: str) -> str:
        """Names what a rater sees, pair by pair with the run on the left, without telling it."""
        seen = [(self._pairs[index].key, left) for index, left in order(self._pairs, rater)]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]

    def _shown(self, request: Request) -> tuple[Pair, str]:
        number: str = request.path_params["position"]
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) >= len(self._pairs):
            raise HTTPException(HTTPStatus.NOT_FOUND, "no such pair")
        index, left = order(self._pairs, _rater(request))[int(number)]
        return self._pairs[index], left


def _rater(request: Request) -> str:
    name = request.query_params.get("rater", "").strip()  # no part of the path: it may hold slashes, or be dots
    if not 0 < len(name) <= MOST_NAME or not name.isprintable():
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"a name has 1 to {MOST_NAME} letters")
    return name
