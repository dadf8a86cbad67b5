"""A question in a model's own chat template: token ids, and where and by which tokens Yes and No are answered.

Nothing is assumed of the template: the same dialogue is written with both answers, and where the two differ is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from byg_plugin.critics.questions import Question, kept, made

YES, NO = "Yes", "No"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids up to the answer, and the two ids of which one follows."""

    ids: tuple[int, ...]
    yes: int
    no: int


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """A model's tokenizer, its template and how it marks pictures.

    Attributes:
        tokenizer: of the model.
        template: Jinja; of the tokenizer or the processor.
        picture: id of the token that stands for a picture, and of each of its tokens.
        around: ids before and after a picture's tokens that the template leaves to the processor.
        name: what errors call the model.
    """

    tokenizer: Any
    template: str
    picture: int
    around: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    name: str

    def prompt(self, question: Question, tokens: Sequence[int]) -> Prompt:
        """A question with pictures of so many tokens each.

        Raises:
            ValueError: the template or the tokenizer has no answer that is one token, or the question holds a token for pictures.
        """
        assert len(tokens) == len(question.pictures), "one number a picture"
        yes, no = (self._ids(question, word) for word in (YES, NO))
        end = next((index for index, pair in enumerate(zip(yes, no, strict=False)) if pair[0] != pair[1]), None)
        if end is None or [self._word(ids[end]) for ids in (yes, no)] != [YES, NO]:
            raise ValueError(f"{self.name}: its tokenizer has no single tokens for the answers {YES} and {NO}: choose another model")
        return Prompt(ids=self._with_pictures(yes[:end], tokens, question), yes=yes[end], no=no[end])

    def check(self) -> None:
        """Whether a question can be asked at all.

        Raises:
            ValueError: as `prompt`.
        """
        for question in (made("a"), kept("a"), made("a", "remove")):
            self.prompt(question, [1] * len(question.pictures))

    def marks(self) -> tuple[str, ...]:
        """The model's own tokens, a picture's place and a turn's end among them: in a text they are no text."""
        added = (str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return tuple(sorted(mark for mark in {*self.tokenizer.all_special_tokens, *added} if mark.strip()))

    def _ids(self, question: Question, answer: str) -> list[int]:
        content: list[dict[str, str]] = [{"type": "image"} for _ in question.pictures]
        content.append({"type": "text", "text": question.text})
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        try:
            text = self.tokenizer.apply_chat_template(messages, chat_template=self.template, tokenize=False)
        except (TypeError, ArithmeticError, RecursionError, TemplateError) as error:
            raise ValueError(
                f"{self.name}: its chat template cannot write a question with pictures ({error}): choose another model"
            ) from error
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _word(self, token: int) -> str:
        return self.tokenizer.decode([token]).strip()

    def _with_pictures(self, ids: Sequence[int], tokens: Sequence[int], question: Question) -> tuple[int, ...]:
        if (found := ids.count(self.picture)) != len(tokens):
            raise ValueError(
                f"{self.name}: its chat template has {found} places for the {len(tokens)} pictures of the question {question.text!r}: "
                "choose another model, or leave its special tokens out of the instruction"
            )
        before, after = self.around
        lengths = iter(tokens)
        filled: list[int] = []
        for token in ids:
            filled += [*before, *[token] * next(lengths), *after] if token == self.picture else [token]
        return tuple(filled)
