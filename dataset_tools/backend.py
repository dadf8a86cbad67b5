"""What the tools ask of a model, wherever it runs."""

from __future__ import annotations

import base64
import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from byg_plugin.data import media

_QUALITY = 92  # JPEG, of images that are encoded again
_TELLING = 30  # characters from which on a line of a prompt is recognised in what comes back
_SECRET = 8  # characters from which on a key is one; servers that want none are given an "x" or "EMPTY"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An encoded image."""

    mime: str
    data: bytes

    def url(self) -> str:
        """As a data URL."""
        return f"data:{self.mime};base64,{base64.b64encode(self.data).decode()}"

    def image(self) -> Image.Image:
        """Decoded, RGB."""
        return Image.open(io.BytesIO(self.data)).convert("RGB")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation: the user's and the model's turns alternate, the images belong to the first."""

    system: str
    turns: tuple[str, ...]
    pictures: tuple[Picture, ...] = ()
    seed: int = 0

    def then(self, answer: str, request: str) -> Chat:
        """Continued by the model's answer and another request."""
        return replace(self, turns=(*self.turns, answer, request), seed=self.seed + 1)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said; `cut` where it ran into max_tokens."""

    text: str
    cut: bool = False


class Refused(Exception):
    """This request failed for good, others may not. The message holds no key and no prompt."""


class Backend(Protocol):
    """A model."""

    model: str

    async def complete(self, chat: Chat) -> Answer:
        """The next turn.

        Raises:
            Refused: this one cannot be answered.
            ValueError: none can (no such server, wrong key, wrong model).
        """
        ...

    def scrub(self, text: str, chat: Chat) -> str:
        """`text` without keys and without lines of the prompt."""
        ...

    async def close(self) -> None: ...


def encode_image(path: Path, longest_side: int) -> Picture:
    """An image for a model: upright, RGB, scaled down to `longest_side`. A JPEG that needs nothing of it is sent as it is.

    Raises:
        ValueError: it cannot be read.
    """
    image = media.load_image(path)  # decoded whole in any case: half a file is an error here, not a half grey picture there
    if max(image.size) <= longest_side and (data := _plain_jpeg(path)) is not None:
        return Picture(mime="image/jpeg", data=data)
    return encode_frame(image, longest_side)


def encode_frame(image: Image.Image, longest_side: int) -> Picture:
    """An RGB image as JPEG, scaled down to `longest_side`."""
    if max(image.size) > longest_side:
        scale = longest_side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY)
    return Picture(mime="image/jpeg", data=out.getvalue())


def _plain_jpeg(path: Path) -> bytes | None:
    """The file's bytes if it is an RGB JPEG without metadata, which may turn it or say where it was taken."""
    data = path.read_bytes()
    if not data.startswith(b"\xff\xd8"):
        return None
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        plain = image.format == "JPEG" and image.mode == "RGB" and not {"exif", "icc_profile", "xmp", "comment"} & set(image.info)
    return data if plain else None


def redact(text: str, secrets: Sequence[str], chat: Chat) -> str:
    """`text` without secrets, images and lines of what was asked."""
    for secret in secrets:
        if len(secret) >= _SECRET:
            text = text.replace(secret, "[key]")
    text = re.sub(r"data:image/[\w+.-]+;base64,[A-Za-z0-9+/=]*", "[image]", text)
    lines = {line.strip() for said in (chat.system, *chat.turns[::2]) for line in said.split("\n")}
    for line in sorted(lines, key=len, reverse=True):
        if len(line) >= _TELLING:
            text = text.replace(line, "[prompt]")
    return text


def seed_of(seed: int, name: str) -> int:
    """A seed (31 bits) of the run's seed and an input's name."""
    return zlib.crc32(f"{seed}\0{name}".encode(errors="surrogateescape")) & 0x7FFFFFFF
