"""The tiny world and its metrics: exactness, and that each metric can say no."""

import itertools
import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from benchmarks.bases import sample_sheet
from byg_plugin.demo import metrics, sheet, world


@pytest.fixture(scope="module")
def edits():
    return world.sample_split(60, 3, "eval", tuple(world.EDIT_TYPES))


def recoloured_everywhere(edit):
    """The ground truth of a recoloured object with the source's background lost."""
    scene = replace(edit.after, background=next(c for c in world.COLOURS if c not in edit.tgt_caption and c not in edit.src_caption))
    return world.render(scene)


# --- world ---


def test_rendered_pixels_are_nearest_the_colour_the_scene_says(edits):
    for edit in edits:
        for scene in (edit.before, edit.after):
            truth = world.true_labels(scene)
            known = truth != world.EDGE
            assert (world.nearest_labels(world.render(scene)) == truth)[known].all()
            assert 0 < (~known).sum() < 0.1 * known.size


def test_an_edit_changes_pixels_inside_its_mask_and_nowhere_outside(edits):
    for edit in edits:
        must, keep = world.true_mask(edit.before, edit.after)
        before, after = world.render(edit.before).astype(int), world.render(edit.after).astype(int)
        assert must.sum() > 20 and not (must & keep).any()
        assert (np.abs(before - after).sum(-1)[must] > 0).all()
        assert (before == after)[keep].all()


def test_captions_name_colours_shapes_and_corners():
    things = (world.Thing("circle", "red", 20, 20, 10, 0), world.Thing("square", "blue", 45, 45, 9, 0))
    scene = world.Scene("green", 0, 0, 20, "dark", 50, 10, 3, things[:1])
    assert world.caption(scene) == "a red circle top left on a green background"
    assert world.caption(replace(scene, things=things)) == "a red circle top left and a blue square bottom right on a green background"
    assert world.caption(replace(scene, things=())) == "an empty green background"


GLUE = {"a", "an", "and", "empty", "on"}  # words of a caption that say how many objects there are
CORNER = "(top|bottom) (left|right)"
PATTERNS = {
    "recolour_object": (r"make the (?P<shape>\w+) (?P<new>\w+)", r"make the (?P=shape) (\w+)"),
    "recolour_background": (r"make the background \w+", r"make the background \w+"),
    "change_shape": (r"turn the (?P<old>\w+) into a (?P<new>\w+)", r"turn the (?P=new) into a (?P=old)"),
    "add": (rf"add a (?P<thing>\w+ \w+) {CORNER}", r"remove the (?P=thing)"),
    "remove": (r"remove the (?P<thing>\w+ \w+)", rf"add a (?P=thing) {CORNER}"),
    "replace": (r"replace the (?P<old>\w+ \w+) with a (?P<new>\w+ \w+)", r"replace the (?P=new) with a (?P=old)"),
}


def test_the_reverse_instruction_undoes_the_instruction(edits):
    assert {edit.edit_type for edit in edits} == set(PATTERNS) == set(world.EDIT_TYPES)
    for edit in edits:
        forward, back = PATTERNS[edit.edit_type]
        assert re.fullmatch(f"{forward}; {back}", f"{edit.instruction}; {edit.reverse_instruction}"), edit
        # What an instruction takes away is named by the other caption and the other way round.
        words = [set(text.split()) for text in (edit.src_caption, edit.tgt_caption, edit.instruction, edit.reverse_instruction)]
        gained, lost = words[1] - words[0] - GLUE, words[0] - words[1] - GLUE
        assert gained <= words[2] and lost <= words[3] and (gained or lost)


