"""The review page's server: a page, the tuples, their files, and one kind of write."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import Collection
from http import HTTPStatus
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from byg_plugin.data import media
from byg_plugin.documents import json_value

from .guard import LOOPBACK_NAMES, Guard
from .items import Item, original_texts
from .store import Review, StaleError
from .wire import PATIENCE

_PAGE = Path(__file__).with_name("static")
_PAGE_FILES = {
    **{"/": ("page.html", "text/html"), "/page.css": ("page.css", "text/css")},
    **{"/page.js": ("page.js", "text/javascript"), "/page.svg": ("page.svg", "image/svg+xml")},
}
_MAX_BODY = 512 * 1024  # bytes; four texts of the longest allowed size
_MAX_DIGITS = 9  # of a tuple's number
# What is sent as what; anything else is not sent. Browsers take a .mov for a film only under MP4's name.
_CONTENT_TYPES = {
    **{".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".bmp": "image/bmp"},
    **{".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm"},
    **{".mkv": "video/x-matroska", ".avi": "video/x-msvideo"},
}
_TO_PNG = (".tif", ".tiff")  # formats of the trainer's that browsers do not show


def make_app(review: Review, root: Path, names: Collection[str] = LOOPBACK_NAMES, patience: float = PATIENCE) -> ASGIApp:
    """The server of one review.

    Args:
        root: the only folder that files are sent from; relative sources start here.
        names: host names and addresses, without port, that the page is called under.
        patience: seconds that the body of a write may take.
    """
    served = _Served(review, root.resolve(strict=True), patience)
    routes = [
        *(Route(path, _page_file, methods=["GET"]) for path in _PAGE_FILES),
        Route("/api/index", served.index, methods=["GET"]),
        Route("/api/tuples/{index}", served.read, methods=["GET"]),
        Route("/api/tuples/{index}", served.write, methods=["POST"]),
        Route("/media/{index}/{role}", served.media, methods=["GET"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, names=frozenset(name.lower() for name in names))])


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
        key, status, change = _change(await self._body(request))
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
            if path.suffix.lower() in _TO_PNG:
                return Response(await run_in_threadpool(_as_png, path), media_type="image/png")
        except ValueError as error:
            raise HTTPException(HTTPStatus.NOT_FOUND, str(error)) from error
        return FileResponse(path, media_type=_CONTENT_TYPES[path.suffix.lower()])

    def _index(self, request: Request) -> int:
        number: str = request.path_params["index"]
        if len(number) > _MAX_DIGITS:
            raise HTTPException(HTTPStatus.BAD_REQUEST, f"a tuple's number has at most {_MAX_DIGITS} digits")
        if not re.fullmatch("[0-9]+", number) or int(number) >= len(self._review.items):
            raise HTTPException(HTTPStatus.NOT_FOUND, "no such tuple")
        return int(number)

    async def _body(self, request: Request) -> Any:
        try:
            body = await asyncio.wait_for(_read_body(request), self._patience)
        except asyncio.TimeoutError as error:
            message = f"no whole body within {self._patience:g} s"
            raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, message, {"connection": "close"}) from error
        except ClientDisconnect as error:
            raise HTTPException(HTTPStatus.BAD_REQUEST, "the body broke off") from error
        try:
            return json_value(body)
        except ValueError as error:  # also bytes that are no UTF-8
            raise HTTPException(HTTPStatus.BAD_REQUEST, f"not JSON: {error}") from error

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
        kind = "clip" if _CONTENT_TYPES.get(path.suffix.lower(), "").startswith("video/") else "image"
        return {"name": name, "kind": kind}

    def _must_show(self, index: int) -> None:
        for role in ("source", "target"):
            if self._review.items[index].record.get(role):
                self._file(self._review.items[index], role)

    def _file(self, item: Item, role: str) -> Path:
        """The file that a tuple names.

        Raises:
            ValueError: it has none, or one that is not sent: missing, no image or clip by its name, outside the root folder.
        """
        name = item.record.get(role)
        if not name:
            raise ValueError(f"the tuple has no {role}")
        try:
            # Joining with an absolute path gives that path: both kinds are checked alike, after every link is followed.
            path = (self._root / (name if Path(name).is_absolute() else name.replace("\\", "/"))).resolve(strict=True)
        except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, a loop of links
            raise ValueError(f"{role}: no such file") from error
        if not path.is_relative_to(self._root):
            raise ValueError(f"{role}: lies outside the root folder, so it is not shown; start with a --root that holds it")
        if path.suffix.lower() not in _CONTENT_TYPES and path.suffix.lower() not in _TO_PNG:
            raise ValueError(f"{role}: no image or clip by its name ({', '.join((*_CONTENT_TYPES, *_TO_PNG))})")
        if not path.is_file():
            raise ValueError(f"{role}: is not a file")
        return path


async def _page_file(request: Request) -> Response:
    name, content_type = _PAGE_FILES[request.url.path]
    return FileResponse(_PAGE / name, media_type=content_type)


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    return bytes(body)


def _change(body: Any) -> tuple[str, str, dict[str, Any]]:
    """The tuple's key, a status, and the other arguments of `Review.change`."""
    kinds = {"key": str, "status": str, "texts": dict, "revision": int, "page": str, "count": int}
    if not isinstance(body, dict) or set(body) != set(kinds) or not all(isinstance(body[name], kind) for name, kind in kinds.items()):
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"expected {', '.join(kinds)}")
    if not 0 < len(body["page"]) <= 64:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "page: 1 to 64 characters")
    return body["key"], body["status"], {"texts": body["texts"], "revision": body["revision"], "writer": (body["page"], body["count"])}


def _as_png(path: Path) -> bytes:
    buffer = io.BytesIO()
    media.load_image(path).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
