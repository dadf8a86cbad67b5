"""From what a model said to the object that was asked for, or the reason why there is none.

Repairs are of form only. What a repair would lose, cut off or have to choose is refused: the caller asks again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import json_repair

# Tags by what they are called: <think>, <seed:think>, <|begin_of_thought|>, <|END_THINKING|>, [THINK]. Lengths are bounded, or a
# long word would be searched again from each of its letters.
_TAG = r"[\w:.-]{0,20}(?:think|thought|reason|reflect|analysis|scratch_?pad|rationale|monologue)[\w:.-]{0,20}"
_CLOSING = re.compile(
    rf"</{_TAG}>|<\|/{_TAG}\|>|<\|end[_-]{_TAG}\|>|<\|{_TAG}[_-]end\|>|\[/think(?:ing)?\]|◁/think(?:ing)?▷|<unused95>"
    r"|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)
# At the start of a line: inside an object it is a text's.
_OPENING = re.compile(
    rf"^[ \t]*(?:<{_TAG}(?:\s[^<>]{{0,200}})?>|<\|(?!end[_-]){_TAG}(?<![_-]end)\|>|\[think(?:ing)?\]|◁think(?:ing)?▷|<unused94>"
    r"|<\|channel\|>(?:analysis|commentary)<\|message\|>)",
    re.IGNORECASE | re.MULTILINE,
)
_LABEL = re.compile(r"[ \t]*[\w+-]*[ \t]*\r?\n?")  # of a fence: its language
# Names that models give to the fields, after case and separators are gone.
_ALIASES = {
    "sourcecaption": "src_caption",
    "targetcaption": "tgt_caption",
    "reverse": "reverse_instruction",
    "inverseinstruction": "reverse_instruction",
    "editinstruction": "instruction",
    "forwardinstruction": "instruction",
    "type": "edit_type",
    "category": "edit_type",
    "edittype": "edit_type",
    "scores": "score",
}
_PLACEHOLDER = re.compile(r"(?:\.{2,}|…|<[^<>]*>|\[[^\[\]]*\]|string)?")
_DEEPEST = 4  # an answer inside {"result": {...}} is found, one deeper than this is not looked for
# What asks for a few sentences is never answered by more; repairs of more would take minutes.
_LONGEST = 100_000  # characters after the thinking
_MOST_PIECES = 200
_MOST_BRACES = 1000
_QUOTED = 200  # characters of a wrong value that a message shows


class Unparsable(ValueError):
    """No object could be taken from an answer. `reason` is a short name to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


Values = Callable[[Mapping[str, Any], Sequence[str]], dict[str, str]]
"""What an object's values under the fields' names are read as; raises `Unparsable`."""


def parse_answer(text: str, fields: Sequence[str], values: Values | None = None) -> dict[str, str]:
    """The one object in `text` that has all `fields`, as stripped texts; other fields are dropped.

    Args:
        values: reads them otherwise than as texts.

    Raises:
        Unparsable: there is none (with what is wrong of the nearest one), or several that differ.
    """
    answer = without_thinking(text).strip()
    if not answer:
        raise Unparsable("empty", "the answer is empty")
    if len(answer) > _LONGEST:
        raise Unparsable("too_long", f"the answer has {len(answer)} characters; {_LONGEST} are read")
    try:
        return _parse(answer, fields, values or _texts)
    except RecursionError:
        raise Unparsable("no_object", "the answer is nested without end") from None


def _parse(answer: str, fields: Sequence[str], values: Values) -> dict[str, str]:
    whole: list[dict[str, str]] = []
    nearest: Unparsable | None = None
    for candidate in _candidates(answer):
        try:
            parsed = _read(candidate)
        except Unparsable as error:
            nearest = nearest or error
            continue
        for value in _objects(parsed):
            found = _by_field(value, fields)
            said = [text for text in found.values() if isinstance(text, str)]
            if not found or (said and all(map(_is_placeholder, said))):
                continue
            try:
                item = values(found, fields)
            except Unparsable as error:
                nearest = error
                continue
            if item not in whole:
                whole.append(item)
        if whole:
            break
    if len(whole) > 1:
        raise Unparsable("several", f"{len(whole)} different objects; one is asked for")
    if whole:
        return whole[0]
    raise nearest or Unparsable("no_object", "no JSON object in the answer")


def without_thinking(text: str) -> str:
    """What is said outside the thinking, whatever tags it stands in. Some servers leave out the opening tag, which their prompt had.

    Raises:
        Unparsable: the thinking does not end, and nothing stands before it.
    """
    end = 0
    for closing in _CLOSING.finditer(text):
        end = closing.end()
    answer = text[end:]
    if opening := _OPENING.search(answer):
        answer = answer[: opening.start()]
        if not answer.strip():
            raise Unparsable("unfinished_thinking", "the answer ends inside the thinking")
    return answer


def is_silent(text: str) -> bool:
    """Whether nothing stands in an answer but thinking that has ended."""
    try:
        return not without_thinking(text).strip()
    except Unparsable:
        return False