def test_the_named_corner_is_where_the_object_is(edits):
    for edit in edits:
        for scene, text in ((edit.before, edit.src_caption), (edit.after, edit.tgt_caption)):
            where = world.regions(scene)
            for number, thing in enumerate(scene.things):
                rows, columns = np.nonzero(where == world.FIRST_OBJECT + number)
                corner = f"{'top' if rows.mean() < 31.5 else 'bottom'} {'left' if columns.mean() < 31.5 else 'right'}"
                assert f"{thing.colour} {thing.shape} {corner}" in text
        if edit.edit_type == "add":
            assert edit.instruction.removeprefix("add a ") in edit.tgt_caption
        if edit.edit_type == "remove":
            assert edit.reverse_instruction.removeprefix("add a ") in edit.src_caption


def test_an_edit_changes_what_its_kind_says_and_nothing_else(edits):
    for edit in edits:
        before, after = edit.before, edit.after
        same_but = replace(after, things=before.things, background=before.background)
        assert same_but == before
        gone = [thing for thing in before.things if thing not in after.things]
        came = [thing for thing in after.things if thing not in before.things]
        counts = {"recolour_background": (0, 0), "add": (0, 1), "remove": (1, 0)}
        assert (len(gone), len(came)) == counts.get(edit.edit_type, (1, 1))
        assert (before.background != after.background) is (edit.edit_type == "recolour_background")
        if gone and came:
            fields = {name for name, value in asdict(gone[0]).items() if asdict(came[0])[name] != value}
            assert fields == {"recolour_object": {"colour"}, "change_shape": {"shape"}, "replace": {"colour", "shape"}}[edit.edit_type]


def test_every_edit_meets_every_number_of_objects():
    edits = world.sample_split(300, 0, "eval", tuple(world.EDIT_TYPES))
    counts = {(edit.edit_type, len(edit.before.things)) for edit in edits}
    assert counts == {(name, n) for name in world.EDIT_TYPES for n in ((0, 1) if name == "add" else (1, 2))}


def test_the_vocabulary_is_the_words_that_are_said():
    edits = world.sample_split(600, 0, "train", tuple(world.EDIT_TYPES))
    said = {word for e in edits for text in (e.src_caption, e.tgt_caption, e.instruction, e.reverse_instruction) for word in text.split()}
    assert said == set(world.vocabulary())
    assert world.vocabulary() == sorted(set(world.vocabulary()))


def test_nuisances_are_not_in_the_caption_but_in_the_pixels():
    scene = world.sample_scene(np.random.default_rng(0))
    other = replace(scene, phase=scene.phase + 2, pebble_x=scene.pebble_x + 1)
    assert world.caption(other) == world.caption(scene)
    assert (world.render(other) != world.render(scene)).any()


def test_same_seed_same_edits_and_splits_differ():
    assert world.sample_split(5, 1, "train") == world.sample_split(5, 1, "train")
    scenes = {name: [e.before for e in world.sample_split(5, seed, name)] for name, seed in (("train", 1), ("eval", 1))}
    assert scenes["train"] != scenes["eval"]
    assert world.sample_split(5, 1, "train") != world.sample_split(5, 2, "train")


def quadrants_of(scene):
    """The quadrant of each object and of the pebble, by its pixels; None where it has pixels in several."""
    where = world.regions(scene)
    found = []
    for region in (world.PEBBLE, *range(world.FIRST_OBJECT, world.FIRST_OBJECT + len(scene.things))):
        rows, columns = np.nonzero(where == region)
        quadrants = {*zip(rows >= 32, columns >= 32, strict=True)}
        found.append(quadrants.pop() if len(quadrants) == 1 else None)
    return found


@pytest.mark.parametrize("things", [0, 1, 2])
def test_objects_and_pebble_lie_in_quadrants_of_their_own(things):
    rng = np.random.default_rng(0)
    arrangements = set()
    for _ in range(100):
        scene = world.sample_scene(rng, things)
        found = quadrants_of(scene)
        assert len(found) == things + 1 and None not in found and len(set(found)) == len(found)
        arrangements.add(tuple(found))
        named = [scene.background, *(thing.colour for thing in scene.things)]
        assert len(set(named)) == len(named)
        assert len({thing.shape for thing in scene.things}) == things
        assert all(world.OBJECT_RADIUS[0] <= thing.radius <= world.OBJECT_RADIUS[1] for thing in scene.things)
    assert len(arrangements) >= {0: 4, 1: 12, 2: 20}[things]  # every arrangement, of 24 most


