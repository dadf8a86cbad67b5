"""What the servers of local pages share: their own files, pictures and clips, bodies of writes, the address they listen on."""

from __future__ import annotations

import asyncio
import io
import ipaddress
import socket
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from byg_plugin import _cli
from byg_plugin.data import media
from byg_plugin.documents import json_value
from byg_plugin.local_page.guard import Guard, is_host_name
from byg_plugin.local_page.wire import server_config

_MAX_BODY = 512 * 1024  # bytes; four texts of the longest allowed size
# What is sent as what; other images that are read go out as PNG, nothing else does. Browsers take a .mov for a film only under MP4's name.
_CONTENT_TYPES = {
    **{".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".bmp": "image/bmp"},
    ".avif": "image/avif",
    **{".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm"},
    **{".mkv": "video/x-matroska", ".avi": "video/x-msvideo"},
}


def guarded(routes: Sequence[Route], folder: Path, files: Mapping[str, tuple[str, str]], names: Collection[str]) -> ASGIApp:
    """A server of these routes behind the guard.

    Args:
        routes: the page's own.
        folder: of the page's files.
        files: (file name, content type) by address.
        names: host names and addresses, without port, that the page is called under.
    """

    async def page_file(request: Request) -> Response:
        name, content_type = files[request.url.path]
        return FileResponse(folder / name, media_type=content_type)

    own = [Route(path, page_file, methods=["GET"]) for path in files]
    return Starlette(routes=[*own, *routes], middleware=[Middleware(Guard, names=frozenset(name.lower() for name in names))])


def find(root: Path, name: str, role: str) -> Path:
    """The file of a name, relative to `root` or absolute.

    Raises:
        ValueError: one that is not sent: missing, no image or clip, outside the root folder.
    """
    try:
        # Joining with an absolute path gives that path: both kinds are checked alike, after every link is followed.
        path = (root / (name if Path(name).is_absolute() else name.replace("\\", "/"))).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, a loop of links
        raise ValueError(f"{role}: no such file") from error
    if not path.is_relative_to(root):
        raise ValueError(f"{role}: lies outside the root folder, so it is not shown; start with a --root that holds it")
    if not path.is_file():
        raise ValueError(f"{role}: is not a file")
    if path.suffix.lower() not in _CONTENT_TYPES and not _is_image(path):
        raise ValueError(f"{role}: no image or clip by its name ({', '.join(_CONTENT_TYPES)}), and no image by its contents")
    return path


def _is_image(path: Path) -> bool:
    try:
        media.image_size(path)
    except ValueError:
        return False
    return True


def shown_as(path: Path) -> str:
    """clip or image."""
    return "clip" if _CONTENT_TYPES.get(path.suffix.lower(), "").startswith("video/") else "image"


async def send(path: Path) -> Response:
    """A file that `find` has found.

    Raises:
        ValueError: it cannot be read.
    """
    known = _CONTENT_TYPES.get(path.suffix.lower())
    if known is None:
        return Response(await run_in_threadpool(_as_png, path), media_type="image/png")
    return FileResponse(path, media_type=known)


async def json_body(request: Request, patience: float) -> Any:
    """The JSON value of a write.

    Raises:
        HTTPException: it is not whole within `patience` seconds, too long, breaks off or is no JSON.
    """
    try:
        body = await asyncio.wait_for(_read_body(request), patience)
    except asyncio.TimeoutError as error:
        message = f"no whole body within {patience:g} s"
        raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, message, {"connection": "close"}) from error
    except ClientDisconnect as error:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "the body broke off") from error
    try:
        return json_value(body)
    except ValueError as error:  # also bytes that are no UTF-8
        raise HTTPException(HTTPStatus.BAD_REQUEST, f"not JSON: {error}") from error


def listen(host: str, port: int, names: Sequence[str]) -> socket.socket:
    """A listening socket; an address that others can reach is said in a warning.

    Args:
        names: what browsers call this machine besides.

    Raises:
        ValueError: it is no address, or cannot be listened on, or a name is none.
    """
    for name in names:
        if not is_host_name(name):
            raise ValueError(f"--allow-host {name!r}: browsers would be refused; give a bare name or address, such as box or 192.168.0.7")
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise ValueError(f"--host {host}: not an address such as 127.0.0.1") from error
    if not address.is_loopback:
        if address.is_unspecified and not names:
            raise ValueError(f"--host {host}: say with --allow-host by which name or address browsers will call this machine")
        _cli.say(f"warning: --host {host}: everybody who can reach this address can see and decide; there is no password")
    if not 0 <= port < 65536:
        raise ValueError(f"--port {port}: from 0 to 65535")
    try:
        return socket.create_server((str(address), port), family=socket.AF_INET6 if address.version == 6 else socket.AF_INET)
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({error.strerror}); choose another port, or 0") from error


def serve(app: ASGIApp, host: str, listening: socket.socket) -> None:
    """Say the page's address and serve it until Ctrl-C."""
    where = f"[{host}]" if ":" in host else host
    _cli.say(f"http://{where}:{listening.getsockname()[1]}/   (Ctrl-C ends it)")
    uvicorn.Server(server_config(app)).run(sockets=[listening])


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY:
            raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"longer than {_MAX_BODY // 1024} KiB in all; shorten it")
    return bytes(body)


def _as_png(path: Path) -> bytes:
    buffer = io.BytesIO()
    media.load_image(path).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
