"""The metrics of edits: each rule can say no, and the rules that were fixed first still give the same numbers."""

from dataclasses import astuple, replace

import numpy as np
import pytest

from byg_plugin.demo import metrics, world

CIRCLE = world.Thing("circle", "red", 16.5, 15.2, 12.3, 0.4)
SQUARE = world.Thing("square", "blue", 47.1, 48.4, 13.1, 2.0)
SCENE = world.Scene("green", 0.7, 1.1, 55.0, "dark", 48.2, 14.6, 4.1, (CIRCLE, SQUARE))
EDITS = {
    "recolour_object": replace(SCENE, things=(replace(CIRCLE, colour="yellow"), SQUARE)),
    "recolour_background": replace(SCENE, background="cyan"),
    "change_shape": replace(SCENE, things=(CIRCLE, replace(SQUARE, shape="triangle"))),
    "remove": replace(SCENE, things=(SQUARE,)),
    "replace": replace(SCENE, things=(replace(CIRCLE, colour="purple", shape="triangle"), SQUARE)),
}


def edit_of(kind, before=SCENE, after=None):
    return world.Edit("golden", kind, "", "", before, after or EDITS[kind])


def pictures(edit):
    """Pictures between source, exact edit and noise; `RandomState` draws the same numbers with every numpy."""
    draw = np.random.RandomState(0)
    before, after = (world.render(scene).astype(float) for scene in (edit.before, edit.after))
    noise = draw.randint(0, 256, (*before.shape,)).astype(float)
    some = draw.rand(*before.shape[:2], 1)
    mixed = (
        after + 0.15 * (noise - after),
        np.where(some < 0.8, after, noise),
        0.45 * before + 0.55 * after,
        np.where(some < 0.9, before, after),
    )
    return [np.round(picture).astype(np.uint8) for picture in mixed]


# edit_share, outside_error, iou, edit, preserved, joint, pebble: of the metrics as they were first fixed
GOLDEN = {
    "recolour_object": [
        (1.000000, 0.045432, 1.000000, True, True, True, True),
        (0.814815, 0.060052, 0.428715, True, False, False, True),
        (0.743056, 0.000000, 0.743056, False, True, False, True),
        (0.115741, 0.000000, 0.115741, False, True, False, True),
    ],
    "recolour_background": [
        (1.000000, 0.053383, 1.000000, True, True, True, True),
        (0.828973, 0.073142, 0.923100, True, False, False, True),
        (0.585195, 0.000000, 0.585195, False, True, False, True),
        (0.095724, 0.000000, 0.095724, False, True, False, True),
    ],
    "change_shape": [
        (1.000000, 0.046258, 1.000000, True, True, True, True),
        (0.802083, 0.061265, 0.133803, True, False, False, True),
        (0.989583, 0.000000, 0.989583, True, True, True, True),
        (0.187500, 0.000000, 0.187500, False, True, False, True),
    ],
    "remove": [
        (1.000000, 0.045432, 1.000000, True, True, True, True),
        (0.828704, 0.060052, 0.428715, True, False, False, True),
        (0.953704, 0.000000, 0.953704, True, True, True, True),
        (0.115741, 0.000000, 0.115741, False, True, False, True),
    ],
    "replace": [
        (1.000000, 0.045432, 1.000000, True, True, True, True),
        (0.836022, 0.060052, 0.392094, True, False, False, True),
        (0.962366, 0.000000, 0.962366, True, True, True, True),
        (0.110215, 0.000000, 0.110215, False, True, False, True),
    ],
}


@pytest.mark.parametrize("kind", EDITS)
def test_the_rules_fixed_first_give_the_numbers_they_gave(kind):
    edit = edit_of(kind)
    for picture, expected in zip(pictures(edit), GOLDEN[kind], strict=True):
        found = astuple(metrics.score(picture, edit))
        assert found[:3] == pytest.approx(expected[:3], abs=1e-5)
        assert found[3:] == expected[3:]


