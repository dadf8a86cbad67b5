"""Edits without a model: color, background and style, from captions alone. What leads back is a word of the caption itself.

Only what is certain is served: a color word before its object, a place phrase, a style that metadata or caption state.
Every other image is refused with the reason.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from byg_plugin.data.rules import is_photorealistic

TYPES = ("color_change", "background_change", "style_change")
COLORS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "brown", "black", "white", "gray", "turquoise")
_COLOR_WORDS = (*COLORS, "grey", "golden", "silver", "beige", "violet", "teal")
# Noun phrase and the phrase that says where.
PLACES = {
    "beach": "on a beach",
    "forest": "in a forest",
    "desert": "in a desert",
    "meadow": "in a meadow",
    "park": "in a park",
    "city street": "on a city street",
    "snowy field": "in a snowy field",
    "harbor": "in a harbor",
    "mountain lake": "by a mountain lake",
    "kitchen": "in a kitchen",
    "library": "in a library",
    "vineyard": "in a vineyard",
}
_PLACE_WORDS = (
    "beach|forest|woods|desert|meadow|park|street|road|field|harbou?r|lake|kitchen|library|vineyard|garden|river|mountain|mountains|room|"
    "bedroom|office|city|town|village|farm|yard|lawn|shore|hill|hillside|valley|jungle|square|alley|studio|workshop"
)
STYLES = ("watercolor", "oil painting", "anime", "ukiyo-e", "charcoal", "pencil sketch", "pastel", "pop art", "mosaic", "linocut")

_STOP = frozenset(
    re.findall(
        r"\w+",
        "a an the and or with without on in at by of to from for over under near beside behind before against into through is are was were "
        "has have that which who while as next between around along its their his her",
    )
)
# After a color word these are no objects of that color; of people it says no color at all.
_NO_OBJECT = frozenset(
    re.findall(
        r"\w+",
        "light lighting photo photograph picture image tones color colors colour colours background sky hair skin eyes one ones house "
        "friday man men woman women person persons people boy boys girl girls guy guys lady ladies gentleman gentlemen child children kid "
        "kids baby babies toddler teenager teenagers couple family male males female females american americans folks crowd",
    )
)
_COLOR = re.compile(
    rf"\b((?:(?:dark|light|bright|pale|deep|hot|pastel|navy|sky)[ -])?(?:{'|'.join(_COLOR_WORDS)}))\b((?:\s+[a-z][a-z'-]*)+)", re.IGNORECASE
)
_ANY_COLOR = re.compile(rf"\b(?:{'|'.join(_COLOR_WORDS)})\b", re.IGNORECASE)
_IN_PLACE = re.compile(
    rf"\b(?:in|on|at|by|near|along|across)\s+(?:(a|an|the)\s+)((?:(?!of\b|the\b|an?\b|and\b)[a-z-]+\s+){{0,2}}(?:{_PLACE_WORDS}))"
    # A noun that follows makes another thing of it: a street sign.
    rf"(?=\s*(?:[.,;:]|$)|\s+(?:{'|'.join(sorted(_STOP))})\b)",
    re.IGNORECASE,
)
# What a caption may begin with that is no name.
_NO_NAME = frozenset(re.findall(r"\w+", "a an the one two three four five six some several many people this there")) | set(_COLOR_WORDS)
# At the beginning alone: a photo that somebody in a painting holds says nothing of the painting.
_MEDIUM = re.compile(
    r"(?:(?:an?|the)\s+)?((?:(?:black[- ]and[- ]white|monochrome|sepia|colou?r|close-?up|aerial|macro|old|vintage|blurry|grainy)\s+)*)"
    r"(photo|photograph|snapshot|picture|image)\s+of(?:\s+|$)",
    re.IGNORECASE,
)


class NotServed(ValueError):
    """No rule fits; `reason` is a short name to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def propose(caption: str | None, style: str | None, order: Sequence[str], rng: random.Random) -> dict[str, str]:
    """The five fields, of the first edit type in `order` that the caption allows.

    Raises:
        NotServed: there is no caption, or none of the types fits it.
    """
    if not caption:
        raise NotServed("no_caption", "there is no caption: give a .txt of the same name, or a caption column")
    caption = " ".join(caption.split()).rstrip(".")
    if not re.search(r"\w", caption):
        raise NotServed("no_caption", f"the caption {caption!r} has no word; say what the image shows")
    for edit_type in order:
        make = {"color_change": _color, "background_change": _background}.get(edit_type)
        texts = make(caption, rng) if make else _style(caption, style, rng) if edit_type == "style_change" else None
        if texts is None:
            continue
        src, instruction, tgt, reverse = texts
        if style and not is_photorealistic(style) and edit_type != "style_change":
            src, tgt = f"{src}, {style} style", f"{tgt}, {style} style"
        return {
            "edit_type": edit_type,
            "src_caption": src,
            "instruction": instruction,
            "tgt_caption": tgt,
            "reverse_instruction": reverse,
        }
    raise NotServed("no_rule", f"no single-colored object, no place and no known style in the caption {caption!r}")


