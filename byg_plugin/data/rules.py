"""What Appendix D.1 of the paper asks of a tuple's texts, as checks of the texts alone.

A broken hard rule makes a tuple useless or harmful: equal captions give the prior no direction, and a reverse instruction
that points to a state it does not name teaches nothing. The other findings are discouraged forms. Words in quotation
marks are skipped: an edit of a sign that says "NOW OPEN" is no temporal language.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ROLES = ("src_caption", "tgt_caption", "instruction", "reverse_instruction")
"""The texts of a tuple, by the names of its fields."""

EDIT_TYPES = (
    "color_change",
    "texture_change",
    "shape_adjustment",
    "add",
    "remove",
    "replace",
    "background_change",
    "style_change",
    "action_change",
    "text_manipulation",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something about a tuple. `reason` is a short name to count by; `hard` findings make the tuple unusable."""

    reason: str
    message: str
    hard: bool = True


# The sentence of each rule, as it is quoted to people and to models.
RULES = {
    "reverse_refers_back": "reverse_instruction must stand alone: no restore, revert, undo, original, previous, bring back or any other "
    "hint at an unknown earlier state; it names the state that it leads to",
    "target_temporal": "tgt_caption must describe the final image only: no now, no longer, changed to, turned into, has been replaced, "
    "previously or other language of time",
    "target_negative": "tgt_caption should say what is there, not what is absent: no without X, no X, not X, instead of X",
    "source_refers_to_edit": "src_caption must describe the image as it is seen: nothing of an edit, of a before or of an original",
    "source_style": "src_caption must name the style of an image that is no photograph",
    "target_style": "tgt_caption must name the style that the edit leads to",
    "captions_equal": "src_caption and tgt_caption must differ: they say what the edit changes",
    "instructions_equal": "instruction and reverse_instruction must differ: one undoes the other",
    "back_to": "reverse_instruction should name a state as such: change X to Y, not change X back to Y; remove the hat, not the added hat",
    "instruction_is_caption": "instruction should be a command, not a caption",
    "short": "captions should have at least three words, instructions two",
}

# Also capitalized words after "says" and the like, of captions that leave the marks out. 6" is no mark.
# Lengths are bounded: a model that repeats itself for pages must not cost minutes.
_QUOTED = re.compile(
    r"(?<!\d)\"[^\"]{0,200}\"|“[^”]{0,200}”|«[^»]{0,200}»|(?<!\w)['‘](?:[^'’]|['’](?=\w)){0,200}['’](?!\w)|"
    r"\b(?:says?|saying|reads?|reading|spells?|spelling|labell?ed|titled|words?|text|(?:text|words?|letters|sign)\b[^.;]{0,40}? to):?"
    r"(?:\s+[A-Z0-9][\w'’&!-]*)+"
)


def _words(*alternatives: str) -> re.Pattern[str]:
    return re.compile(r"\b(?:" + "|".join(alternatives) + r")\b", re.IGNORECASE)


