"""From what a model said to the object that was asked for, or the reason why there is none.

Repairs are of form only. What a repair would lose, cut off or have to choose is refused: the caller asks again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import json_repair

_THINKING = r"(?:think|thinking|thought|reasoning)"
_FENCE = re.compile(r"```[ \t]*[\w+-]*[ \t]*\r?\n?(.*?)```", re.DOTALL)
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
}
_PLACEHOLDER = re.compile(r"\s*(?:\.{2,}|…|<[^<>]*>|\[[^\[\]]*\]|string)?\s*")
_DEEPEST = 4  # an answer inside {"result": {...}} is found, one deeper than this is not looked for


class Unparsable(ValueError):
    """No object could be taken from an answer. `reason` is a short name to count by."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def parse_answer(text: str, fields: Sequence[str]) -> dict[str, str]:
    """The one object in `text` that has all `fields`, as stripped texts; other fields are dropped.

    Raises:
        Unparsable: there is none (with what is wrong of the nearest one), or several that differ.
    """
    answer = without_thinking(text)
    if not answer.strip():
        raise Unparsable("empty", "the answer is empty")
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
            if not found or all(_PLACEHOLDER.fullmatch(text) for text in found.values() if isinstance(text, str)):
                continue
            try:
                item = _texts(found, fields)
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
    """What follows the thinking. Some servers leave out the opening tag, which their prompt had.

    Raises:
        Unparsable: the thinking does not end.
    """
    ends = list(re.finditer(rf"</{_THINKING}>", text, re.IGNORECASE))
    answer = text[ends[-1].end() :] if ends else text
    if re.match(rf"\s*<{_THINKING}>", answer, re.IGNORECASE):
        raise Unparsable("unfinished_thinking", "the answer ends inside the thinking")
    return answer


def _candidates(text: str) -> Iterator[list[str]]:
    """Groups of pieces that may hold the object, the likeliest first."""
    # A fence inside a text of the object would cut it: then the whole answer comes next.
    yield [piece for fenced in _FENCE.findall(text) for piece in (list(_braced(fenced)) or ([fenced] if "{" in fenced else []))]
    yield list(_braced(text))
    first, last = text.find("{"), text.rfind("}")
    if first >= 0:
        yield [text[first : last + 1] if last > first else text[first:]]
        yield [text[first:]]


def _braced(text: str) -> Iterator[str]:
    """Stretches of balanced braces, as far as double quotes tell strings."""
    depth, start, inside, escaped = 0, 0, False, False
    for place, char in enumerate(text):
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
            start = place if depth == 0 else start
            depth += 1
        elif char == "}" and depth:
            depth -= 1
            if depth == 0:
                yield text[start : place + 1]


def _read(pieces: Iterable[str]) -> list[Any]:
    """Values of one group of pieces.

    Raises:
        Unparsable: a piece is cut off, or no repair keeps what it says.
    """
    values = []
    problem: Unparsable | None = None
    for piece in pieces:
        try:
            values.append(json.loads(piece, strict=False, object_pairs_hook=_object))
        except RecursionError:
            problem = Unparsable("no_object", "the answer is nested without end")
        except json.JSONDecodeError:
            try:
                values.append(_repaired(piece))
            except Unparsable as error:
                problem = error
    if problem and not values:
        raise problem
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1 and len({repr(v) for n, v in pairs if n == name}) > 1]:
        raise Unparsable("several", f"{', '.join(twice)} appears twice with different values")
    return dict(pairs)


def _repaired(piece: str) -> Any:
    cut = piece.rstrip().rstrip(",")
    # A text that was cut off reads like a whole one once it is closed.
    if not cut.endswith(("}", '"', "'", "”", "]")):
        raise Unparsable("truncated", f"the answer is cut off after {piece[-40:]!r}")
    try:
        value = json_repair.loads(piece)
    except (ValueError, RecursionError) as error:
        raise Unparsable("no_object", f"not JSON ({error})") from error
    if not isinstance(value, (dict, list)):
        raise Unparsable("no_object", "not JSON, and not to be repaired")
    if _letters(_said(value)) != _letters(_unescaped(piece)):
        raise Unparsable("ambiguous", "not JSON, and a repair would lose or move words; are quotation marks inside texts escaped?")
    return value


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_said(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_said, value))
    return {None: "null", True: "true", False: "false"}.get(value, "") if value is None or isinstance(value, bool) else str(value)


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
            raise Unparsable("not_text", f"{name} = {value!r} is not one text")
        texts[name] = " ".join(value.split())
    if broken := [name for name, value in texts.items() if any(0xD800 <= ord(char) < 0xE000 for char in value)]:
        raise Unparsable("not_text", f"{', '.join(broken)} holds half a surrogate pair")
    if empty := [name for name, value in texts.items() if not value or _PLACEHOLDER.fullmatch(value)]:
        raise Unparsable("missing_fields", f"missing or empty: {', '.join(empty)}")
    return texts
