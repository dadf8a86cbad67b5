"""Parsing of what models say, over the written corpus."""

from __future__ import annotations

import json

import pytest
from answer_corpus import FIELDS, KINDS

from dataset_tools.parsing import Unparsable, parse_answer, without_thinking

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