_REFERS_BACK = _words(
    r"restor(?:e|es|ing|ation)",
    r"restored to",
    r"revert(?:s|ed|ing)?",
    r"un-?do(?:es|ing|ne)?",
    r"undid",
    r"re-?instat(?:e|es|ed|ing)",
    r"re-?add(?:s|ed|ing)?",
    r"reset(?! button)",
    r"roll(?:s|ed|ing)? back",
    r"originals?",
    r"originally",
    r"previous(?:ly)?(?!-)",
    r"formerly",
    r"initially",
    r"unedited",
    r"the (?:source|starting|first|input|unmodified|unaltered) (?:image|photo|photograph|picture|version|frame|video|clip)",
    r"(?:prior|initial|earlier|former) (?:state|version|look|appearance|colou?r|style|form|background|pose|shape)",
    # At the end of a clause: "like it was painted by a child" is no state of before.
    r"(?:as|like|than) (?:it|they|he|she) (?:was|were|did|had)(?=\s*(?:$|[.,;!]|before\b|at first\b|in the (?:photo|image|picture)))",
    r"(?:as|like|than) (?:before|earlier)",
    r"(?:colou?rs?|look|style|pose|shape|place|background) (?:it|they|he|she) (?:was|were|had)",
    r"the way (?:it|they|he|she) (?:was|were|looked)",
    r"what (?:it|they|he|she) (?:was|were|used to be)",
    r"used to (?:be|have|look|stand|show)",
    r"(?:bring|brings|bringing) (?:[\w'-]+ ){0,5}back",
    r"back to (?:normal|how|the way|what|before)",
    r"back to (?:its|their|his|her) (?:usual |normal |own |old )?(?:state|colou?rs?|look|appearance|form|shape|pose|place|position|style)",
    # To put the cat back tells nothing of where; a cat on its back is another matter.
    r"(?:change|switch|put|turn|give|add|convert|transform) (?:it|them|him|everything|(?:the|a|an|his|her|their) (?:[\w-]+ ){0,3}?[\w-]+) "
    r"(?<!\bthe )(?<!\bits )(?<!\bhis )(?<!\bher )(?<!\btheir )(?<!\ba )back(?=\s*(?:$|[.,;!]))",
    r"(?:reverse|cancel|remove|take back) the (?:edits?|changes?|modifications?|transformation|effects?(?=\s*(?:$|[.,;!])))",
)
# Between the command and "back", words after which it tells where somebody looks or what is behind.
_BACK = re.compile(
    r"\b(?:change|changes|turn|switch|set|make|convert|transform|return|put|place|add|move|go)\b"
    r"(?:(?!\b(?:look|looks|looking|lean|leans|leaning|run|runs|running|walk|walks|walking|pulled|swept|combed|slicked|tied|brushed)\b)[^.;]){0,60}?"
    r"(?<!'s )(?<!\bits )(?<!\bhis )(?<!\bher )(?<!\btheir )(?<!\bthe )\bback (?:to|into|in|on|onto|at)\b|"
    r"\bagain\b|\bonce more\b|\bthe (?:(?:newly|recently|just) )?(?:added|removed|changed|edited)\b",
    re.IGNORECASE,
)
_CHANGED = (
    r"(?:changed|replaced|removed|added|turned|transformed|converted|altered|edited|modified|recolou?red|repainted|swapped|erased|deleted)"
)
_TEMPORAL = _words(
    r"now",
    r"no longer",
    r"any ?more",
    r"became",
    r"(?:changed|turned|repainted|recolou?red) from",
    r"(?:newly|recently) " + _CHANGED,
    r"the (?:edited|modified|altered|updated|resulting|original|source) (?:image|photo|photograph|picture|version|scene|video|clip)",
    r"(?:changed|transformed|converted|altered|recolou?red|repainted) (?:in)?to",
    r"(?:turned|morphed) into",
    r"(?:replaced|swapped) (?:by|with|for)",
    r"(?:has|have|had) been " + _CHANGED,
    r"(?:has|have|had) (?:become|changed|turned|disappeared|vanished)",
    r"(?:was|were) (?:once|previously|formerly|originally)",
    r"previously",
    r"formerly",
    r"originally",
    r"used to (?:be|have|show|stand)",
    r"after (?:the )?(?:edit|editing|change|modification|transformation)",
)
_NEGATIVE = _words(
    r"without",
    r"(?:with|has|have|is|are|wears?|shows?|there(?:'s| is| are)) no",
    r"(?<!-)not(?!-| (?:only|just|far)\b)",
    r"\w+n['’]t",
    r"nobody",
    r"none",
    r"neither",
    r"never(?!-)",
    r"gone",
    r"no[- ]one",
    r"empty of",
    r"lack(?:s|ing)?",
    r"devoid of",
    r"absen(?:t|ce)",
    r"free of(?! charge)",
    r"instead of",
    r"rather than",
    r"missing",
    r"removed",
)
_OF_AN_EDIT = _words(
    r"(?:before|prior to) (?:the )?(?:edit|editing|change|modification)",
    r"unedited",
    r"(?:edited|modified) (?:image|photo|photograph|picture|version|scene|video|clip)",
    r"(?:to|will|should|must|can) be " + _CHANGED,
    r"(?<!\ban )original (?:image|photo|photograph|picture|version|state|scene|video|clip)",
)