def test_after_an_edit_they_still_do():
    for edit in world.sample_split(200, 5, "eval", tuple(world.EDIT_TYPES)):
        found = quadrants_of(edit.after)
        assert None not in found and len(set(found)) == len(found)
        named = [edit.after.background, *(thing.colour for thing in edit.after.things)]
        assert len(set(named)) == len(named) and len({thing.shape for thing in edit.after.things}) == len(edit.after.things)


def test_neighbours_keep_a_pixel_of_background_between_them():
    rng = np.random.default_rng(1)
    for _ in range(200):
        scene = world.sample_scene(rng, 2)
        covered = [world.inside(t.shape, t.x, t.y, t.radius) for t in scene.things]
        covered.append(world.inside("circle", scene.pebble_x, scene.pebble_y, scene.pebble_radius))
        assert np.sum(covered, 0).max() == 1
        discs = [(t.x, t.y, t.radius) for t in scene.things] + [(scene.pebble_x, scene.pebble_y, scene.pebble_radius)]
        assert all(radius + 0.5 <= at % 32 <= 31.5 - radius for *centre, radius in discs for at in centre)
        for one, other in itertools.combinations(covered, 2):
            beside = [np.roll(one, step, axis) for step in (-1, 1) for axis in (0, 1)]
            assert not (np.logical_or.reduce(beside) & other).any()


def test_a_scene_has_at_most_two_objects():
    with pytest.raises(ValueError, match="things is 3.*0, 1 or 2"):
        world.sample_scene(np.random.default_rng(0), 3)


def test_data_set_on_disk(tmp_path):
    path = world.write_dataset(tmp_path, 4, 7, "eval")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    loaded = world.load_scenes(tmp_path)
    assert loaded == world.sample_split(4, 7, "eval")
    for row, edit in zip(rows, loaded, strict=True):
        assert set(row) == {"id", "source", "src_caption", "tgt_caption", "instruction", "reverse_instruction", "edit_type"}
        assert (np.array(Image.open(tmp_path / row["source"])) == world.render(edit.before)).all()
        assert (np.array(Image.open(tmp_path / "truth" / f"{edit.id}.png")) == world.render(edit.after)).all()
        mask = np.array(Image.open(tmp_path / "mask" / f"{edit.id}.png"))
        assert ((mask == 255) == world.true_mask(edit.before, edit.after)[0]).all()


def test_training_split_holds_no_ground_truth_unless_asked(tmp_path):
    row = json.loads(world.write_dataset(tmp_path / "unpaired", 1, 0, "train").read_text())
    assert "target" not in row and sorted(p.name for p in (tmp_path / "unpaired").iterdir()) == ["images", "tuples.jsonl"]
    row = json.loads(world.write_dataset(tmp_path / "paired", 1, 0, "train", with_targets=True).read_text())
    assert (tmp_path / "paired" / row["target"]).is_file()


def test_user_errors_name_the_value_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="scenes.json is missing.*split='eval'"):
        world.load_scenes(tmp_path)
    with pytest.raises(ValueError, match="'paint'.*recolour_object"):
        world.sample_split(1, 0, "train", ("paint",))
    with pytest.raises(ValueError, match="n is 0"):
        world.write_dataset(tmp_path, 0, 0, "train")


# --- metrics ---


