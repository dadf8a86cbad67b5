"""The moving tiny world and its metrics: exactness, and that each metric can say no."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks.bases import sample_sheet
from byg_plugin.data.clips import clip_info, read_clip
from byg_plugin.demo import metrics, sheet, video_metrics, video_world, world

CORNER = "(top|bottom) (left|right)"
WAY = "moving (left|right|up|down)"
PATTERNS = {
    "recolour_object": (r"make the (?P<shape>\w+) (?P<new>\w+)", r"make the (?P=shape) (\w+)"),
    "recolour_background": (r"make the background \w+", r"make the background \w+"),
    "change_shape": (r"turn the (?P<old>\w+) into a (?P<new>\w+)", r"turn the (?P=new) into a (?P=old)"),
    "add": (rf"add a (?P<thing>\w+ \w+) {CORNER} {WAY}", r"remove the (?P=thing)"),
    "remove": (r"remove the (?P<thing>\w+ \w+)", rf"add a (?P=thing) {CORNER} {WAY}"),
    "replace": (r"replace the (?P<old>\w+ \w+) with a (?P<new>\w+ \w+)", r"replace the (?P=new) with a (?P=old)"),
}


@pytest.fixture(scope="module")
def edits():
    """Three of each type."""
    return [edit for kind in video_world.EDIT_TYPES for edit in video_world.sample_split(3, 3, f"test-{kind}", (kind,))]


def of_type(edits, kind):
    return next(edit for edit in edits if edit.edit_type == kind)


def exact(edit):
    return video_world.render(edit.after, edit.motion)


def moved(edit, right=0.0, down=0.0, **motion):
    """The ground truth with its object displaced, or moving otherwise."""
    after = replace(edit.after, things=tuple(replace(thing, x=thing.x + right, y=thing.y + down) for thing in edit.after.things))
    return video_world.render(after, replace(edit.motion, **motion))


def inwards(edit):
    """Signs (right, down) towards the middle of the picture from where the object starts."""
    (thing,) = (edit.before.things or edit.after.things)[:1]
    return np.sign(world.SIZE / 2 - thing.x), np.sign(world.SIZE / 2 - thing.y)


# --- world ---


def test_the_object_stays_in_the_picture_and_clear_of_the_pebble():
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(150):
        first, motion = video_world.sample_clip(rng)
        kinds.add((world.corner(first.things[0]), motion.way, motion.bow > 0))
        for scene in video_world.scenes(first, motion):
            (thing,) = scene.things
            assert all(thing.radius < at < world.SIZE - thing.radius for at in (thing.x, thing.y))
            apart = np.hypot(thing.x - scene.pebble_x, thing.y - scene.pebble_y)
            assert apart > thing.radius + scene.pebble_radius
            assert (scene.background, scene.pebble_x, scene.angle) == (first.background, first.pebble_x, first.angle)
    assert len(kinds) == 4 * 2 * 2  # corners, ways from each, straight and curved


def test_it_goes_the_named_way_and_curves_inwards():
    rng = np.random.default_rng(1)
    for _ in range(60):
        first, motion = video_world.sample_clip(rng)
        path = np.array([(s.things[0].x, s.things[0].y) for s in video_world.scenes(first, motion)])
        way = np.array(video_world.WAYS[motion.way])
        along, across = (path - path[0]) @ way, (path - path[0]) @ np.abs(way[::-1])
        assert along == pytest.approx(np.linspace(0, motion.travel, video_world.FRAMES))
        assert np.abs(across[-1]) == pytest.approx(motion.bow)
        middle = world.SIZE / 2
        assert (np.abs(path[-1] - middle) <= np.abs(path[0] - middle))[way == 0].all()
        if motion.bow:
            bends = np.diff(path, 2, axis=0)
            assert np.abs(bends).max() > 0.5


def test_frames_of_an_edit_are_its_clips(edits):
    for edit in edits:
        for clip, side in ((video_world.render(edit.before, edit.motion), "before"), (exact(edit), "after")):
            assert clip.shape == (video_world.FRAMES, world.SIZE, world.SIZE, 3)
            assert all((world.render(getattr(each, side)) == frame).all() for each, frame in zip(edit.frames, clip, strict=True))
            assert len({frame.tobytes() for frame in clip}) == (video_world.FRAMES if getattr(edit, side).things else 1)


def test_instructions_captions_and_their_words(edits):
    said = set()
    for edit in video_world.sample_split(300, 0, "words", video_world.EDIT_TYPES):
        forward, back = PATTERNS[edit.edit_type]
        assert re.fullmatch(f"{forward}; {back}", f"{edit.instruction}; {edit.reverse_instruction}"), edit
        for text, scene in ((edit.src_caption, edit.before), (edit.tgt_caption, edit.after)):
            named = rf"a \w+ \w+ {CORNER} {WAY} on a \w+ background" if scene.things else r"an empty \w+ background"
            assert re.fullmatch(named, text)
            said |= {*text.split()}
        said |= {*edit.instruction.split(), *edit.reverse_instruction.split()}
        used = {scene.background for scene in (edit.before, edit.after)}
        used |= {thing.colour for scene in (edit.before, edit.after) for thing in scene.things}
        assert used <= {*video_world.COLOURS}
        if edit.edit_type == "add":
            assert edit.instruction.removeprefix("add ") in edit.tgt_caption
        if edit.edit_type == "remove":
            assert edit.reverse_instruction.removeprefix("add ") in edit.src_caption
    assert said == {*video_world.vocabulary()}


def test_an_instruction_that_leads_to_a_clip_names_what_it_shows():
    rng = np.random.default_rng(2)
    for _ in range(80):
        first, motion = video_world.sample_clip(rng, int(rng.random() < 0.7))
        words = video_world.instruction_that_leads_to(rng, first, motion)
        if not first.things:
            assert re.fullmatch(r"remove the \w+ \w+", words) and first.background not in words
        else:
            thing = first.things[0]
            end = f"(make the {thing.shape} {thing.colour}|make the background {first.background}|turn the \\w+ into a {thing.shape}"
            end += f"|replace the \\w+ \\w+ with a {thing.colour} {thing.shape}|add {world.describe(thing)} moving {motion.way})"
            assert re.fullmatch(end, words)


def test_same_seed_same_edits_and_splits_differ():
    assert video_world.sample_split(4, 1, "train") == video_world.sample_split(4, 1, "train")
    assert video_world.sample_split(4, 1, "train")[0].before != video_world.sample_split(4, 1, "eval")[0].before
    assert {e.edit_type for e in video_world.sample_split(20, 1, "train")} == {*video_world.DEFAULT_TYPES}


def test_data_set_on_disk_is_lossless(tmp_path):
    path = video_world.write_dataset(tmp_path, 3, 7, "eval")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    loaded = video_world.load_scenes(tmp_path)
    assert loaded == video_world.sample_split(3, 7, "eval")
    for row, edit in zip(rows, loaded, strict=True):
        assert set(row) == {"id", "source", "src_caption", "tgt_caption", "instruction", "reverse_instruction", "edit_type"}
        for name, scene in ((row["source"], edit.before), (f"truth/{edit.id}.mkv", edit.after)):
            file = tmp_path / name
            assert clip_info(file).frames_at(video_world.FPS) == video_world.FRAMES
            frames = [np.asarray(frame) for frame in read_clip(file, video_world.FRAMES, video_world.FPS)]
            assert (np.stack(frames) == video_world.render(scene, edit.motion)).all()


def test_training_split_holds_no_ground_truth_unless_asked(tmp_path):
    row = json.loads(video_world.write_dataset(tmp_path / "unpaired", 1, 0, "train").read_text())
    assert "target" not in row and sorted(p.name for p in (tmp_path / "unpaired").iterdir()) == ["clips", "tuples.jsonl"]
    row = json.loads(video_world.write_dataset(tmp_path / "paired", 1, 0, "train", with_targets=True).read_text())
    assert (tmp_path / "paired" / row["target"]).is_file()


def test_user_errors_name_the_value_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="scenes.json is missing.*split='eval'"):
        video_world.load_scenes(tmp_path)
    with pytest.raises(ValueError, match="'paint'.*recolour_object"):
        video_world.sample_split(1, 0, "train", ("paint",))
    with pytest.raises(ValueError, match="n is 0"):
        video_world.sample_split(0, 0, "train")
    with pytest.raises(ValueError, match="things is 2.*0 or 1"):
        video_world.sample_clip(np.random.default_rng(0), 2)


# --- metrics ---


def test_ground_truth_scores_all_and_the_source_none(edits):
    tables = video_metrics.baselines(edits)
    for row in tables["ground truth"].values():
        assert row["edit"] == row["preserved"] == row["joint"] == row["pebble"] == 1
        assert row["flicker"] == 0 and (np.isnan(row["tracked"]) or row["tracked"] == 1)
    assert tables["ground truth"]["all"]["trajectory_error"] < 0.4
    assert all(np.isnan(tables["ground truth"][kind]["trajectory_error"]) for kind in ("add", "remove"))
    for row in tables["copy the source"].values():
        assert row["edit"] == row["joint"] == row["iou"] == row["flicker"] == 0 and row["preserved"] == row["pebble"] == 1
    assert tables["copy the source"]["recolour_object"]["tracked"] == 0
    assert set(tables["ground truth"]) == {*video_world.EDIT_TYPES, "all"}


@pytest.mark.parametrize("frame", [0, video_world.FRAMES - 1])
def test_one_frame_that_is_not_edited_fails_the_clip(edits, frame):
    for edit in edits:
        clip = exact(edit)
        clip[frame] = video_world.render(edit.before, edit.motion)[frame]
        result = video_metrics.score(clip, edit)
        assert not result.edit and not result.joint and result.preserved
        assert 0.7 < result.edit_share < 0.9  # the other four are there


def test_one_frame_whose_background_is_lost_fails_the_clip(edits):
    edit = of_type(edits, "recolour_object")
    clip = exact(edit)
    other = next(c for c in video_world.COLOURS if c not in edit.src_caption + edit.tgt_caption)
    clip[2] = world.render(replace(edit.frames[2].after, background=other))
    result = video_metrics.score(clip, edit)
    assert result.edit and not result.preserved and not result.joint


def test_a_pebble_that_goes_in_one_frame_is_reported(edits):
    edit = of_type(edits, "recolour_object")
    clip = exact(edit)
    clip[3] = world.render(replace(edit.frames[3].after, pebble_radius=0.1))
    assert video_metrics.score(clip, edit).pebble is False


def test_trajectory_error_is_the_distance_in_pixels(edits):
    for kind in ("recolour_object", "recolour_background", "change_shape", "replace"):
        edit = of_type(edits, kind)
        right, down = inwards(edit)
        result = video_metrics.score(moved(edit, 3 * right, 4 * down), edit)
        assert result.tracked and result.trajectory_error == pytest.approx(5, abs=0.4)
        still = video_metrics.score(moved(edit, travel=0.0, bow=0.0), edit)
        assert still.trajectory_error > 0.4 * edit.motion.travel


def test_a_shape_that_is_missing_in_one_frame_has_no_trajectory(edits):
    edit = of_type(edits, "recolour_object")
    clip = exact(edit)
    clip[1] = world.render(replace(edit.frames[1].after, things=()))
    result = video_metrics.score(clip, edit)
    assert result.tracked is False and result.trajectory_error is None


def test_flicker_counts_what_moves_and_not_what_is_off(edits):
    edit = of_type(edits, "recolour_object")
    keep = np.stack([world.true_mask(each.before, each.after)[1] for each in edit.frames])
    must = np.stack([world.true_mask(each.before, each.after)[0] for each in edit.frames])
    up = exact(edit).astype(int)
    constant, jumping, elsewhere = (up.copy() for _ in range(3))
    sign = np.where(up > 128, -1, 1)
    constant[keep] += (10 * sign)[keep]
    # A pixel's own direction may change as the object passes: one direction for all, away from the bounds.
    jumping = np.clip(up, 20, 235)
    base = video_metrics.flicker(jumping.astype(np.uint8), edit)
    jumping[1::2] += 10
    elsewhere[1::2][must[1::2]] += (10 * sign)[1::2][must[1::2]]
    values = [video_metrics.flicker(clip.astype(np.uint8), edit) for clip in (constant, jumping, elsewhere)]
    assert values[0] < 0.002
    assert values[1] - base == pytest.approx(10 / 255, abs=0.003)
    assert values[2] == 0


def test_an_added_object_is_free_in_place_and_bound_to_corner_and_way(edits):
    for edit in (edit for edit in edits if edit.edit_type == "add"):
        assert video_metrics.score(moved(edit, *inwards(edit), travel=edit.motion.travel - 2), edit).edit
        back = next(way for way, step in video_world.WAYS.items() if np.dot(step, video_world.WAYS[edit.motion.way]) == -1)
        for wrong in (moved(edit, travel=0.0), moved(edit, travel=5.0), moved(edit, way=back, travel=2.0)):
            result = video_metrics.score(wrong, edit)
            assert not result.edit and not result.joint
        thing = edit.after.things[0]
        way = np.array(video_world.WAYS[edit.motion.way])
        beyond = moved(edit, *(way * (world.SIZE / 2 + 2 - (thing.x if way[0] else thing.y))).tolist(), travel=8.0, bow=0.0)
        if way.sum() > 0:  # from the left or the top: it now starts in the next corner
            assert not video_metrics.score(beyond, edit).edit


def test_an_exact_sample_follows_its_caption_and_others_do_not():
    rng = np.random.default_rng(4)
    for number in range(12):
        first, motion = video_world.sample_clip(rng, int(number > 1))
        assert video_metrics.follows_caption(video_world.render(first, motion), first, motion) == (True, True, True)
        if not first.things:
            continue
        (thing,) = first.things
        new = next(colour for colour in video_world.COLOURS if colour not in (thing.colour, first.background))
        shape = next(shape for shape in world.SHAPES if shape != thing.shape)

        def seen(first=first, motion=motion, changed=None, **moves):
            clip = video_world.render(changed or first, replace(motion, **moves))
            return video_metrics.follows_caption(clip, first, motion)

        assert not seen(changed=replace(first, background=new))[0]
        assert seen(changed=replace(first, things=(replace(thing, colour=new),)))[0] is False
        assert seen(changed=replace(first, things=(replace(thing, shape=shape),)))[1] is False
        assert seen(travel=2.0)[2] is False
        across = next(way for way, step in video_world.WAYS.items() if not np.dot(step, video_world.WAYS[motion.way]))
        assert seen(way=across)[2] is False
        elsewhere = replace(thing, x=world.SIZE - thing.x, y=world.SIZE - thing.y)
        assert seen(changed=replace(first, things=(elsewhere,)), travel=0.1, bow=0.0)[2] is False
        assert seen(changed=replace(first, things=()))[0] is False
        assert seen(changed=replace(first, pebble_radius=60.0))[0] is False


def test_one_frame_of_a_sample_is_enough_to_fail():
    first, motion = video_world.sample_clip(np.random.default_rng(5))
    clip = video_world.render(first, motion)
    clip[2] = world.render(replace(first, things=()))
    assert video_metrics.follows_caption(clip, first, motion)[:2] == (False, False)


def test_metrics_refuse_what_they_cannot_read(edits):
    with pytest.raises(ValueError, match="lack an edited image"):
        video_metrics.evaluate({}, edits)
    with pytest.raises(ValueError, match=r"test-.*float64.*\(5, 64, 64, 3\)"):
        video_metrics.score(np.zeros((5, 64, 64, 3)), edits[0])


def test_what_is_not_known_is_no_number_in_the_files(tmp_path, edits):
    tables = video_metrics.baselines([edit for edit in edits if edit.edit_type in ("add", "recolour_object")])
    metrics.write_tables(tmp_path, tables)
    assert json.loads((tmp_path / "figures.json").read_text())["ground truth"]["add"]["trajectory_error"] is None
    page = (tmp_path / "figures.md").read_text()
    assert "trajectory error (px)" in page and "nan" not in page
    # The image world's table has no such columns.
    assert "trajectory" not in metrics.markdown(metrics.baselines(world.sample_split(2, 0, "eval")))


# --- sheets ---


def pixels_of(path, colour):
    return (np.array(Image.open(path)) == colour).all(-1)


def test_the_sheet_shows_strips_and_verdicts(tmp_path, edits):
    exact_clips = {edit.id: exact(edit) for edit in edits[:3]}
    clips = exact_clips | {edits[0].id: video_world.render(edits[0].before, edits[0].motion)}
    path = sheet.clip_contact_sheet(tmp_path / "sheet.png", edits[:3], clips, columns=2, rows=2)
    width = sheet.CLIP_SCALE * (video_world.FRAMES * world.SIZE + 2 * (video_world.FRAMES - 1))
    bar = sheet.BAR * width
    good, bad = (int(pixels_of(path, colour).sum()) for colour in (sheet.GOOD, sheet.BAD))
    legend = good % bar
    assert good // bar == 2 and bad // bar == 1 and legend == bad % bar > 0


def test_the_sheet_of_samples_has_every_caption(tmp_path, edits):
    clips = np.stack([exact(edit) for edit in edits[:3]])
    path = sample_sheet.draw_clips(tmp_path / "samples.png", clips, [edit.tgt_caption for edit in edits[:3]])
    ink = np.array(Image.open(path).convert("L"))
    text = sample_sheet.CAPTION // 3
    assert ink.shape[0] == sheet.GAP + 2 * (sheet.CLIP_SCALE * world.SIZE + text)
    assert (ink[-text:, : ink.shape[1] // 2] < 100).any() and (ink[-text:, ink.shape[1] // 2 :] == 255).all()
