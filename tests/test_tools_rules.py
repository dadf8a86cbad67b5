"""The rules of Appendix D.1 on texts: what is refused, what is discouraged, and what must pass."""

from __future__ import annotations

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
    ],
)
def test_target_in_language_of_time(target: str) -> None:
    assert reasons(tgt_caption=target).get("target_temporal") is True


@pytest.mark.parametrize(
    "target", ['a shop with a sign that says "NOW OPEN"', "a woman turned to the camera", "a knowing look on a snowy street"]
)
def test_target_that_only_looks_like_it(target: str) -> None:
    assert reasons(tgt_caption=target) == {}


@pytest.mark.parametrize(
    "target",
    ["a street without cars", "a street with no cars", "a car that isn't red", "a bicycle instead of a car", "an empty road, not a car"],
)
def test_negative_target_is_discouraged_not_refused(target: str) -> None:
    assert reasons(tgt_caption=target) == {"target_negative": False}


def test_source_caption_of_an_edit() -> None:
    for caption in ("the original image of a car", "a car before the edit", "a car to be removed on a street"):
        assert reasons(src_caption=caption) == {"source_refers_to_edit": True}


def test_equal_texts_whatever_case_blanks_and_full_stops() -> None:
    assert reasons(tgt_caption="A red car,  on a wet street.") == {"captions_equal": True}
    assert reasons(reverse_instruction="Paint the car blue!") == {"instructions_equal": True}


def test_style_of_the_source_must_be_named_where_it_is_known() -> None:
    assert reasons(source_style="anime") == {"source_style": True}
    assert reasons(source_style="anime", src_caption="an anime drawing of a car") == {}
    assert reasons(source_style="oil painting", src_caption="a painted car on a street") == {}
    assert reasons(source_style="photo") == reasons(source_style="photo-realistic") == {}


def test_style_that_was_asked_for_must_be_in_the_target() -> None:
    assert reasons(target_style="photorealistic") == {"target_style": True}
    assert reasons(target_style="photorealistic", tgt_caption="a photograph of a blue car") == {}


@pytest.mark.parametrize(
    ("label", "photo"),
    [
        ("photo", True),
        ("Photo-Realistic", True),
        ("photorealistic", True),
        ("non-photorealistic", False),
        ("anime", False),
        ("sketch", False),
    ],
)
def test_style_labels(label: str, photo: bool) -> None:
    assert is_photorealistic(label) is photo


def test_discouraged_forms() -> None:
    assert reasons(reverse_instruction="change the car back to red") == {"back_to": False}
    assert reasons(instruction="a blue car on a wet street") == {"instruction_is_caption": False}
    assert reasons(instruction="recolor") == {"short": False}


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
