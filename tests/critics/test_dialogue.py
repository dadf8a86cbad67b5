"""The answer's position and tokens are found, whatever the template says."""

from __future__ import annotations

import pytest

from byg_plugin.critics.dialogue import Dialogue
from byg_plugin.critics.questions import Question, kept, made
from tests.support.tiny_critics import BEGUN, SPECIAL, template, tokenizer

PICTURE = SPECIAL.index("<|image|>")


def dialogue(chat: str, **of_tokenizer: object) -> Dialogue:
    made_of = tokenizer(chat, **of_tokenizer)  # type: ignore[arg-type]
    return Dialogue(tokenizer=made_of, template=chat, picture=PICTURE, name="the model")


@pytest.mark.parametrize("begun", ["", BEGUN], ids=["at once", "after empty thoughts"])
def test_the_answer_is_where_the_template_puts_it(begun: str):
    asks = dialogue(template(True, begun))
    prompt = asks.prompt(made("make it blue"), [3, 2])
    text = asks.tokenizer.decode(list(prompt.ids))
    assert text.endswith("<|im_start|>assistant\n" + ("<think>\n\n</think>\n\n" if begun else ""))
    assert [asks.tokenizer.decode([token]) for token in (prompt.yes, prompt.no)] == ["Yes", "No"]


def test_each_picture_has_its_tokens_before_the_text():
    prompt = dialogue(template(True)).prompt(kept("make it blue"), [3, 2])
    vision = [SPECIAL.index(f"<|vision_{end}|>") for end in ("start", "end")]
    first = prompt.ids.index(PICTURE)
    assert list(prompt.ids[first - 1 : first + 8]) == [vision[0], *[PICTURE] * 3, vision[1], vision[0], *[PICTURE] * 2, vision[1]]
    assert prompt.ids.count(PICTURE) == 5


def test_marks_that_the_template_leaves_out_are_added():
    asks = dialogue(template(False))
    asks = Dialogue(tokenizer=asks.tokenizer, template=asks.template, picture=PICTURE, around=((7,), (8,)), name="the model")
    prompt = asks.prompt(made("remove the dog", "remove"), [2])
    first = prompt.ids.index(PICTURE)
    assert list(prompt.ids[first - 1 : first + 3]) == [7, PICTURE, PICTURE, 8]


def test_a_tokenizer_without_the_answers_is_refused():
    with pytest.raises(ValueError, match="the model: its tokenizer has no single tokens for the answers Yes and No"):
        dialogue(template(True), merges=[("Y", "e"), ("N", "o")]).check()


def test_a_template_that_drops_pictures_is_refused():
    asks = dialogue(template(True).replace("<|image|>", ""))
    with pytest.raises(ValueError, match="has 0 places for the 2 pictures"):
        asks.check()


def test_a_template_that_says_nothing_of_the_answer_is_refused():
    with pytest.raises(ValueError, match="no single tokens for the answers"):
        dialogue("{% for m in messages %}{% if m.role == 'user' %}<|image|><|image|>{% endif %}{% endfor %}").check()


def test_an_instruction_with_a_token_for_pictures_is_refused():
    question = made("turn <|image|> blue")
    with pytest.raises(ValueError, match="3 places for the 2 pictures .* leave its special tokens out of the instruction"):
        dialogue(template(True)).prompt(question, [1, 1])
    assert isinstance(question, Question)
