"""Parsing of what models say, over the written corpus."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from dataset_tools import parsing
from dataset_tools.parsing import Unparsable, parse_answer, without_thinking
from tests.support.answer_corpus import FIELDS, KINDS

GOOD = {
    "edit_type": "color_change",
    "src_caption": "a red car on a wet street",
    "instruction": "paint the car blue",
    "tgt_caption": "a blue car on a wet street",
    "reverse_instruction": "change the car color to red",
}


def test_corpus_is_worth_its_name() -> None:
    assert len(KINDS) >= 50
    texts = [make(GOOD) for make, _ in KINDS.values()]
    assert len(set(texts)) >= len(KINDS) - 1  # escaped unicode is plain here
    assert len(KINDS) % 2, "or the stub server meets each kind with numbers of one parity alone"


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind: str) -> None:
    make, refusal = KINDS[kind]
    text = make(GOOD)
    if refusal is None:
        assert parse_answer(text, FIELDS) == GOOD
    elif refusal.startswith("RULE:"):
        assert set(parse_answer(text, FIELDS)) == set(FIELDS)
    else:
        with pytest.raises(Unparsable) as caught:
            parse_answer(text, FIELDS)
        assert caught.value.reason == refusal, str(caught.value)


def test_no_prefix_of_an_answer_is_ever_taken_with_a_text_cut_off() -> None:
    text = "<think>hm</think>```json\n" + json.dumps(GOOD, indent=1) + "\n```"
    taken = 0
    for end in range(len(text) + 1):
        try:
            item = parse_answer(text[:end], FIELDS)
        except Unparsable:
            continue
        taken += 1
        assert item == GOOD
    assert taken > 1


@pytest.mark.parametrize("value", ['a sign that says "NOW"', "a man's hat", "a \\ b", "caf\u00e9 \U0001f600", "```fence```"])
def test_texts_with_marks_inside_survive(value: str) -> None:
    item = {**GOOD, "tgt_caption": value}
    assert parse_answer(f"```json\n{json.dumps(item)}\n```", FIELDS)["tgt_caption"] == value
    assert parse_answer(json.dumps(item), FIELDS)["tgt_caption"] == value


def test_a_repair_that_would_lose_words_is_refused() -> None:
    for text in (
        json.dumps(GOOD).replace("a wet street", 'a "wet, street": x', 1),
        "{'src_caption': 'the man's hat', 'x' 'y': 'the dog's bowl'}",
    ):
        try:
            said = " ".join(parse_answer(text, FIELDS).values())
        except Unparsable:
            continue
        assert "wet" in said and "street" in said and "x" in said

    for old, new in (('"a red car on a wet street"', '"a red car" on a wet street'), ('"}', '", // the comment says blue\n}')):
        with pytest.raises(Unparsable) as caught:
            parse_answer(json.dumps(GOOD).replace(old, new, 1), FIELDS)
        assert caught.value.reason == "ambiguous"


def test_thinking_without_an_end() -> None:
    assert without_thinking("a </think> b") == " b"
    with pytest.raises(Unparsable, match="inside the thinking"):
        without_thinking("x</think> <think> again")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("```" + " " * 99_000, "no_object"),
        ("```" + "a" * 99_000, "no_object"),
        ("```json\n{" * 9_000, "several"),
        ("<" + "think" * 19_000, "no_object"),
        ("\n<think" * 12_000, "no_object"),
        ("{" * 99_000, "truncated"),
        ("{" * 99_000 + "}", "no_object"),
        ('{"a": ' * 16_000 + '"', "no_object"),
        ("[" * 99_000, "no_object"),
        ("{x}" * 33_000, "several"),
        ("{" + ", ".join(f'"k{number}": 1' for number in range(7_000)) + "}", "no_object"),
        (json.dumps({**GOOD, "instruction": " " * 98_000 + "x" + " " * 1000}), None),
        (json.dumps({**GOOD, "instruction": ["x" * 90_000, "y"]}), "not_text"),
        (json.dumps(GOOD) + " " * 100_000, None),
        (json.dumps(GOOD) + "." * 100_000, "too_long"),
        ("<think>" + "x" * 5_000_000 + "</think>" + json.dumps(GOOD), None),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "read",
)
def test_no_answer_takes_long(text: str, reason: str | None) -> None:
    started = time.process_time()
    said = None
    try:
        assert set(parse_answer(text, FIELDS)) == set(FIELDS)
    except Unparsable as error:
        said = error.reason
        assert len(str(error)) < 1000
    assert said == reason
    assert time.process_time() - started < 5


@pytest.mark.parametrize("depth", [100, 300, 600, 900, 5000])
def test_nesting_at_any_depth_is_no_traceback(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    for text in (json.dumps(GOOD).replace('"paint the car blue"', nested), json.dumps(GOOD)[:-1] + f', "x": {nested}, "x": {nested}}}'):
        try:
            assert parse_answer(text, FIELDS) == GOOD
        except Unparsable as error:
            assert error.reason in ("not_text", "no_object", "several")


def test_nesting_that_the_reader_takes_and_python_does_not_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: Any = "x"
    for _ in range(5000):  # how deep a reader goes hangs on Python's version
        deep = [deep, "y"]
    monkeypatch.setattr(parsing, "_read", lambda pieces: [{**GOOD, "instruction": deep}])
    with pytest.raises(Unparsable, match="nested without end"):
        parse_answer(json.dumps(GOOD), FIELDS)