def test_thresholds_are_those_that_were_fixed():
    assert (metrics.EDIT_SHARE, metrics.KEEP_ERROR, metrics.MASK_IOU, metrics.PEBBLE_ERROR) == (0.8, 0.06, 0.8, 0.15)


def test_an_exact_edit_that_spills_over_is_no_joint_success():
    """A third of the mask's size beside it: an intersection over union of 0.75."""
    edit = edit_of("recolour_object")
    image = world.render(edit.after)
    must, keep = world.true_mask(edit.before, edit.after)
    background = np.argwhere((world.regions(edit.before) == world.BACKGROUND) & keep)
    y, x = background[: must.sum() // 3].T
    image[y, x] = np.round(255 * world.PALETTE[world.LABELS.index("cyan")]).astype(np.uint8)
    result = metrics.score(image, edit)
    assert result.iou == pytest.approx(0.75, abs=0.01)
    assert result.edit and result.preserved and not result.joint


# --- an added object ---


BEFORE = replace(SCENE, things=(CIRCLE,))
ADD = edit_of("add", BEFORE, SCENE)


def with_object(**changes):
    """The picture of ADD with its new object changed."""
    return world.render(replace(SCENE, things=(CIRCLE, replace(SQUARE, **changes))))


def test_an_added_object_counts_at_any_place_of_its_corner_and_any_size():
    for change in ({}, {"x": 43.0, "y": 51.0}, {"x": 35.0, "y": 48.0, "radius": 10.0}, {"radius": 15.5}, {"light": 5.0}):
        result = metrics.score(with_object(**change), ADD)
        assert result.joint and result.iou > 0.95 and result.edit_share > 0.95 and result.pebble, change


@pytest.mark.parametrize("changes", [
    {"colour": "purple"}, {"shape": "triangle"}, {"shape": "circle"}, {"shape": "circle", "radius": 10.0},
    {"shape": "circle", "x": 43.0, "y": 51.0}, {"radius": 7.0}, {"x": 15.0, "y": 46.0}, {"x": 30.0, "y": 30.0, "radius": 20.0},
    {"x": 57.0}, {"y": 61.0}, {"y": 16.0}, {"x": 27.0, "y": 16.0},
])  # fmt: skip
def test_another_object_than_the_named_one_is_no_edit(changes):
    result = metrics.score(with_object(**changes), ADD)
    assert not result.edit and not result.joint


def test_an_added_object_must_spare_the_rest():
    gone = metrics.score(world.render(replace(SCENE, things=(SQUARE,))), ADD)
    assert gone.edit and not gone.preserved
    repainted = metrics.score(world.render(replace(SCENE, things=(replace(CIRCLE, colour="purple"), SQUARE))), ADD)
    assert repainted.edit and not repainted.preserved
    twice = metrics.score(world.render(replace(SCENE, things=(CIRCLE, SQUARE, replace(SQUARE, x=16.0, radius=11.0)))), ADD)
    assert twice.edit and twice.iou < metrics.MASK_IOU and not twice.joint


def test_the_largest_piece_of_the_new_colour_is_the_object():
    image = with_object()
    image[45:51, 12:18] = image[45:51, 44:50]
    assert metrics.score(image, ADD).edit
    # Alone, the small piece is too small.
    alone = world.render(BEFORE)
    alone[45:51, 44:50] = image[45:51, 44:50]
    assert not metrics.score(alone, ADD).edit


def test_exact_additions_pass_and_untouched_sources_fail_whatever_the_colours():
    for edit in world.sample_split(150, 4, "eval", ("add",)):
        exact = metrics.score(world.render(edit.after), edit)
        assert exact.joint and exact.iou > 0.93
        copied = metrics.score(world.render(edit.before), edit)
        assert (copied.edit, copied.preserved, copied.joint, copied.iou) == (False, True, False, 0)


# --- every kind of edit, with one object and with two ---


def thing_index(edit):
    """Which object an edit of an object changes or removes."""
    return next(i for i, thing in enumerate(edit.before.things) if thing not in edit.after.things)


def before_with(edit, **changes):
    """The source with the edited object changed otherwise than the instruction says."""
    things = list(edit.before.things)
    things[thing_index(edit)] = replace(things[thing_index(edit)], **changes)
    return world.render(replace(edit.before, things=tuple(things)))


def unused_colour(edit):
    used = {edit.before.background, edit.after.background, *(thing.colour for thing in edit.before.things + edit.after.things)}
    return next(colour for colour in world.COLOURS if colour not in used)


@pytest.fixture(scope="module", params=world.EDIT_TYPES)
def some_edits(request):
    edits = world.sample_split(24, 8, "eval", (request.param,))
    assert len({len(edit.before.things) for edit in edits}) == 2
    return edits


def test_exact_passes_copy_and_half_fail(some_edits):
    for edit in some_edits:
        before, after = world.render(edit.before), world.render(edit.after)
        assert metrics.score(after, edit).joint
        copied = metrics.score(before, edit)
        assert (copied.edit, copied.preserved, copied.joint) == (False, True, False)
        must = np.argwhere(world.true_mask(edit.before, edit.after)[0])
        half = after.copy()
        for y, x in must[: len(must) // 2]:
            half[y, x] = before[y, x]
        assert not metrics.score(half, edit).joint


def test_a_destroyed_bystander_is_never_preserved(some_edits):
    for edit in some_edits:
        bystanders = [thing for thing in edit.before.things if thing in edit.after.things]
        for spoiled in bystanders:
            others = tuple(thing for thing in edit.after.things if thing != spoiled)
            painted = replace(edit.after, things=(*others, replace(spoiled, colour=unused_colour(edit))))
            for scene in (replace(edit.after, things=others), painted):
                assert not metrics.score(world.render(scene), edit).preserved
        if edit.edit_type != "recolour_background":
            lost = replace(edit.after, background=unused_colour(edit))
            assert not metrics.score(world.render(lost), edit).preserved


@pytest.mark.parametrize(("share", "preserved"), [(0.15, True), (0.25, False)])
def test_a_background_that_turns_in_places_is_lost_though_the_error_is_small(share, preserved):
    before = replace(SCENE, background="purple")
    edit = edit_of("recolour_object", before, replace(before, things=(replace(CIRCLE, colour="yellow"), SQUARE)))
    image = world.render(edit.after).astype(float)
    where = np.argwhere(world.regions(before) == world.BACKGROUND)
    for y, x in where[: int(share * len(where))]:
        image[y, x] += 0.75 * 255 * (world.PALETTE[world.LABELS.index("blue")] - world.PALETTE[world.LABELS.index("purple")])
    result = metrics.score(np.clip(image, 0, 255).astype(np.uint8), edit)
    assert result.outside_error < metrics.KEEP_ERROR and result.edit
    assert result.preserved is preserved


def test_a_turned_shape_must_be_the_named_one():
    for edit in world.sample_split(30, 8, "eval", ("change_shape",)):
        old, new = (scene.things[thing_index(edit)].shape for scene in (edit.before, edit.after))
        (third,) = set(world.SHAPES) - {old, new}
        assert not metrics.score(before_with(edit, shape=third), edit).joint
        assert not metrics.score(before_with(edit, radius=0.1), edit).joint  # removed


def test_half_a_replacement_is_none():
    for edit in world.sample_split(30, 8, "eval", ("replace",)):
        new = edit.after.things[thing_index(edit)]
        for half in ({"colour": new.colour}, {"shape": new.shape}, {"radius": 0.1}):
            assert not metrics.score(before_with(edit, **half), edit).edit


def test_what_is_to_go_must_be_gone():
    for edit in world.sample_split(30, 8, "eval", ("remove",)):
        thing = edit.before.things[thing_index(edit)]
        for left in ({"radius": thing.radius / 2}, {"colour": unused_colour(edit)}):
            assert not metrics.score(before_with(edit, **left), edit).edit
