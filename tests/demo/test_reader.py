"""The reader of colours and shapes, and by it the direction of every metric: which way is better."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from byg_plugin.demo import world
from byg_plugin.demo.__main__ import write_report
from byg_plugin.demo.reader import Reader, read_caption, read_picture
from byg_plugin.editing import manifest
from byg_plugin.evaluation import scores
from byg_plugin.evaluation.items import Item
from byg_plugin.evaluation.metrics import Options, classes
from byg_plugin.evaluation.metrics.clip import Clip
from byg_plugin.evaluation.statistics import by_type
from byg_plugin.lora.card import LoraCard

EDITS = world.sample_split(40, 3, "eval", tuple(world.EDIT_TYPES))


class ReadingClip(Clip):
    """CLIP's own metric over the reader's features."""

    def __init__(self) -> None:
        self.settings = {"model": "reader"}
        self.images, self.captions = Reader().images, Reader().captions  # type: ignore[method-assign]


def test_a_picture_is_read_as_its_caption():
    for edit in EDITS:
        for scene in (edit.before, edit.after):
            assert np.array_equal(read_picture(world.render(scene)), read_caption(world.caption(scene))), world.caption(scene)


def test_every_caption_is_read_apart_from_others():
    scenes = [scene for one in EDITS for scene in (one.before, one.after)]
    named = {frozenset([scene.background, *map(world.describe, scene.things)]): read_caption(world.caption(scene)) for scene in scenes}
    assert len({features.tobytes() for features in named.values()}) == len(named) > 40
    with pytest.raises(ValueError, match="'a dog' is none of the tiny world's"):
        read_caption("a dog")


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Means by method, and columns of all metrics that need no weights."""
    folder = tmp_path_factory.mktemp("directions")
    world.write_dataset(folder, 24, seed=3, split="eval", edit_types=tuple(world.EDIT_TYPES))
    edits = world.load_scenes(folder)
    others = [*edits[1:], edits[0]]
    made = {
        "truth": [world.render(one.after) for one in edits],
        "copy": [world.render(one.before) for one in edits],
        "other": [world.render(other.before) for other in others],
        "blurred": [blurred(world.render(one.after)) for one in edits],
    }
    plain = classes(["error", "psnr", "ssim"])
    metrics = {"read": Reader(), "clip": ReadingClip(), **{name: one(Options()) for name, one in plain.items()}}
    roles = {"source": "images", "reference": "truth", "mask": "mask"}
    found = {}
    for method, pictures in made.items():
        results = folder / "results" / method
        results.mkdir(parents=True)
        items = []
        for edit, picture in zip(edits, pictures, strict=True):
            path = results / f"{edit.id}.png"
            Image.fromarray(picture).save(path)
            texts = {"src_caption": edit.src_caption, "tgt_caption": edit.tgt_caption, "edit_type": edit.edit_type}
            files = {role: folder / kind / f"{edit.id}.png" for role, kind in roles.items()}
            items.append(Item(id=edit.id, edit=path, **texts, **files))
        rows, _ = scores.score(items, metrics, folder / "scores" / method)
        found[method] = {column: mean.mean for column, mean in by_type(rows)["all"].items()}
    return found


def blurred(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize((16, 16)).resize((64, 64)))


@pytest.mark.parametrize("column", ["read_directional", "read_text", "clip_directional", "clip_text"])
def test_of_edits_the_truth_is_best_and_a_copy_has_none(tables: dict[str, dict[str, float]], column: str):
    values = {method: row[column] for method, row in tables.items()}
    assert values["truth"] == pytest.approx(1.0) == max(values.values())
    if column.endswith("directional"):
        assert values["copy"] == 0.0 and values["copy"] < values["blurred"] <= values["truth"]
    assert values["copy"] < values["truth"]


@pytest.mark.parametrize(("column", "more"), [("error_source", False), ("psnr_source", True), ("ssim_source", True)])
def test_of_preservation_a_copy_is_best_and_another_picture_worst(tables: dict[str, dict[str, float]], column: str, more: bool):
    sign = 1 if more else -1
    values = {method: sign * row[column] for method, row in tables.items()}
    assert values["copy"] == max(values.values()) > values["truth"] > values["other"] == min(values.values())


@pytest.mark.parametrize(("column", "more"), [("error", False), ("psnr", True), ("ssim", True)])
def test_outside_the_edit_truth_and_copy_are_alike_and_of_the_truth_the_truth_is_best(
    tables: dict[str, dict[str, float]], column: str, more: bool
):
    sign = 1 if more else -1
    outside = {method: sign * row[f"{column}_outside"] for method, row in tables.items()}
    assert outside["copy"] >= outside["truth"] > outside["blurred"] > outside["other"]
    truth = {method: sign * row[f"{column}_truth"] for method, row in tables.items()}
    assert truth["truth"] == max(truth.values()) and truth["truth"] > truth["copy"] > truth["other"]


def test_the_metric_is_clips_own(tables: dict[str, dict[str, float]]):
    for row in tables.values():
        assert row["read_directional"] == pytest.approx(row["clip_directional"]) and row["read_text"] == pytest.approx(row["clip_text"])


def test_the_demos_page_shows_every_edit_with_its_scores_the_worst_first(tmp_path: Path):
    world.write_dataset(tmp_path / "eval", 3, seed=4, split="eval")
    edits = world.load_scenes(tmp_path / "eval")
    (tmp_path / "edits").mkdir()
    shown = [edits[0].after, edits[1].before, edits[2].after]
    for index, (edit, scene) in enumerate(zip(edits, shown, strict=True)):
        path = tmp_path / "edits" / f"{index:05d}_{edit.id}.png"
        Image.fromarray(world.render(scene)).save(path)
        texts = {name: getattr(edit, name) for name in ("instruction", "src_caption", "tgt_caption", "edit_type", "id")}
        files = {"source": tmp_path / "eval" / "images" / f"{edit.id}.png", "edit": path, "side_by_side": path.with_suffix(".jpg")}
        line = manifest.Edit(**files, **texts, seed=0, size=(world.SIZE, world.SIZE), settings={}, card=LoraCard())
        manifest.append(tmp_path / "edits", line)
    page = write_report(tmp_path, tmp_path / "edits").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 3
    assert re.findall(r'<td class="words">([^<]*)</td><td>', page)[0] == edits[1].id
    known = {row.id: row.scores for row in scores.read(tmp_path / "scores")}
    assert [known[edit.id]["read_directional"] for edit in edits] == pytest.approx([1.0, 0.0, 1.0])
    assert [known[edit.id]["error_truth"] == 0 for edit in edits] == [True, False, True]
    assert all(known[edit.id]["error_outside"] is not None for edit in edits)
