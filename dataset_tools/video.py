"""Appendix D.2: styles, the template that names one, and tuples whose two captions differ in the style alone."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from byg_plugin.data.rules import Finding, check_texts, is_photorealistic
from byg_plugin.data.video_styles import INSTRUCTIONS, STYLES, wrap
from byg_plugin.journal import numbered_records, read_records, write_records

from .backend import seed_of

_HINTS = re.compile(
    r"\b(?:cartoon\w*|anime|animat(?:ed|ion)s?|illustrat(?:ed|ion)s?|photo-?realis\w*|hyper-?realis\w*|realistic(?:ally)?|cinematic\w*|CGI|"
    r"3-?D|2-?D|render(?:ed|ing)s?|pixar|claymation|stop[- ]motion|watercolou?r|oil painting|sketch(?:ed)?|comic|footage|"
    r"live[- ]action|film grain|vintage film|black[- ]and[- ]white|sepia|in the style of|art ?style|stylized)\b",
    re.IGNORECASE,
)


def style_hint(caption: str) -> str | None:
    """The first word that says how a video is made; None if the caption is free of them."""
    match = _HINTS.search(caption)
    return match.group(0) if match else None


def plain_style(said: str) -> str:
    """A style as a model says it, as one of `STYLES` where it is one of them."""
    text = " ".join(said.casefold().split())
    if is_photorealistic(text) or "live" in text or "real" in text:
        return "photo-realistic"
    if re.search(r"cartoon|anime|animation|animated", text) and not re.search(r"3-?d|cgi", text):
        return "cartoon"
    return text.removesuffix(" style")


def other_style(style: str, name: str) -> str:
    """The style that a clip is turned to: the other one, or either for a clip of a third style."""
    others = [one for one in STYLES if one != style]
    return others[seed_of(0, name) % len(others)]


def video_tuple(source: str, name: str, caption: str, style: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The tuple of one clip; `caption` is free of style."""
    target = other_style(style, name)
    words = INSTRUCTIONS[seed_of(1, name) % len(INSTRUCTIONS)]
    return {
        "source": source,
        "src_caption": wrap(caption, style),
        "tgt_caption": wrap(caption, target),
        "instruction": words.format(style=target),
        "reverse_instruction": words.format(style=style),
        "edit_type": "style_change",
        "id": name,
        "meta": {"source_style": style, "target_style": target, "caption": caption, **meta},
    }


def check_caption(caption: str, style: str) -> Iterator[Finding]:
    """What keeps a caption from serving in a tuple, as source and as target."""
    if hint := style_hint(caption):
        yield Finding(reason="style_hint", message=f"it still says {hint!r}: {caption!r}")
    yield from check_texts(video_tuple("x", "x", caption, style, {}), source_style=style)


def hold_out(path: Path, per_style: int) -> dict[str, int]:
    """Mark `per_style` tuples of each source style (whole sources) with split = "validation", all others with none; atomically.

    The choice hangs on the sources' names alone: other tuples do not change it.

    Returns:
        How many sources are held out by style.

    Raises:
        ValueError: a style has no more sources than are to be held out, or a line is no tuple.
    """
    by_style: dict[str, set[str]] = defaultdict(set)
    for number, record in numbered_records(path):
        if not isinstance(record.get("source"), str):
            raise ValueError(f"{path}: line {number} has no source; validate.py says what is wrong with the file")
        by_style[style_of(record)].add(record["source"])
    chosen: set[str] = set()
    for style, sources in by_style.items():
        if per_style >= len(sources):
            raise ValueError(f"{path}: {per_style} clips of style {style!r} are to be held out, there are {len(sources)}; hold out fewer")
        chosen |= set(sorted(sources, key=lambda source: hashlib.sha256(source.encode(errors="surrogatepass")).hexdigest())[:per_style])
    write_records(path, (_marked(record, record["source"] in chosen) for record in read_records(path)))
    return {style: len(sources & chosen) for style, sources in by_style.items()}


def style_of(record: Mapping[str, Any]) -> str:
    """The style of a tuple's source, as its side data says."""
    meta = record.get("meta")
    return str(meta.get("source_style", "")) if isinstance(meta, dict) else ""


def _marked(record: Mapping[str, Any], held_out: bool) -> dict[str, Any]:
    rest = {key: value for key, value in record.items() if key != "split"}
    return {**rest, "split": "validation"} if held_out else rest
