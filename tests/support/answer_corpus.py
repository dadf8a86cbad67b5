"""A written corpus of what models answer: each kind turns a good answer into text, and says what parsing must make of it.

None: the five fields as they were. A name: the reason of the refusal. `RULE:` a rule that a repair turn must quote.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Answer = dict[str, str]
FIELDS = ("edit_type", "src_caption", "instruction", "tgt_caption", "reverse_instruction")


def _dump(answer: Answer, **changes: Any) -> str:
    merged: dict[str, Any] = {**answer, **changes}
    return json.dumps({name: value for name, value in merged.items() if value is not _GONE}, ensure_ascii=False)


_GONE = object()


def _single_quoted(answer: Answer) -> str:
    return "{" + ", ".join(f"'{name}': '{value}'" for name, value in answer.items()) + "}"


def _keys(answer: Answer, change: Callable[[str], str]) -> str:
    return json.dumps({change(name): value for name, value in answer.items()})


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.title() for part in rest)


# Tags that models are known to think in.
THINKING = {
    "<thinking>": "</thinking>",
    "<reasoning>": "</reasoning>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
    "<|begin_of_thought|>": "<|end_of_thought|>",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "◁think▷": "◁/think▷",
    "<unused94>": "<unused95>",
    "<|channel|>analysis<|message|>": "<|end|><|start|>assistant<|channel|>final<|message|>",
}

KINDS: dict[str, tuple[Callable[[Answer], str], str | None]] = {
    # --- form: to be read as it is meant ---
    "plain": (_dump, None),
    "indented": (lambda a: json.dumps(a, indent=4), None),
    "windows lines": (lambda a: json.dumps(a, indent=2).replace("\n", "\r\n"), None),
    "thinking": (lambda a: f"<think>\nThe photo shows a car. {{not json}}\n</think>\n\n{_dump(a)}", None),
    "thinking without opening tag": (lambda a: f"So I choose color. A draft: {_dump(a, instruction='draft')}\n</think>\n{_dump(a)}", None),
    "thinking twice": (lambda a: f"<think>a</think> hm <think>b</think>{_dump(a)}", None),
    **{
        f"thinking in {opening}": (
            lambda a, o=opening, c=closing: f"{o}\nIt has a car. {_dump(a, instruction='draft')}\n{c}\n{_dump(a)}",
            None,
        )
        for opening, closing in THINKING.items()
    },
    **{
        f"thinking up to {closing}": (lambda a, c=closing: f"A draft: {_dump(a, instruction='draft')}\n{c}\n\n{_dump(a)}", None)
        for closing in THINKING.values()
    },
    "thinking behind the answer": (lambda a: f"{_dump(a)}\n<think>\nOr rather {_dump(a, instruction='draft')}", None),
    "fence": (lambda a: f"```json\n{_dump(a)}\n```", None),
    "fence without language": (lambda a: f"```\n{_dump(a)}\n```", None),
    "fence in capitals and prose": (lambda a: f"Here is the JSON:\n\n```JSON\n{_dump(a)}\n```\nI hope this helps!", None),
    "fence that is not closed": (lambda a: f"```json\n{_dump(a)}", None),
    "prose around": (lambda a: f"Sure! {_dump(a)} Let me know {{if}} more is needed.", None),
    "trailing comma": (lambda a: _dump(a)[:-1] + ",}", None),
    "no comma between": (lambda a: json.dumps(a, indent=1).replace('",\n', '"\n'), None),
    "single quotes": (_single_quoted, None),
    "curly quotes": (lambda a: _dump(a).replace('{"', "{“").replace('"}', "”}").replace('": "', "”: “").replace('", "', "”, “"), None),
    "unquoted keys": (lambda a: "{" + ", ".join(f"{name}: {json.dumps(value)}" for name, value in a.items()) + "}", None),
    "missing last brace": (lambda a: _dump(a)[:-1], None),
    "byte order mark": (lambda a: "\ufeff" + _dump(a), None),
    "line break inside a text": (lambda a: _dump(a).replace(" on ", " on\n", 1), None),
    "escaped unicode": (lambda a: json.dumps({**a, "src_caption": a["src_caption"]}, ensure_ascii=True), None),
    "upper-case keys": (lambda a: _keys(a, str.upper), None),
    "camel-case keys": (lambda a: _keys(a, _camel), None),
    "kebab-case keys": (lambda a: _keys(a, lambda name: name.replace("_", "-")), None),
    "spaced keys": (lambda a: _keys(a, lambda name: name.replace("_", " ").title()), None),
    "long names": (lambda a: _keys(a, lambda name: name.replace("src", "source").replace("tgt", "target")), None),
    "more fields": (lambda a: _dump(a, confidence=0.9, notes=["x"]), None),
    "in a list": (lambda a: f"[{_dump(a)}]", None),
    "wrapped": (lambda a: json.dumps({"result": a}), None),
    "the same twice": (lambda a: f"{_dump(a)}\n{_dump(a)}", None),
    "template before it": (lambda a: f"{_dump(dict.fromkeys(a, '...'))}\n{_dump(a)}", None),
    "text in a list of one": (lambda a: json.dumps({**a, "instruction": [a["instruction"]]}), None),
    # --- content that is not there, or not certain: to be refused ---
    "empty": (lambda a: "", "empty"),
    "blank": (lambda a: " \n\t", "empty"),
    "only thinking": (lambda a: "<think>The picture shows a car", "unfinished_thinking"),
    **{
        f"only thinking in {opening}": (lambda a, o=opening: f"{o}\nA draft: {_dump(a, instruction='draft')}", "unfinished_thinking")
        for opening in THINKING
    },
    "unfinished thinking behind prose": (lambda a: f"Sure.\n<think>\nA draft: {_dump(a)}", "no_object"),
    "thinking and nothing": (lambda a: "<think>done</think>\n", "empty"),
    "refusal": (lambda a: "I'm sorry, but I can't help with this image.", "no_object"),
    "prose": (lambda a: f"Change it: {a['instruction']}", "no_object"),
    "cut off in a text": (lambda a: _dump(a)[: _dump(a).index(a["tgt_caption"]) + 6], "truncated"),
    "cut off in a key": (lambda a: _dump(a)[: _dump(a).index("tgt_caption") + 3], "truncated"),
    "cut off after a text": (lambda a: _dump(a)[: _dump(a).index(a["instruction"]) + len(a["instruction"]) + 1], "missing_fields"),
    "missing field": (lambda a: _dump(a, reverse_instruction=_GONE), "missing_fields"),
    "null field": (lambda a: _dump(a, tgt_caption=None), "missing_fields"),
    "empty field": (lambda a: _dump(a, src_caption="  "), "missing_fields"),
    "template": (lambda a: _dump(dict.fromkeys(a, "...")), "no_object"),
    "number": (lambda a: _dump(a, instruction=3), "not_text"),
    "two instructions": (lambda a: _dump(a, instruction=["one", "two"]), "not_text"),
    "half a surrogate pair": (lambda a: _dump(a).replace(" on ", " \\ud83d on ", 1), "not_text"),
    "several that differ": (lambda a: f"{_dump(a)}\n{_dump(a, instruction='another one')}", "several"),
    "two fences that differ": (lambda a: f"```\n{_dump(a)}\n```\nor\n```\n{_dump(a, instruction='another one')}\n```", "several"),
    "list of several": (lambda a: f"[{_dump(a)}, {_dump(a, instruction='another one')}]", "several"),
    "a key twice": (lambda a: _dump(a)[:-1] + ', "instruction": "another one"}', "several"),
    "a list": (lambda a: json.dumps(list(a.values())), "no_object"),
    "nested deeply": (lambda a: _dump(a)[:-1] + ', "x": ' + "[" * 20_000 + "]" * 20_000 + "}", "no_object"),
    "braces without end": (lambda a: "{" * 50_000, "truncated"),
    "a number of 5,000 digits": (lambda a: json.dumps(a)[:-1] + ', "x": ' + "1" * 5000 + "}", None),
    "html error page": (lambda a: "<html><body><h1>502 Bad Gateway</h1></body></html>", "no_object"),
    # --- whole, and against a rule ---
    "reverse refers back": (lambda a: _dump(a, reverse_instruction="restore the original color"), "RULE:reverse_refers_back"),
    "target in time": (lambda a: _dump(a, tgt_caption="the car is now blue"), "RULE:target_temporal"),
    "source of an edit": (lambda a: _dump(a, src_caption="the original photo of a red car"), "RULE:source_refers_to_edit"),
    "captions equal": (lambda a: _dump(a, tgt_caption=a["src_caption"]), "RULE:captions_equal"),
    "instructions equal": (lambda a: _dump(a, reverse_instruction=a["instruction"]), "RULE:instructions_equal"),
    "type that was not offered": (lambda a: _dump(a, edit_type="teleport"), "RULE:edit_type"),
}
FORM = [kind for kind, (_, refusal) in KINDS.items() if refusal is None]
REFUSED = [kind for kind, (_, refusal) in KINDS.items() if refusal is not None]
