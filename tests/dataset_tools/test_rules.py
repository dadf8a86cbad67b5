"""The rules of Appendix D.1 on texts: what is refused, what is discouraged, and what must pass."""

from __future__ import annotations

import time

import pytest

from byg_plugin.data.rules import RULES, check_texts, is_photorealistic

GOOD = {
    "src_caption": "a red car on a wet street",
    "tgt_caption": "a blue car on a wet street",
    "instruction": "paint the car blue",
    "reverse_instruction": "change the car color to red",
}


def reasons(source_style: str | None = None, target_style: str | None = None, **texts: str) -> dict[str, bool]:
    """Reason: hard, of GOOD with these texts."""
    return {f.reason: f.hard for f in check_texts(GOOD | texts, source_style=source_style, target_style=target_style)}


def test_a_good_tuple_has_no_findings() -> None:
    assert reasons() == {}


@pytest.mark.parametrize(
    "reverse",
    [
        "restore the red paint",
        "Revert the car",
        "undo the change",
        "make it the original color",
        "Return the car to its previous color",
        "bring the big red car back",
        "paint the car as it was before",
        "change it back to normal",
        "make the car look like before",
        "give the car its former color",
        "reverse the edit",
        "change it back",
        "put the cat back",
        "add the old oak tree back, please",
        "reset the image",
        "re-add the dog",
        "reinstate the tree",
        "give the car the color it had",
        "make the car red as in the first image",
        "paint the car like it was",
    ],
)
def test_reverse_that_needs_an_unknown_state(reverse: str) -> None:
    assert reasons(reverse_instruction=reverse).get("reverse_refers_back") is True


@pytest.mark.parametrize(
    "reverse",
    [
        "turn the cat so that its back faces the camera",
        'change the sign to "ORIGINAL RECIPE"',
        "add a restored vintage car on the right",
        "make him turn his back to us",
        "remove the hat from the man's head",
        "add a man looking back at the camera",
        "make the cat lie on its back in the grass",
        "make the dog run back to its owner",
        "change her hair to be swept back in a ponytail",
        "put a cushion behind the man's back",
        "put the back door of the car ajar",
        "turn the cat on its back",
        "move the chair to the back",
        "remove the effect of rain",
        "make the room look like it was painted by a child",
        "add a previous-generation phone to the table",
        "change the text on the sign to Original Recipe",
        "change the sign to 'DON'T UNDO'",
    ],
)
def test_reverse_that_stands_alone(reverse: str) -> None:
    assert reasons(reverse_instruction=reverse) == {}


@pytest.mark.parametrize(
    "target",
    [
        "the car is now blue",
        "a car changed to blue on a street",
        "a car that has been repainted",
        "a street that no longer has a car",
        "a red car turned into a blue one",
        "a car replaced with a bicycle on a street",
        "a car that was previously red",
        "the car changed from red to blue",
        "a street where the car has disappeared",
        "the car became blue",
        "the edited image shows a blue car",
        "a street with a newly added car",
        'a 6" pipe and now a 5" pipe',
    ],
)
def test_target_in_language_of_time(target: str) -> None:
    assert reasons(tgt_caption=target).get("target_temporal") is True


@pytest.mark.parametrize(
    "target",
    [
        'a shop with a sign that says "NOW OPEN"',
        "a shop with a sign that says NOW OPEN",
        "a shop with a sign reading 'WE'RE NOW OPEN'",
        "a woman turned to the camera",
        "a knowing look on a snowy street",
        "a knot in a rope",
        "a woman not only smiling but waving",
        "some blue forget-me-nots in a meadow",
        "the back of a house",
    ],
)
def test_target_that_only_looks_like_it(target: str) -> None:
    assert reasons(tgt_caption=target) == {}


@pytest.mark.parametrize(
    "target",
    [
        "a street without cars",
        "a street with no cars",
        "a car that isn't red",
        "a bicycle instead of a car",
        "an empty road, not a car",
        "a street with nobody on it",
        "a street, the car is gone",
    ],
)
def test_negative_target_is_discouraged_not_refused(target: str) -> None:
    assert reasons(tgt_caption=target) == {"target_negative": False}


def test_source_caption_of_an_edit() -> None:
    for caption in ("the original image of a car", "a car before the edit", "a car to be removed on a street", "an unedited car"):
        assert reasons(src_caption=caption) == {"source_refers_to_edit": True}
    for caption in ("an original photograph of a family", "a heavily edited manuscript on a desk"):
        assert reasons(src_caption=caption) == {}


def test_equal_texts_whatever_case_blanks_and_full_stops() -> None:
    assert reasons(tgt_caption="A red car,  on a wet street.") == {"captions_equal": True}
    assert reasons(reverse_instruction="Paint the car blue!") == {"instructions_equal": True}


def test_style_of_the_source_must_be_named_where_it_is_known() -> None:
    assert reasons(source_style="anime") == {"source_style": True}
    assert reasons(source_style="anime", src_caption="an anime drawing of a car") == {}
    assert reasons(source_style="oil painting", src_caption="a painted car on a street") == {}
    assert reasons(source_style="stained glass", src_caption="a glass of water on a table") == {"source_style": True}
    assert reasons(source_style="photo") == reasons(source_style="photo-realistic") == {}


def test_style_that_was_asked_for_must_be_in_the_target() -> None:
    assert reasons(target_style="photorealistic") == {"target_style": True}
    assert reasons(target_style="photorealistic", tgt_caption="a photograph of a blue car") == {}
    assert reasons(target_style="photorealistic", tgt_caption="a photographer beside a blue car") == {"target_style": True}


@pytest.mark.parametrize(
    ("label", "photo"),
    [
        ("photo", True),
        ("Photo-Realistic", True),
        ("photorealistic", True),
        ("non-photorealistic", False),
        ("anime", False),
        ("sketch", False),
        ("realistic oil painting", False),
        ("photorealistic 3D render", False),
    ],
)
def test_style_labels(label: str, photo: bool) -> None:
    assert is_photorealistic(label) is photo


def test_discouraged_forms() -> None:
    for reverse in ("change the car back to red", "put the hat back on the chair", "turn the car red again", "remove the newly added hat"):
        assert reasons(reverse_instruction=reverse) == {"back_to": False}
    assert reasons(instruction="a blue car on a wet street") == {"instruction_is_caption": False}
    assert reasons(instruction="recolor") == {"short": False}


@pytest.mark.parametrize("words", ["change the ", "put the a-b-c ", "'a ", "says NOW "])
def test_a_model_that_repeats_itself_for_pages_is_checked_in_no_time(words: str) -> None:
    text, start = words * 1000, time.process_time()
    reasons(tgt_caption=text, reverse_instruction=text)
    assert time.process_time() - start < 5  # as it should: a tenth of a second


def test_every_reason_has_its_sentence() -> None:
    found = set()
    for texts in (
        {"reverse_instruction": "restore it"},
        {"tgt_caption": "a car now"},
        {"tgt_caption": "no car, without any"},
        {"src_caption": "the original image"},
        {"tgt_caption": GOOD["src_caption"]},
        {"reverse_instruction": GOOD["instruction"]},
    ):
        found |= set(reasons("anime", "photorealistic", **texts))
    assert len(found) >= 8 and found <= set(RULES)