FourTexts = tuple[str, str, str, str]


def _color(caption: str, rng: random.Random) -> FourTexts | None:
    """Another color for an object that is named once with one color."""
    candidates = []
    for match in _COLOR.finditer(caption):
        color, noun = match[1], _noun(match[2])
        before = caption[: match.start()].rstrip()
        mixed = re.search(rf"(?:\b(?:{'|'.join(_COLOR_WORDS)})\s*(?:,|and|or|-)|-)$", before, re.IGNORECASE)
        # A woman in black holding a bag.
        worn = re.search(r"\bin$", before, re.IGNORECASE) and noun and noun.casefold().split()[0].endswith(("ing", "ed"))
        if noun and not mixed and not worn and len(re.findall(rf"\b{re.escape(noun)}\b", caption, re.IGNORECASE)) == 1:
            candidates.append((match.start(1), color, noun))
    if not candidates:
        return None
    start, old, noun = rng.choice(candidates)
    used = {color.casefold() for color in _ANY_COLOR.findall(caption)}
    others = [color for color in COLORS if color not in used and not (color == "gray" and "grey" in used)]
    if not others:
        return None
    new = rng.choice(others)
    tgt = _with_article(caption[:start], new) + (new.capitalize() if old[0].isupper() else new) + caption[start + len(old) :]
    command = f"change the color of the {noun} to "
    return caption, command + new, tgt, command + old.casefold()


def _noun(after: str) -> str | None:
    """The noun phrase at the beginning of what follows a color word."""
    words: list[str] = []
    for word in after.split()[:3]:
        if word.casefold().endswith(("'s", "s'")):
            return None
        if word.casefold() in _STOP or (words and word.casefold().endswith(("ing", "ed"))):
            break
        words.append(word)
    if not words or words[0].casefold() in _NO_OBJECT or _ANY_COLOR.fullmatch(words[0]):
        return None
    # Without a grammar a third word is as often a verb as a part of the name.
    return " ".join(words[:2] if len(words) > 2 else words)


def _background(caption: str, rng: random.Random) -> FourTexts | None:
    """Another place for a caption that names one."""
    found = list(_IN_PLACE.finditer(caption))
    if len(found) != 1:
        return None
    phrase, scene = found[0], found[0][2].casefold()
    new = rng.choice([name for name in PLACES if name.split()[-1] not in scene and scene.split()[-1] not in name])
    tgt = caption[: phrase.start()] + PLACES[new] + caption[phrase.end() :]
    command = "change the background to "
    return caption, command + _a(new), tgt, command + (f"the {scene}" if scene.endswith("s") else _a(scene))


def _style(caption: str, style: str | None, rng: random.Random) -> FourTexts | None:
    """A photograph to a style, or a picture of a known style to a photograph."""
    medium = _MEDIUM.match(caption)
    content = caption[medium.end() :] if medium else caption
    if not re.search(r"\w", content):
        return None
    content = content[0].lower() + content[1:] if content.split()[0].casefold() in _NO_NAME else content
    if style and not is_photorealistic(style):
        drawn = f"{content}, {style} style"
        return drawn, "turn the image into a photograph", f"a photo of {content}", f"turn the image into {style} style"
    if style or (medium and medium[2].casefold() in ("photo", "photograph", "snapshot")):
        new = rng.choice(STYLES)
        look = medium[1].casefold() if medium else ""
        photo = _a(f"{look}photo of {content}")
        return photo, f"turn the image into {new} style", f"{content}, {new} style", f"turn the image into {_a(f'{look}photograph')}"
    return None


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _with_article(before: str, word: str) -> str:
    """`before` with the article at its end as `word` needs it."""
    match = re.search(r"\b(an?)(\s+)$", before, re.IGNORECASE)
    if match is None:
        return before
    article = ("An" if word[0] in "aeiou" else "A") if match[1][0] == "A" else ("an" if word[0] in "aeiou" else "a")
    return before[: match.start()] + article + match[2]
