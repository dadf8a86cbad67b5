"""The backend without a model: what it makes of captions, what it refuses, and that the way back is exact."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from byg_plugin.data.rules import check_texts
from dataset_tools.backend_rules import COLORS, TYPES, NotServed, propose
from tests.support.tools_helpers import photos, records, run


def one(caption: str | None, edit_type: str, style: str | None = None, seed: int = 0) -> dict[str, str] | None:
    try:
        return propose(caption, style, [edit_type], random.Random(seed))
    except NotServed:
        return None


@pytest.mark.parametrize(
    ("caption", "noun", "old"),
    [
        ("a red car on a street", "car", "red"),
        ("A white cup of coffee", "cup", "white"),
        ("an orange cat sleeping on a sofa", "cat", "orange"),
        ("two green wooden chairs near a wall", "wooden chairs", "green"),
        ("A man with a black hat.", "hat", "black"),
        ("a dark blue car in a garage", "car", "dark blue"),
        ("a cat on a white bed", "bed", "white"),
        ("a brown building", "building", "brown"),
    ],
)
def test_color(caption: str, noun: str, old: str) -> None:
    made = one(caption, "color_change")
    assert made and made["reverse_instruction"] == f"change the color of the {noun} to {old}"
    new = made["instruction"].removeprefix(f"change the color of the {noun} to ")
    assert new != old and f"{new} {noun}" in made["tgt_caption"].lower() and old not in made["tgt_caption"].lower().split()
    assert made["tgt_caption"].lower().replace(new, old).replace("an ", "a ") == made["src_caption"].lower().replace("an ", "a ")


@pytest.mark.parametrize(
    "caption",
    [
        "a black and white photo of a dog",
        "a red and blue shirt",
        "a man in red",
        "a red car and a blue car",
        "red light over a city",
        "a cat",
        "a black man and a white woman",  # of people it is no color
        "the White House",
        "a brown dog's collar",
        "a woman in black holding a bag",
    ],
)
def test_color_that_is_not_certain_is_left_alone(caption: str) -> None:
    assert one(caption, "color_change") is None


def test_article_follows_the_new_color() -> None:
    made = {one("a red car on a street", "color_change", seed=k)["tgt_caption"] for k in range(60)}  # type: ignore[index]
    assert any(text.startswith("an orange car") for text in made) and not any(text.startswith("a orange") for text in made)


def test_background() -> None:
    made = one("a dog running on a snowy field", "background_change")
    assert made and made["reverse_instruction"] == "change the background to a snowy field"
    assert made["tgt_caption"].startswith("a dog running ") and "field" not in made["tgt_caption"]
    assert made["instruction"].removeprefix("change the background to ").split(" ", 1)[1] in made["tgt_caption"]
    assert one("a dog", "background_change") is None
    assert one("a dog on a beach in a city", "background_change") is None  # which of the two?
    for caption in ("a man in an office chair", "a car near the city hall", "a bird on a street sign"):  # no place at all
        assert one(caption, "background_change") is None


def test_style_of_a_photograph_and_back() -> None:
    made = one("a photo of a dog on a beach", "style_change")
    assert (
        made and made["src_caption"] == "a photo of a dog on a beach" and made["reverse_instruction"] == "turn the image into a photograph"
    )
    drawn = one("a dog on a beach", "style_change", style="watercolor")
    assert drawn == {
        "edit_type": "style_change",
        "src_caption": "a dog on a beach, watercolor style",
        "instruction": "turn the image into a photograph",
        "tgt_caption": "a photo of a dog on a beach",
        "reverse_instruction": "turn the image into watercolor style",
    }
    old = one("A black and white photo of a man", "style_change")
    assert old and old["src_caption"] == "a black and white photo of a man" and old["tgt_caption"].startswith("a man, ")
    assert old["reverse_instruction"] == "turn the image into a black and white photograph"
    assert one("an aerial photo of a town", "style_change")["reverse_instruction"] == "turn the image into an aerial photograph"  # type: ignore[index]
    assert one("A photo of Paris", "style_change")["src_caption"] == "a photo of Paris"  # type: ignore[index]
    for caption in ("a dog on a beach", "a picture of a dog", "a painting of a man with a photo of a dog"):  # nobody knows what it is
        assert one(caption, "style_change") is None


@pytest.mark.parametrize("style", [None, "photo", "anime"])
@pytest.mark.parametrize("caption", ["...", ".", "-", "a photo of .", "a photo of...", "photo of -", "a photo of"])
def test_a_caption_that_says_nothing_is_refused(caption: str, style: str | None) -> None:
    with pytest.raises(NotServed) as refused:
        propose(caption, style, TYPES, random.Random(0))
    assert refused.value.reason == ("no_rule" if "photo" in caption else "no_caption")


def test_a_caption_of_all_colors_leaves_none_to_change_to() -> None:
    nouns = ["car", "dog", "cat", "hat", "cup", "bed", "pen", "box", "bag", "tree", "fish", "bird"]
    things = " and ".join(f"a {color} {noun}" for color, noun in zip(COLORS, nouns, strict=True))
    assert one(things.replace("a gray", "a grey"), "color_change") is None is one(things, "color_change")
    assert one(things.replace("a red car and ", ""), "color_change")["instruction"].endswith(" to red")  # type: ignore[index]


def test_every_edit_passes_the_rules() -> None:
    captions = ["a red car on a street", "A photo of an orange cat in a garden", "two brown dogs by a lake", "Blue boat in the harbour"]
    made = 0
    for caption in captions:
        for style in (None, "photo", "anime"):
            for edit_type in TYPES:
                for seed in range(20):
                    if texts := one(caption, edit_type, style, seed):
                        made += 1
                        assert not list(check_texts(texts, source_style=style)), texts
    assert made > 400


def test_command_says_what_it_cannot_serve_and_why(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", 6)
    (folder / "p0000.txt").unlink()
    (folder / "p0001.txt").write_text("a cat")
    (folder / "p0002.jpg").write_bytes((folder / "p0003.jpg").read_bytes()[:200])
    done = run("generate_edits", "--images", folder, "--out", tmp_path / "t.jsonl", "--backend", "rules", OPENAI_API_KEY="")
    assert done.returncode == 0, done.stderr
    assert "3 accepted" in done.stdout and "1 input" in done.stdout and "1 no_caption" in done.stdout and "1 no_rule" in done.stdout
    rejects = {record["source"]: record["message"] for record in records(tmp_path / "t.rejects.jsonl")}
    assert "give a .txt of the same name" in rejects["photos/p0000.jpg"] and "'a cat'" in rejects["photos/p0001.jpg"]
    done = run("generate_edits", "--images", folder, "--out", tmp_path / "t.jsonl", "--backend", "rules")
    assert "0 images done in this run" in done.stdout
