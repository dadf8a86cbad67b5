"""A written corpus of what judges answer, as `answer_corpus` of tuples: None = the numbers as they were, else the reason of the refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

Answer = dict[str, Any]


def scores_of(number: int, asked: str) -> list[int]:
    """The numbers that the stub server gives edit `number`, as many and as large as is asked for."""
    if "compliance" in asked:
        return [number % 5 + 1, number // 5 % 5 + 1, 3]
    return [number % 11, number // 11 % 11] if "preservation" in asked else [number // 3 % 11, number // 7 % 11]


def _with(answer: Answer, score: Any) -> str:
    return json.dumps({**answer, "score": score})


def _said(answer: Answer) -> str:
    return json.dumps(answer)


KINDS: dict[str, tuple[Callable[[Answer], str], str | None]] = {
    # --- form: to be read as it is meant ---
    "plain": (_said, None),
    "score first": (lambda a: json.dumps({"score": a["score"], "reasoning": a["reasoning"]}), None),
    "no reasoning": (lambda a: json.dumps({"score": a["score"]}), None),
    "thinking": (lambda a: f"<think>A first guess: {_with(a, [1, 1])}</think>{_said(a)}", None),
    "fence": (lambda a: f"```json\n{json.dumps(a, indent=2)}\n```", None),
    "fence that is not closed": (lambda a: f"```json\n{_said(a)}", None),
    "VIEScore's delimiters": (lambda a: f"||V^=^V||\n{_said(a)}\n||V^=^V||", None),
    "prose around": (lambda a: f"Sure, here it is: {_said(a)} I hope that helps.", None),
    "numbers as texts": (lambda a: _with(a, [str(one) for one in a["score"]]), None),
    "halves": (lambda a: _with(a, [float(one) for one in a["score"]]), None),
    "upper case": (lambda a: json.dumps({"REASONING": "x", "Score": a["score"]}), None),
    "scores": (lambda a: json.dumps({"reasoning": "x", "scores": a["score"]}), None),
    "single quotes": (lambda a: f"{{'reasoning': 'edit', 'score': {a['score']}}}", None),
    "trailing comma": (lambda a: _said(a)[:-1] + ",}", None),
    "missing last brace": (lambda a: _said(a)[:-1], None),
    "wrapped": (lambda a: json.dumps({"result": a}), None),
    "in a list": (lambda a: f"[{_said(a)}]", None),
    # --- numbers that are not there, or not those: to be refused ---
    "empty": (lambda a: "", "empty"),
    "only 10": (lambda a: "10", "no_object"),
    "one number": (lambda a: _with(a, 10), "count"),
    "one number in a list": (lambda a: _with(a, [10]), "count"),
    "four numbers": (lambda a: _with(a, [1, 2, 3, 4]), "count"),
    "beyond the scale": (lambda a: _with(a, [11] * len(a["score"])), "range"),
    "of a hundred": (lambda a: _with(a, [85] * len(a["score"])), "range"),
    "negative": (lambda a: _with(a, [-1] * len(a["score"])), "range"),
    "words": (lambda a: _with(a, ["good"] * len(a["score"])), "range"),
    "fractions": (lambda a: _with(a, ["4/10"] * len(a["score"])), "range"),
    "yes": (lambda a: _with(a, [True] * len(a["score"])), "range"),
    "not a number": (lambda a: _said(a).replace(str(a["score"]), str(["NaN"] * len(a["score"])).replace("'", "")), "range"),
    "nulls": (lambda a: _with(a, [None] * len(a["score"])), "range"),
    "no score": (lambda a: json.dumps({"reasoning": "a good edit"}), "no_object"),
    "empty score": (lambda a: _with(a, []), "missing_fields"),
    "two that differ": (lambda a: f"{_said(a)}\n{_with(a, [3] * len(a['score']))} or 2", "several"),
    "cut off": (lambda a: '{"reasoning": "the edit is', "truncated"),
    "cut off in the numbers": (lambda a: f'{{"score": [{a["score"][0]}, ', "truncated"),
    "only thinking": (lambda a: f"<think>{_said(a)}", "unfinished_thinking"),
    "refusal": (lambda a: "I cannot rate pictures of people.", "no_object"),
    "lines, as ImgEdit's": (lambda a: "Prompt Compliance: 4\nVisual Naturalness: 3", "no_object"),
    "html": (lambda a: "<html><body>502</body></html>", "no_object"),
}
FORM = [kind for kind, (_, refusal) in KINDS.items() if refusal is None]