# Adjectives and nouns that say how a picture is made.
_PHOTO = re.compile(
    r"\b(?:photos?|photograph(?:s|y|ic|ed)?|photo-?real\w*|snapshot|(?:hyper|photo-?)?realistic|real[- ]life|live[- ]action|dslr)\b",
    re.IGNORECASE,
)
_DRAWN = re.compile(r"\b(?:paint\w*|draw\w*|sketch\w*|illustrat\w*|render\w*|cgi|3d|anime|cartoon\w*|comics?)\b")
_PHOTO_LABELS = ("photo", "photograph", "photography", "photorealistic", "realistic", "real", "natural", "none", "live action")


def is_photorealistic(style: str) -> bool:
    """Whether a style label of some metadata means a photograph."""
    plain = re.sub(r"[\s_-]+", " ", style.strip().casefold())
    return plain in _PHOTO_LABELS or (bool(_PHOTO.search(plain)) and not plain.startswith(("non", "not ")) and not _DRAWN.search(plain))


def names_style(caption: str, style: str) -> bool:
    """Whether a caption names a style: one of the label's telling words, or for photorealistic any word for a photograph."""
    if is_photorealistic(style):
        return bool(_PHOTO.search(caption))
    words = [word for word in re.findall(r"\w+", style.casefold()) if word not in _WEAK]
    present = set(re.findall(r"\w+", caption.casefold()))
    # A label such as "oil painting" may come as "painted in oils".
    return any(any(_same_stem(word, other) for other in present) for word in words) if words else True


_WEAK = frozenset({"style", "art", "a", "an", "the", "in", "of", "like", "picture", "image", "non", "book", "glass", "wash"})


def _same_stem(a: str, b: str) -> bool:
    # 3d, ink: short labels only as they are.
    return a == b or (min(len(a), len(b)) >= 5 and (a.startswith(b[:5]) or b.startswith(a[:5])))


def check_texts(texts: Mapping[str, str], *, source_style: str | None = None, target_style: str | None = None) -> Iterator[Finding]:
    """Findings on src_caption, tgt_caption, instruction and reverse_instruction (all non-empty).

    Args:
        texts: the four texts by field name; others are ignored.
        source_style: what metadata says of how the source is made; None: unknown.
        target_style: style that the edit was asked to lead to; None: free.
    """
    src, tgt, instruction, reverse = (texts[name] for name in ROLES)
    yield from _found("reverse_refers_back", "reverse_instruction", reverse, _REFERS_BACK)
    yield from _found("target_temporal", "tgt_caption", tgt, _TEMPORAL)
    yield from _found("source_refers_to_edit", "src_caption", src, _OF_AN_EDIT)
    if _plain(src) == _plain(tgt):
        yield Finding(reason="captions_equal", message=f"src_caption and tgt_caption are equal: {src!r}")
    if _plain(instruction) == _plain(reverse):
        yield Finding(reason="instructions_equal", message=f"instruction and reverse_instruction are equal: {instruction!r}")
    if source_style and not is_photorealistic(source_style) and not names_style(src, source_style):
        yield Finding(reason="source_style", message=f"src_caption does not name the image's style {source_style!r}: {src!r}")
    if target_style and not names_style(tgt, target_style):
        yield Finding(reason="target_style", message=f"tgt_caption does not name the style {target_style!r}: {tgt!r}")
    yield from _found("target_negative", "tgt_caption", tgt, _NEGATIVE, hard=False)
    yield from _found("back_to", "reverse_instruction", reverse, _BACK, hard=False)
    if _plain(instruction) in (_plain(src), _plain(tgt)):
        yield Finding(reason="instruction_is_caption", message=f"instruction is a caption: {instruction!r}", hard=False)
    for name, least in zip(ROLES, (3, 3, 2, 2), strict=True):
        # Scripts without blanks between words are not counted.
        if texts[name].isascii() and len(texts[name].split()) < least:
            yield Finding(reason="short", message=f"{name} = {texts[name]!r} has fewer than {least} words", hard=False)


def _found(rule: str, field: str, text: str, pattern: re.Pattern[str], *, hard: bool = True) -> Iterator[Finding]:
    match = pattern.search(_QUOTED.sub('""', text))
    if match:
        yield Finding(reason=rule, message=f"{field} has {match.group(0)!r}: {text!r}", hard=hard)


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[\s.!,;:]+", " ", text).split()).casefold()