def test_ground_truth_scores_all_and_the_source_none(edits):
    tables = metrics.baselines(edits)
    for kind, row in tables["ground truth"].items():
        assert row["edit"] == row["preserved"] == row["joint"] == row["pebble"] == 1
        # An added object is scored at a place read from the picture, to half a pixel.
        exact = 1e-9 if kind not in ("add", "all") else 0.01
        assert row["iou"] >= 1 - exact and row["outside_error"] <= exact
    for row in tables["copy the source"].values():
        assert row["edit"] == row["joint"] == row["iou"] == 0
        assert row["preserved"] == row["pebble"] == 1
    assert set(tables["ground truth"]) == {*world.EDIT_TYPES, "all"}
    assert tables["ground truth"]["all"]["n"] == len(edits)


def test_an_edit_that_loses_the_background_is_no_joint_success():
    edits = world.sample_split(10, 0, "eval", ("recolour_object",))
    row = metrics.evaluate({e.id: recoloured_everywhere(e) for e in edits}, edits)["all"]
    assert row["edit"] == 1 and row["preserved"] == 0 and row["joint"] == 0


def test_a_lost_bystander_is_not_preserved_though_the_error_is_small():
    edits = world.sample_split(50, 0, "eval", ("recolour_background",))
    edit = next(e for e in edits if len(e.before.things) == 1 and e.before.things[0].shape == "triangle")
    spoiled = world.render(replace(edit.after, things=()))
    result = metrics.score(spoiled, edit)
    assert result.edit and not result.preserved


def test_a_half_edited_object_fails_and_four_fifths_is_the_line():
    edit = world.sample_split(1, 0, "eval", ("recolour_object",))[0]
    must = np.argwhere(world.true_mask(edit.before, edit.after)[0])
    for share, success in ((0.5, False), (0.78, False), (0.82, True)):
        image = world.render(edit.before)
        part = must[: int(share * len(must))]
        image[part[:, 0], part[:, 1]] = world.render(edit.after)[part[:, 0], part[:, 1]]
        assert metrics.score(image, edit).edit is success


def test_preservation_has_its_line_at_006():
    edit = world.sample_split(1, 0, "eval", ("recolour_object",))[0]
    keep = world.true_mask(edit.before, edit.after)[1]
    for error, success in ((14, True), (17, False)):
        image = world.render(edit.after).astype(int)
        image[keep] += np.where(image[keep] > 128, -error, error)
        assert metrics.score(image.astype(np.uint8), edit).preserved is success


def test_a_lost_pebble_is_reported():
    edit = world.sample_split(1, 0, "eval", ("recolour_object",))[0]
    moved = world.render(replace(edit.after, pebble_radius=0.1))
    result = metrics.score(moved, edit)
    assert result.joint and result.pebble is False


def test_metrics_refuse_what_they_cannot_read(edits):
    with pytest.raises(ValueError, match="lack an edited image.*eval-00000"):
        metrics.evaluate({}, edits)
    with pytest.raises(ValueError, match=r"eval-00000.*float64.*\(64, 64, 3\)"):
        metrics.score(np.zeros((64, 64, 3)), edits[0])


@pytest.mark.parametrize("things", [0, 1, 2])
def test_an_exact_sample_follows_its_caption(things):
    rng = np.random.default_rng(2)
    for _ in range(40):
        scene = world.sample_scene(rng, things)
        assert metrics.follows_caption(world.render(scene), scene) == (True, True)


