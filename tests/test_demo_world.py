"""The tiny world, its metrics and its base: exactness, and that each metric can say no."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from byg_plugin.demo import build_base, metrics, sheet, world

BASE = Path(world.__file__).parent / "base"


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


def test_captions_name_the_colours_and_instructions_the_change():
    things = (world.Thing("circle", "red", 20, 20, 10, 0), world.Thing("square", "blue", 45, 45, 9, 0))
    scene = world.Scene("green", 0, 0, 20, "dark", 50, 10, 3, things[:1])
    assert world.caption(scene) == "a red circle on a green background"
    assert world.caption(replace(scene, things=things)) == "a red circle and a blue square on a green background"
    assert world.caption(replace(scene, things=())) == "an empty green background"


def test_the_reverse_instruction_names_what_was_there(edits):
    for edit in edits:
        lost = [word for word in edit.src_caption.split() if word not in edit.tgt_caption.split()]
        assert len(lost) == 1
        assert lost[0] in edit.reverse_instruction.split() and edit.instruction != edit.reverse_instruction
        assert edit.src_caption != edit.tgt_caption


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


def test_two_objects_do_not_overlap():
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = world.sample_scene(rng, 2)
        one, two = (world.inside(t.shape, t.x, t.y, t.radius) for t in scene.things)
        assert one.any() and two.any() and not (one & two).any()
        assert scene.things[0].shape != scene.things[1].shape


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
    for row in tables["ground truth"].values():
        assert row["edit"] == row["preserved"] == row["joint"] == row["iou"] == row["pebble"] == 1
        assert row["outside_error"] == 0
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
    edit = next(e for e in world.sample_split(50, 0, "eval", ("recolour_background",)) if e.before.things[0].radius < 12)
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


def test_samples_are_read_for_colours_and_shape(edits):
    for edit in edits:
        assert metrics.follows_caption(world.render(edit.before), edit.before) == (True, True)
    shaped = [e for e in edits if e.edit_type == "change_shape"]
    assert [metrics.follows_caption(world.render(e.after), e.before) for e in shaped] == [(True, False)] * len(shaped)
    painted = [e for e in edits if e.edit_type != "change_shape"]
    assert not any(metrics.follows_caption(world.render(e.after), e.before)[0] for e in painted)


def test_sheet_and_tables_are_written(tmp_path, edits):
    images = {e.id: world.render(e.after) for e in edits}
    path = sheet.contact_sheet(tmp_path / "sheet.png", edits, images, columns=3, rows=2)
    picture = np.array(Image.open(path))
    assert (picture == sheet.GOOD).all(-1).sum() == 6 * 5 * sheet.TILE and not (picture == sheet.BAD).all(-1).any()
    metrics.write_tables(tmp_path, metrics.baselines(edits))
    assert json.loads((tmp_path / "figures.json").read_text())["copy the source"]["all"]["joint"] == 0
    assert "| ground truth | all | 60 | 100.0 % |" in (tmp_path / "figures.md").read_text()


# --- the base ---


def test_every_word_has_its_own_token_and_no_sentence_is_cut():
    clip, t5 = build_base.make_tokenizers()
    for text in build_base.sentences(0):
        for tokenizer in (clip, t5):
            ids = tokenizer(text).input_ids
            assert len(ids) <= tokenizer.model_max_length and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.unk_token_id not in ids
    assert len({tuple(t5(text).input_ids) for text in build_base.sentences(0)}) == len(build_base.sentences(0))


def test_clip_pools_at_the_end_of_the_sentence():
    torch.manual_seed(0)
    encoders = build_base.TextEncoders().eval()
    ids = encoders.clip_tokenizer("make the circle blue", padding="max_length", return_tensors="pt").input_ids
    out = encoders.clip(ids)
    assert torch.equal(out.pooler_output[0], out.last_hidden_state[0, 5])


def test_training_times_cover_small_t():
    t = build_base.sample_times(4096, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() < 1
    assert 0.09 < (t < 0.1).float().mean() < 0.2
    assert (t > 0.9).float().mean() > 0.05


def test_the_command_writes_a_base_that_the_pipeline_loads(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    build_base.main(
        ["--out", f"{tmp_path}/base", "--report", f"{tmp_path}/report", "--vae-steps", "2", "--flow-steps", "2", "--scenes", "100"]
    )
    pipe = diffusers.FluxPipeline.from_pretrained(tmp_path / "base")
    assert abs(json.loads((tmp_path / "base/figures.json").read_text())["latent_std"] - 1) < 0.5
    assert pipe.vae.config.latent_channels == 16 and pipe.transformer.config.in_channels == 64
    assert (tmp_path / "report/samples.png").is_file() and (tmp_path / "report/curve.json").is_file()


@pytest.fixture(scope="module")
def pipeline():
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.FluxPipeline.from_pretrained(BASE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_shipped_base_is_small_and_holds_no_pickle():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_300_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_shipped_base_follows_captions_through_the_stock_pipeline(pipeline):
    rng = np.random.default_rng(11)
    scenes = [world.sample_scene(rng) for _ in range(12)]
    images = pipeline(
        [world.caption(scene) for scene in scenes], height=world.SIZE, width=world.SIZE, num_inference_steps=20,
        guidance_scale=build_base.GUIDANCE, max_sequence_length=build_base.TEXT_TOKENS, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    seen = [metrics.follows_caption((image * 255).round().astype(np.uint8), s) for image, s in zip(images, scenes, strict=True)]
    assert sum(colours for colours, _ in seen) >= 9


def test_shipped_vae_reconstructs_the_world(pipeline, edits):
    pixels = build_base.to_pixels(np.stack([world.render(e.before) for e in edits[:16]]))
    latents = build_base.encode(pipeline.vae, pixels)
    decoded = build_base.decode(pipeline.vae, latents)
    assert np.abs(decoded / 255.0 - build_base.to_images(pixels) / 255.0).mean() < 0.02
    assert 0.9 < latents.std() < 1.1 and abs(latents.mean()) < 0.1
