"""The builder of the tiny world's critic: its questions have the answers they say, and what it writes is a critic."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bases import critic as builder
from benchmarks.tiny_world import CRITIC
from byg_plugin.critics import probe, vlm
from byg_plugin.critics.critic import Critic
from byg_plugin.critics.questions import EDITED, KEPT, MADE, SOURCE, questions
from byg_plugin.demo import world
from tests.support.tiny_critics import critic_config


def edits(count: int) -> list[tuple[np.random.Generator, world.Edit]]:
    made = []
    for index in range(count):
        rng = np.random.default_rng([3, index])
        made.append((rng, world.sample_edit(rng, "x", builder.TYPES)))
    return made


def test_yes_and_no_are_right_as_often_for_each_question():
    asked = [builder.asked(np.random.default_rng(index)) for index in range(400)]
    for name in (MADE, KEPT):
        answers = [one.question.answer for one in asked if one.question.name == name]
        assert 0.4 < sum(answers) / len(answers) < 0.6
    assert {one.kind for one in asked} == {*world.EDIT_TYPES, "whole"}


def test_of_a_removal_the_edited_picture_alone_is_shown_and_it_decides():
    asked = [builder.asked(np.random.default_rng(index)) for index in range(400)]
    removals = [one for one in asked if one.kind == "remove" and one.question.name == MADE]
    assert removals and all(one.question.pictures == (EDITED,) for one in removals)
    assert all(one.question.answer == np.array_equal(one.source, one.edited) for one in removals), "the object is still there"


def test_identical_pictures_are_no_edit_and_keep_the_rest():
    asked = [builder.asked(np.random.default_rng(index)) for index in range(600)]
    same = [one for one in asked if np.array_equal(one.source, one.edited) and one.question.pictures == (SOURCE, EDITED)]
    assert {one.question.name for one in same} == {MADE, KEPT}
    assert all(one.question.answer == (one.question.name == KEPT) for one in same)


def test_what_is_spoilt_is_not_what_the_instruction_names():
    for rng, edit in edits(120):
        spoilt = builder._spoilt(rng, edit)
        assert spoilt != edit.after
        if edit.edit_type == "recolour_background":
            assert (spoilt.pebble, spoilt.things) != (edit.before.pebble, edit.before.things) or spoilt.angle != edit.before.angle


def test_another_edit_does_not_make_this_one_too():
    for rng, edit in edits(120):
        after = builder._other_edit(rng, edit)
        assert after != edit.after
        if edit.edit_type == "change_shape":
            assert builder._shapes(after) != builder._shapes(edit.after)


def test_what_it_writes_is_a_critic_and_answers_as_it_did_in_training(tmp_path: Path):
    arguments = ["--out", tmp_path / "critic", "--work", tmp_path / "work", "--steps", "2", "--batch", "4", "--held-out", "8"]
    builder.main([str(argument) for argument in arguments])
    figures = json.loads((tmp_path / "critic" / "figures.json").read_text(encoding="utf-8"))
    assert 0 <= figures["accuracy"] <= 1 and figures["steps"] == 2 and figures["held_out"] == 8
    config = critic_config(tmp_path / "critic", image_size=world.SIZE)
    described = vlm.describe(config)
    judge = vlm.load(config, described, torch.device("cpu"))
    several = [builder.asked(np.random.default_rng(index)) for index in range(5)]
    batch = builder.Batches(described)(several, None)
    assert len({int(row.sum()) for row in batch.inputs["attention_mask"]}) > 1, "texts of several lengths"
    with torch.no_grad():
        together = builder._logits(judge.model, batch)
        for one, logits in zip(several, together, strict=True):
            shown = {SOURCE: one.source, EDITED: one.edited}
            pictures = [torch.from_numpy(shown[name]).permute(2, 0, 1) / 255 for name in one.question.pictures]
            alone = judge.logits(one.question, [judge.features(picture) for picture in pictures])
            assert alone.tolist() == pytest.approx(logits.tolist(), abs=1e-4)


def test_a_blended_picture_still_has_its_answer():
    """What is not made stays below a third of the change, what is made above; a spoilt picture keeps most of what is wrong."""
    for index in range(60):
        one = builder.asked(np.random.default_rng(index))
        if one.towards is None:
            continue
        shown, (scene, least, most) = one.scenes[1], one.towards
        assert scene != shown and 0 <= least < most
        made = one.question.name == MADE and one.question.answer != (one.kind == "remove")
        assert most <= (0.15 if made else 0.5 if one.question.name == KEPT and one.question.answer else 0.35)
        picture = {SOURCE: builder._tensor(one.source), EDITED: builder._tensor(one.edited)}
        for seed in range(3):
            spoilt = builder._as_an_editor_makes_it(one, picture, torch.Generator().manual_seed(seed))
            towards = builder._tensor(world.render(scene))
            nearer = (spoilt[EDITED] - picture[EDITED]).abs().mean() < (spoilt[EDITED] - towards).abs().mean()
            assert nearer or most == 0.5


def test_what_the_heads_are_asked_is_what_the_scenes_hold():
    rng = np.random.default_rng(1)
    scene = world.sample_scene(rng, 2)
    first, second = scene.things
    colours = dict(zip(("background", "pebble", *world.SHAPES), builder._colours(scene), strict=True))
    assert colours.pop("background") == world.LABELS.index(scene.background) and colours.pop("pebble") == world.LABELS.index(scene.pebble)
    assert colours.pop(first.shape) == world.LABELS.index(first.colour)
    assert colours.pop(second.shape) == world.LABELS.index(second.colour)
    assert list(colours.values()) == [builder.NOTHING]
    cells = builder._cells(scene)
    assert cells.shape == (16, len(world.LABELS) + len(world.SHAPES)) and (cells[:, : len(world.LABELS)].sum(1) <= 1).all()
    row, column = int(first.y) // builder.CELL, int(first.x) // builder.CELL
    of_first = cells[row * 4 + column]
    assert of_first[world.LABELS.index(first.colour)] == of_first[len(world.LABELS) + world.SHAPES.index(first.shape)] > 0


def test_the_heads_learn_of_what_is_shown_alone():
    """Of a removal's first question there is one picture; of an edit of the whole no scene."""
    asked = [builder.asked(np.random.default_rng(index)) for index in range(200)]
    seen = builder.seeing(asked)
    assert len(seen.cells) == 16 * sum(len(one.question.pictures) for one in asked)
    for one, colours in zip(asked, seen.colours.tolist(), strict=True):
        _, edited, wanted = one.scenes
        both = len(one.question.pictures) == 2
        assert [min(row) >= 0 for row in colours] == [both, edited is not None, both and wanted is not None]
        if one.kind != "whole" and one.question.answer and one.question.name == MADE and both:
            assert colours[1] == colours[2], "what is made is what was asked for"
    heads = builder.Heads()
    loss = heads.loss(torch.zeros(len(seen.cells), builder.WIDTH), torch.zeros(len(asked), builder.WIDTH), seen)
    assert torch.isfinite(loss)


