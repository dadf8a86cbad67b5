"""What the keys of a section are: numbers with bounds, paths, patterns, names; each with the reason that a wrong value is told."""

from __future__ import annotations

import os
import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from byg_plugin.documents import BACKSLASH


class Section(BaseModel):
    """Frozen, strict about types (a string is never taken for a number), and closed: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


LEAST, MOST = 1e-12, 1e6  # of what is multiplied into weights, losses and gradients, which are float32


def _not_lost(value: float) -> float:
    if 0 < value < LEAST:
        raise ValueError(f"is below {LEAST}, it would be lost in float32's rounding; 0 = none")
    return value


def why_no_path(text: str) -> str | None:
    """What is wrong with the text of a path or a hub id, wherever it points; None: nothing."""
    if not text.strip():
        return "is empty: name a place, or leave the key out"
    if control := next((letter for letter in text if unicodedata.category(letter) == "Cc"), None):
        return f"holds the control character {control!r}; {BACKSLASH}"
    if any(len(part.encode(errors="surrogatepass")) > _MOST_NAME for part in re.split(r"[/\\]", text)):
        return f"has a name of more than {_MOST_NAME} bytes between its slashes, which no file system takes"
    return None


_MOST_NAME = 255  # bytes of one name, on every usual file system
MOST_STEM = 128  # of a LoRA: suffixes follow, and a whole path on Windows has 260


def _path_text(text: str) -> str:
    if why := why_no_path(text):
        raise ValueError(why)
    return text


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    return text


_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def _stem(text: str) -> str:
    if _RESERVED.fullmatch(text):
        raise ValueError("is a device's name on Windows; choose another name, e.g. byg_lora")
    # Windows and macOS do not tell upper from lower case in file names.
    if text.lower() == "training":
        raise ValueError("a checkpoint keeps its own state in training.safetensors; choose another name, e.g. byg_lora")
    return text


NonNegative = Annotated[int, Field(ge=0, le=10**9)]
Steps = Annotated[int, Field(ge=0, le=10**8)]  # at a tenth of a second each, four months
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(ge=0.01, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, le=MOST), AfterValidator(_not_lost)]
Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Shift = Annotated[float, Field(ge=1e-3, le=1e3)]
Scale = Annotated[float, Field(ge=0.0, le=100.0)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # what torch's generators take
PathText = Annotated[str, AfterValidator(_path_text)]
LocalPath = Annotated[str, AfterValidator(_path_text), AfterValidator(os.path.expanduser)]  # no hub id: `~` is the user's folder
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_pattern)]
EditType = Annotated[str, Field(min_length=1, max_length=100)]
EditTypes = Annotated[tuple[EditType, ...], Field(strict=False)]  # a list in TOML
Stem = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9_-])?$", max_length=MOST_STEM), AfterValidator(_stem)]
