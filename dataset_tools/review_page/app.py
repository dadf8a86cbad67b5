"""The review page's server: a page, the tuples, their files, and one kind of write."""

from __future__ import annotations

import re
from collections.abc import Collection
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from byg_plugin.local_page import serving
from byg_plugin.local_page.guard import LOOPBACK_NAMES
from byg_plugin.local_page.wire import PATIENCE

from .items import Item, original_texts
from .store import Review, StaleError

_PAGE = Path(__file__).with_name("static")
_PAGE_FILES = {
    **{"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css")},
    **{"/page.js": ("page.js", "text/javascript"), "/page.svg": ("page.svg", "image/svg+xml")},
}
_MAX_DIGITS = 9  # of a tuple's number


def make_app(review: Review, root: Path, names: Collection[str] = LOOPBACK_NAMES, patience: float = PATIENCE) -> ASGIApp:
    """The server of one review.

    Args:
        root: the only folder that files are sent from; relative sources start here.
        names: host names and addresses, without port, that the page is called under.
        patience: seconds that the body of a write may take.
    """
    served = _Served(review, root.resolve(strict=True), patience)
    routes = [
        Route("/api/index", served.index, methods=["GET"]),
        Route("/api/tuples/{index}", served.read, methods=["GET"]),
        Route("/api/tuples/{index}", served.write, methods=["POST"]),
        Route("/media/{index}/{role}", served.media, methods=["GET"]),
    ]
    return serving.guarded(routes, _PAGE, _PAGE_FILES, names)


class _Served:
    def __init__(self, review: Review, root: Path, patience: float) -> None:
        self._review = review
        self._root = root
        self._patience = patience

    async def index(self, _: Request) -> Response:
        """What filters and counts need of every tuple."""
        items = self._review.items
        return JSONResponse(
            {
                "name": self._review.tuples.name,
                "journal": self._review.journal.name,
                "items": [[item.status, item.record.get("edit_type") or "", item.edited] for item in items],
            }
        )

    async def read(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._shown, self._index(request)))

    async def write(self, request: Request) -> Response:
        index = self._index(request)
        key, status, change = _change(await serving.json_body(request, self._patience))
        if key != self._review.items[index].key:  # a page of an earlier server at this port
            raise HTTPException(HTTPStatus.GONE, "the server reviews another or a changed file now; copy your text, then reload")
        try:
            if status == "kept":
                await run_in_threadpool(self._must_show, index)
            await run_in_threadpool(self._review.change, index, status=status, **change)
        except StaleError:
            return JSONResponse(await run_in_threadpool(self._shown, index), HTTPStatus.CONFLICT)
        except ValueError as error:
            raise HTTPException(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        except OSError as error:
            raise HTTPException(
                HTTPStatus.INSUFFICIENT_STORAGE, f"{self._review.journal.name} cannot be written: {error.strerror}"
            ) from error
        return JSONResponse(await run_in_threadpool(self._shown, index))

    async def media(self, request: Request) -> Response:
        """A file by the tuple that names it: what the browser sends is a number."""
        role = request.path_params["role"]
        if role not in ("source", "target"):
            raise HTTPException(HTTPStatus.NOT_FOUND)
        try:
            path = await run_in_threadpool(self._file, self._review.items[self._index(request)], role)
            return await serving.send(path)
        except ValueError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, str(error)) from error

    def _index(self, request: Request) -> int:
        number: str = request.path_params["index"]
        if len(number) > _MAX_DIGITS:
            raise HTTPException(HTTPStatus.BAD_REQUEST, f"a tuple's number has at most {_MAX_DIGITS} digits")
        if not re.fullmatch("[0-9]+", number) or int(number) >= len(self._review.items):
            raise HTTPException(HTTPStatus.NOT_FOUND, "no such tuple")
        return int(number)

    def _shown(self, index: int) -> dict[str, Any]:
        item = self._review.items[index]
        return {
            "key": item.key,
            "line": item.line,
            "id": item.record.get("id"),
            "edit_type": item.record.get("edit_type") or "",
            "status": item.status,
            "edited": item.edited,
            "revision": item.revision,
            "texts": item.texts,
            "original": original_texts(item.record),
            "media": {role: self._described(item, role) for role in ("source", "target") if item.record.get(role)},
        }

    def _described(self, item: Item, role: str) -> dict[str, Any]:
        name = item.record[role]
        try:
            path = self._file(item, role)
        except ValueError as error:
            return {"name": name, "problem": str(error)}
        return {"name": name, "kind": serving.shown_as(path)}

    def _must_show(self, index: int) -> None:
        for role in ("source", "target"):
            if self._review.items[index].record.get(role):
                self._file(self._review.items[index], role)

    def _file(self, item: Item, role: str) -> Path:
        """The file that a tuple names.

        Raises:
            ValueError: it has none, or one that is not sent: missing, no image or clip, outside the root folder.
        """
        name = item.record.get(role)
        if not name:
            raise ValueError(f"the tuple has no {role}")
        return serving.find(self._root, name, role)


def _change(body: Any) -> tuple[str, str, dict[str, Any]]:
    """The tuple's key, a status, and the other arguments of `Review.change`."""
    kinds = {"key": str, "status": str, "texts": dict, "revision": int, "page": str, "count": int}
    if not isinstance(body, dict) or set(body) != set(kinds) or not all(isinstance(body[name], kind) for name, kind in kinds.items()):
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"expected {', '.join(kinds)}")
    if not 0 < len(body["page"]) <= 64:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "page: 1 to 64 characters")
    return body["key"], body["status"], {"texts": body["texts"], "revision": body["revision"], "writer": (body["page"], body["count"])}