def _candidates(text: str) -> Iterator[list[str]]:
    """Groups of pieces that may hold the object, the likeliest first."""
    # A fence inside a text of the object would cut it: then the whole answer comes next.
    yield [piece for fenced in _fenced(text) for piece in (list(_braced(fenced)) or ([fenced] if "{" in fenced else []))]
    yield list(_braced(text))
    first, last = text.find("{"), text.rfind("}")
    if first >= 0:
        yield [text[first : last + 1] if last > first else text[first:]]
        yield [text[first:]]


def _fenced(text: str) -> Iterator[str]:
    """What stands in closed fences. Not by one regular expression: over an open one it takes the square of the length."""
    parts = text.split("```")
    for fenced in parts[1:-1:2]:
        label = _LABEL.match(fenced)
        yield fenced[label.end() :] if label else fenced


def _braced(text: str) -> Iterator[str]:
    """Stretches of balanced braces, as far as double quotes tell strings."""
    depth, start, inside, escaped = 0, 0, False, False
    for index, char in enumerate(text):
        if inside:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == '"':
                inside = False
        elif char == '"' and depth:
            inside = True
        elif char == "{":
            start = index if depth == 0 else start
            depth += 1
        elif char == "}" and depth:
            depth -= 1
            if depth == 0:
                yield text[start : index + 1]


def _read(pieces: Iterable[str]) -> list[Any]:
    """Values of one group of pieces.

    Raises:
        Unparsable: a piece is cut off, or no repair keeps what it says.
    """
    values = []
    problem: Unparsable | None = None
    pieces = iter(pieces)
    for piece in islice(pieces, _MOST_PIECES):
        try:
            values.append(json.loads(piece, strict=False, object_pairs_hook=_object))
        except Unparsable:
            raise
        except RecursionError:
            problem = Unparsable("no_object", "the answer is nested without end")
        except ValueError:  # no JSON, or a number of more digits than Python reads
            try:
                values.append(_repaired(piece))
            except Unparsable as error:
                problem = error
    if next(pieces, None) is not None:
        raise Unparsable("several", f"more than {_MOST_PIECES} objects; one is asked for")
    if problem and not values:
        raise problem
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and repr(found[name]) != repr(value):
            raise Unparsable("several", f"{name[:_QUOTED]} appears twice with different values")
        found[name] = value
    return found


def _repaired(piece: str) -> Any:
    cut = piece.rstrip().rstrip(",")
    # A text that was cut off reads like a whole one once it is closed.
    if not cut.endswith(("}", '"', "'", "”", "]")):
        raise Unparsable("truncated", f"the answer is cut off after {piece[-40:]!r}")
    if piece.count("{") + piece.count("[") > _MOST_BRACES:
        raise Unparsable("no_object", f"not JSON, and more than {_MOST_BRACES} objects and lists")
    try:
        value = json_repair.loads(piece)
        said = _said(value)
    except (ValueError, RecursionError) as error:
        raise Unparsable("no_object", f"not JSON ({error})") from error
    if not isinstance(value, (dict, list)):
        raise Unparsable("no_object", "not JSON, and not to be repaired")
    if _letters(said) != _letters(_unescaped(piece)):
        raise Unparsable("ambiguous", "not JSON, and a repair would lose or move words; are quotation marks inside texts escaped?")
    return value


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_said(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_said, value))
    return {None: "null", True: "true", False: "false"}.get(value, "") if value is None or isinstance(value, bool) else str(value)


def _is_placeholder(text: str) -> bool:
    return _PLACEHOLDER.fullmatch(text.strip()) is not None


def _letters(text: str) -> str:
    return "".join(char for char in text.casefold() if char.isalnum())


def _unescaped(text: str) -> str:
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    return re.sub(r"\\[nrtbf]", " ", text).replace("None", "null")


def _objects(value: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Objects inside, the outer ones first."""
    if depth > _DEEPEST:
        return
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _objects(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _objects(inner, depth + 1)


def _by_field(value: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The object's values under our names, whatever case and separators it has them in."""
    plain = {_bare(name): name for name in fields}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        bare = _bare(str(key))
        name = plain.get(bare) or _ALIASES.get(bare)
        if name in fields and name is not None:
            found.setdefault(name, inner)
    return found


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _texts(found: Mapping[str, Any], fields: Sequence[str]) -> dict[str, str]:
    if missing := [name for name in fields if name not in found or found[name] in (None, "", [])]:
        raise Unparsable("missing_fields", f"missing or empty: {', '.join(missing)}")
    texts: dict[str, str] = {}
    for name in fields:
        value = found[name]
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, str):
            raise Unparsable("not_text", f"{name} = {repr(value)[:_QUOTED]} is not one text")
        texts[name] = " ".join(value.split())
    if broken := [name for name, value in texts.items() if any(0xD800 <= ord(char) < 0xE000 for char in value)]:
        raise Unparsable("not_text", f"{', '.join(broken)} holds half a surrogate pair")
    if empty := [name for name, value in texts.items() if _is_placeholder(value)]:
        raise Unparsable("missing_fields", f"missing or empty: {', '.join(empty)}")
    return texts