def test_every_word_of_a_question_is_known(tmp_path: Path):
    builder.write_untrained(tmp_path, 0)
    described = vlm.describe(critic_config(tmp_path, image_size=world.SIZE))
    unknown = builder.SPECIALS.index("<|unknown|>")
    for index in range(200):
        question = builder.asked(np.random.default_rng(index)).question
        assert unknown not in described.dialogue.prompt(question, [1] * len(question.pictures)).ids


@pytest.fixture(scope="module")
def shipped() -> Critic:
    config = critic_config(CRITIC, image_size=world.SIZE)
    judge = vlm.load(config, vlm.describe(config), torch.device("cpu"))
    return Critic(judge, None, config)  # type: ignore[arg-type]


def test_the_shipped_critic_answers_questions_that_are_not_its_figures(shipped: Critic):
    figures = json.loads((CRITIC / "figures.json").read_text(encoding="utf-8"))
    assert figures["accuracy"] >= figures["target"] == builder.TARGET
    assert sum(path.stat().st_size for path in CRITIC.iterdir()) < 10e6
    batches = builder.Batches(vlm.describe(critic_config(CRITIC, image_size=world.SIZE)))
    several = [builder.asked(np.random.default_rng([11, index])) for index in range(256)]
    batch = batches(several, None)
    with torch.no_grad():
        right = builder._logits(shipped.vlm.model, batch).argmax(1) == batch.labels
    assert right.float().mean() >= 0.95


def test_the_shipped_critic_passes_the_probe_of_a_start(shipped: Critic):
    pictures = [builder._tensor(world.render(world.sample_scene(np.random.default_rng(index), 2))) for index in range(8)]
    found = probe.probe(shipped, probe.known_pairs(pictures))
    assert found.right >= 0.9 and min(found.yes, found.no) >= 0.8


def test_a_small_step_along_its_gradient_convinces_it_more(shipped: Critic):
    """The gradient is of use: the unedited picture, moved a little, looks more like the edit."""
    closer = 0
    for index in range(8):
        edit = world.sample_edit(np.random.default_rng([5, index]), "x")
        before = builder._tensor(world.render(edit.before))
        source, asked = shipped.source_features(before), questions(edit.instruction, edit.edit_type)
        loss, gradient, _ = shipped.judge(before, source, asked, differentiate=True)
        moved = (before - 0.02 * gradient / gradient.abs().max()).clamp(0, 1)
        after, _, _ = shipped.judge(moved, source, asked, differentiate=False)
        closer += bool(after < loss)
    assert closer >= 7
