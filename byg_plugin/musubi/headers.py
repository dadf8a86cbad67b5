"""The headers of the model files in `[musubi]`, read before the host reads them: of a damaged one it asks for terabytes of memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from byg_plugin.config.fields import why_no_path

# The host's DiTs are safetensors files whatever they are called; of the rest some may be pickles.
_DITS = ("dit", "dit_high_noise")
_OTHERS = ("vae", "t5", "text_encoder", "text_encoder1", "text_encoder2")


def problems_of_headers(given: Mapping[str, Any]) -> list[str]:
    """What cannot be read, a sentence each. Files that are not there are somebody else's to tell.

    Args:
        given: `[musubi]`.
    """
    found = []
    for name in (*_DITS, *_OTHERS):
        path = given.get(name)
        if not isinstance(path, str) or why_no_path(path) or not Path(path).is_file():
            continue
        if name in _DITS or path.lower().endswith(".safetensors"):
            found += [f"musubi.{name} = {path!r}: {why}" for part in _parts(Path(path)) if (why := _why_unreadable(part))][:1]
    return found


def _parts(path: Path) -> Iterator[Path]:
    """The host reads all of `…-00001-of-00003.safetensors`, whichever is named."""
    split = re.fullmatch(r"(.*?)\d+-of-(\d+)\.safetensors", path.name)
    if split is None:
        yield path
        return
    count = min(int(split[2]), 1000)
    yield from (path.with_name(f"{split[1]}{index:05d}-of-{count:05d}.safetensors") for index in range(1, count + 1))


def _why_unreadable(path: Path) -> str | None:
    if not path.is_file():
        return f"{path.name} is not beside it, and the host reads all parts"
    try:
        with safe_open(path, framework="pt"):
            return None
    except (OSError, SafetensorError) as error:
        return f"{path.name} is not a readable safetensors file ({error}); download it again"
