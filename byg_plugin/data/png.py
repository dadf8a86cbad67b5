"""What must be mended of a PNG before Pillow reads it rightly: texts without end, colours that are transparent in other depths."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# Pillow looks for the orientation in these. Whatever other texts say (an editor's workflow has megabytes) concerns no pixel.
_ORIENTATION = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"exif\0")
_PILLOW_TAKES = 1 << 20  # bytes of an unpacked text or profile; with more Pillow refuses the whole picture
_MOST = 1 << 25  # bytes of a chunk that is looked into, and of an unpacked profile: printers' tables have a few MiB


def readable(file: BinaryIO) -> tuple[BinaryIO, bytes | None]:
    """The file as Pillow takes it, and the colour profile that is too large for Pillow (empty where it is no use either).

    Only a PNG changes. Pillow's limits on texts are the whole process's, so they are left alone, and chunks beyond them are
    passed over here.

    Args:
        file: at its beginning; it stays open as long as the picture is read.
    """
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        file.seek(0)
        return file, None
    profile: bytes | None = None
    pieces: list[tuple[int, int]] = []
    kept_from = 0
    for kind, start, end in _chunks(file):
        if kind not in (*_TEXTS, b"iCCP"):
            continue
        file.seek(start + 8)
        contents = file.read(min(end - start - 12, _MOST))
        large = len(_unpacked(_packed(kind, contents), _PILLOW_TAKES + 1)) > _PILLOW_TAKES
        if kind == b"iCCP" and large:
            whole = _unpacked(_packed(kind, contents), _MOST + 1)
            profile = whole if len(whole) <= _MOST else b""
        if large or (kind in _TEXTS and not contents.startswith(_ORIENTATION)):
            pieces.append((kept_from, start))
            kept_from = end
    length = file.seek(0, io.SEEK_END)
    file.seek(0)
    return (io.BufferedReader(_Pieces(file, [*pieces, (kept_from, length)])) if pieces else file), profile


def mend_transparency(image: Image.Image) -> bool:
    """Bring a PNG's transparent colour into the depth of its pixels; whether Pillow (some version) leaves it in the file's.

    Greys of 2 and 4 bits are scaled up to 8, and of 16-bit RGB the high bytes are kept: colours that share them with the
    transparent one are transparent too. 16-bit greys are compared as they are, by `media.to_rgb`.
    """
    colour = image.info.get("transparency")
    if image.format != "PNG" or colour is None or not image.tile:
        return False
    depth = image.tile[0][3]
    if depth in ("L;2", "L;4"):
        image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[depth]
    elif depth == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    elif depth == "1":
        image.info["transparency"] = 255 if colour else 0
    else:
        return image.mode.startswith("I")
    return True


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte, end) of each whole chunk, as far as the file goes."""
    length = file.seek(0, io.SEEK_END)
    start = len(_SIGNATURE)
    while start + 12 <= length:
        file.seek(start)
        head = file.read(8)
        end = start + 12 + int.from_bytes(head[:4], "big")
        if end > length:  # cut off, or no chunk at all: Pillow says so
            return
        yield head[4:], start, end
        start = end


def _packed(kind: bytes, contents: bytes) -> bytes:
    """The packed part of a chunk after its name; empty where it is not packed."""
    rest = contents.partition(b"\0")[2]
    if kind == b"iTXt":  # flag, method, language, zero, translated name, zero, text
        return rest[2:].split(b"\0", 2)[-1] if rest[:1] == b"\1" else b""
    return rest[1:] if kind in (b"zTXt", b"iCCP") else b""


def _unpacked(packed: bytes, most: int) -> bytes:
    """At most so many bytes; none where it is damaged."""
    try:
        return zlib.decompressobj().decompress(packed, most)
    except zlib.error:
        return b""


class _Pieces(io.RawIOBase):
    """A file as if it had only some of its bytes."""

    def __init__(self, file: BinaryIO, pieces: list[tuple[int, int]]):
        self._file, self._pieces = file, [piece for piece in pieces if piece[0] < piece[1]]
        self._length = sum(end - start for start, end in self._pieces)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        offset = self._at
        for start, end in self._pieces:
            if offset < end - start:
                self._file.seek(start + offset)
                data = self._file.read(min(len(buffer), end - start - offset))
                buffer[: len(data)] = data
                self._at += len(data)
                return len(data)
            offset -= end - start
        return 0
