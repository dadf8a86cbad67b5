"""Appendix D.2: styles, the template that names one, and tuples whose two captions differ in the style alone."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byg_plugin.data.rules import Finding, check_texts, is_photorealistic
from byg_plugin.data.video_styles import INSTRUCTIONS, STYLES, wrap
from byg_plugin.journal import numbered_records, read_records, write_records

from .backend import seed_of
from .pool import only_writer

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


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Sources marked for validation.

    Attributes:
        marked: how many, by style.
        passed_over: how many sources there are of styles with too few of them to hold any out.
    """

    marked: Mapping[str, int]
    passed_over: Mapping[str, int]

    def __str__(self) -> str:
        passed_over = f"; passed over for too few sources: {_counted(self.passed_over)}" if self.passed_over else ""
        return f"held out for validation: {_counted(self.marked) or 'none'}{passed_over}"


def _counted(styles: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {style or 'of no known style'}" for style, count in sorted(styles.items()))


def hold_out(path: Path, per_style: int, *, required: bool = True) -> HeldOut:
    """Mark `per_style` tuples of each source style (whole sources) with split = "validation", all others with none; atomically.

    The choice hangs on the sources' names alone: other tuples do not change it. A style with no more sources than that is passed
    over: nothing would be left of it to train on.

    Args:
        required: an error where no style has enough; otherwise no tuple is marked then.

    Raises:
        ValueError: see `required`; another process is writing the file; or a line is no tuple.
    """
    lock = only_writer(path, "hold out when it has ended")
    try:
        by_style: dict[str, set[str]] = defaultdict(set)
        for number, record in numbered_records(path):
            if not isinstance(record.get("source"), str):
                raise ValueError(f"{path}: line {number} has no source; validate.py says what is wrong with the file")
            by_style[style_of(record)].add(record["source"])
        few = {style: len(sources) for style, sources in by_style.items() if per_style >= len(sources)}
        if required and len(few) == len(by_style):
            raise ValueError(f"{path}: {per_style} sources of each style are to be held out, there are {_counted(few)}; hold out fewer")
        chosen = {source for style in by_style.keys() - few.keys() for source in _first(by_style[style], per_style)}
        write_records(path, (_marked(record, record["source"] in chosen) for record in read_records(path)))
    finally:
        lock.release()
    return HeldOut(marked={style: len(by_style[style] & chosen) for style in by_style.keys() - few.keys()}, passed_over=few)


def _first(sources: Iterable[str], count: int) -> list[str]:
    """So many in a stable random order."""
    return sorted(sources, key=lambda source: hashlib.sha256(source.encode(errors="surrogatepass")).hexdigest())[:count]


def style_of(record: Mapping[str, Any]) -> str:
    """The style of a tuple's source, as its side data says."""
    meta = record.get("meta")
    return str(meta.get("source_style", "")) if isinstance(meta, dict) else ""


def _marked(record: Mapping[str, Any], held_out: bool) -> dict[str, Any]:
    rest = {key: value for key, value in record.items() if key != "split"}
    return {**rest, "split": "validation"} if held_out else rest
