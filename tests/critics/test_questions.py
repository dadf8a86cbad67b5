"""What is asked, and that its wording does not change under one number."""

from __future__ import annotations

import hashlib

from byg_plugin.critics import questions as q


def test_an_edit_is_asked_of_both_pictures_and_both_answers_are_yes():
    both = q.questions("make it blue", "attribute")
    assert [(each.name, each.pictures, each.answer) for each in both] == [
        (q.MADE, (q.SOURCE, q.EDITED), True),
        (q.KEPT, (q.SOURCE, q.EDITED), True),
    ]
    assert all('"make it blue"' in each.text and "Yes or No" in each.text for each in both)
    assert q.questions("make it blue", identity=False) == both[:1]


def test_a_removal_is_asked_of_the_edited_picture_alone_and_the_answer_is_no():
    first, second = q.questions("remove the dog", "remove")
    assert (first.pictures, first.answer) == ((q.EDITED,), False)
    assert (second.pictures, second.answer) == ((q.SOURCE, q.EDITED), True)
    assert second.text != q.kept("remove the dog").text


def test_the_wording_has_a_number():
    every = [each.text for kind in (None, "remove") for each in q.questions("EDIT", kind)]
    digest = hashlib.sha256("\n".join(every).encode()).hexdigest()[:16]
    assert {q.VERSION: digest} == {1: "93ddaa581980bb8e"}, "another wording is another VERSION"