def test_each_named_object_is_read_for_its_colour_and_its_shape():
    rng = np.random.default_rng(4)
    for _ in range(20):
        scene = world.sample_scene(rng, 2)
        one, two = scene.things
        (third,) = set(world.SHAPES) - {one.shape, two.shape}
        new = next(colour for colour in world.COLOURS if colour not in (scene.background, one.colour, two.colour))

        def seen(*things, scene=scene, **changes):
            return metrics.follows_caption(world.render(replace(scene, things=things, **changes)), scene)

        assert seen(replace(one, shape=third), two) == seen(one, replace(two, shape=third)) == (True, False)
        swapped = replace(one, colour=two.colour), replace(two, colour=one.colour)
        assert seen(*swapped) == (False, False)
        exchanged = replace(one, x=two.x, y=two.y), replace(two, x=one.x, y=one.y)
        assert seen(*exchanged) == (False, False)  # the caption names the corners
        assert seen(one) == seen(two) == (False, False)
        assert not seen(replace(one, colour=new), two)[0] and not seen(one, replace(two, colour=new))[0]
        assert seen(one, two, background=new) == (False, True)
        assert not seen(one, two, pebble_radius=60.0)[0]  # the pebble's colour is no background
        assert not seen(replace(one, radius=4.0), two)[0] and not seen(one, replace(two, radius=2.0))[0]
        third_place = replace(
            one, x=scene.pebble_x // 32 * 32 + 16, y=scene.pebble_y // 32 * 32 + 16, colour=new, shape="square", radius=13
        )
        assert seen(one, two, third_place) == (False, True)


def pixels_of(path, colour):
    return (np.array(Image.open(path)) == colour).all(-1)


def test_bars_and_legend_say_which_edits_succeed(tmp_path, edits):
    exact = {e.id: world.render(e.after) for e in edits[:6]}
    mixed = exact | {e.id: world.render(e.before) for e in edits[:2]}
    bar = sheet.BAR * sheet.TILE
    good, bad, legends = [], [], []
    for images in (exact, mixed):
        path = sheet.contact_sheet(tmp_path / "sheet.png", edits, images, columns=3, rows=2)
        good.append(pixels_of(path, sheet.GOOD))
        bad.append(pixels_of(path, sheet.BAD))
        legends.append(np.array(Image.open(path))[-sheet.LEGEND - sheet.GAP :])
    legend = bad[0].sum()
    assert 0 < legend < bar and not bad[0][: -sheet.LEGEND - sheet.GAP].any()
    assert [green.sum() for green in good] == [6 * bar + legend, 4 * bar + legend]
    assert bad[1].sum() == 2 * bar + legend
    assert (bad[1] & good[0]).sum() == 2 * bar, "the verdicts stand where the edits are"
    assert (legends[0] != legends[1]).any(), "the legend counts"


def lines_of_text(rows):
    """Runs of rows with ink in a bool image."""
    inked = rows.any(1).astype(int)
    return int((np.diff(inked, prepend=0) == 1).sum())


def test_the_longest_texts_have_room(tmp_path):
    things = world.Thing("triangle", "purple", 48, 48, 12, 0), world.Thing("square", "yellow", 16, 48, 12, 0)
    scene = world.Scene("purple", 0, 0, 20, "light", 16, 16, 4, things)
    image = world.render(scene)
    path = sample_sheet.draw(tmp_path / "samples.png", np.stack([image] * 2), [world.caption(scene)] * 2, columns=1)
    below = np.array(Image.open(path).convert("L"))[-sample_sheet.CAPTION :] < 128
    assert lines_of_text(below) == 4 and not below[-3:].any()

    new = replace(things[0], colour="yellow", shape="square")
    instruction = "replace the yellow triangle with a purple square"
    edit = world.Edit("x", "replace", instruction, "", scene, replace(scene, things=(new, things[1])))
    sheet.contact_sheet(tmp_path / "sheet.png", [edit], {"x": image})
    top = sheet.GAP + sheet.TILE
    between = np.array(Image.open(tmp_path / "sheet.png").convert("L"))[top : top + sheet.TEXT + sheet.GAP, sheet.MARGIN :] < 128
    assert lines_of_text(between) == 3 and not between[:3].any() and not between[-3:].any()


def test_tables_are_written(tmp_path, edits):
    metrics.write_tables(tmp_path, metrics.baselines(edits))
    assert json.loads((tmp_path / "figures.json").read_text())["copy the source"]["all"]["joint"] == 0
    assert "| ground truth | all | 60 | 100.0 % |" in (tmp_path / "figures.md").read_text()
