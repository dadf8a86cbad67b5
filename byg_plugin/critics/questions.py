"""What a critic is asked about an edit. The content of the questions is that of arXiv 2510.14978; the wording is our own."""

from __future__ import annotations

from dataclasses import dataclass

from byg_plugin.config.critic import REMOVE

VERSION = 1
"""Of the wording: a change of a question is a change of the loss, and of every figure that was measured with it."""

SOURCE, EDITED = "source", "edited"
"""The pictures that a question shows."""
MADE, KEPT = "made", "kept"
"""The two questions: is the edit made, is the rest preserved."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its right answer.

    Attributes:
        name: `MADE` or `KEPT`.
        pictures: those that are shown, in this order, before the text.
        text: what is asked; it asks for Yes or No.
        answer: whether the right answer is Yes.
    """

    name: str
    pictures: tuple[str, ...]
    text: str
    answer: bool


_BOTH = "The first image is the original, the second image is an edited version of it. "
_WORD = " Answer with one word, Yes or No."


def made(instruction: str, edit_type: str | None = None) -> Question:
    """Whether the edit is made. Of a removal the edited picture alone is shown: the object is there, or it is not."""
    if edit_type == REMOVE:
        text = f'An editor was asked to do this to an image: "{instruction}". Does this image still show what was to be removed?'
        return Question(name=MADE, pictures=(EDITED,), text=text + _WORD, answer=False)
    text = (
        f'{_BOTH}The instruction was: "{instruction}". Was this instruction carried out in the second image? '
        "If the two images are identical, it was not."
    )
    return Question(name=MADE, pictures=(SOURCE, EDITED), text=text + _WORD, answer=True)


def kept(instruction: str, edit_type: str | None = None) -> Question:
    """Whether the rest is preserved."""
    if edit_type == REMOVE:
        aside = "Leave aside whether the object that it names is present or absent"
    else:
        aside = "Leave aside whatever it asks to change"
    text = f'{_BOTH}The instruction was: "{instruction}". {aside}: is everything else the same in both images?'
    return Question(name=KEPT, pictures=(SOURCE, EDITED), text=text + _WORD, answer=True)


def questions(instruction: str, edit_type: str | None = None, *, identity: bool = True) -> tuple[Question, ...]:
    """Those of one edit; `identity`: also whether the rest is preserved."""
    asked = (made(instruction, edit_type),)
    return (*asked, kept(instruction, edit_type)) if identity else asked
