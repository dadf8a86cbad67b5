"""The demo in motion from end to end, a few steps of it on an untrained base: plumbing, not learning."""

import json

import numpy as np
import pytest
from PIL import Image

from byg_plugin.data.clips import clip_info, read_clip
from byg_plugin.demo import video_world
from byg_plugin.demo.video import run_demo
from byg_plugin.lora.files import read_lora
from tests.support.demo_runs import commands_here
from tests.support.tiny import FEW_STEPS
from tests.support.video_base import write_video_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_video_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory, base):
    out = tmp_path_factory.mktemp("demo")
    with commands_here():  # processes of their own are the pictures' demo's to show: the commands are the same
        return out, run_demo(out, FEW_STEPS, train_tuples=10, eval_tuples=3, base=base)


def test_every_method_is_in_the_table(demo):
    out, tables = demo
    figures = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    assert figures.keys() == tables.keys() == {"ground truth", "copy the source", "edited without pairs"}
    assert figures["edited without pairs"]["all"]["n"] == 3
    # Through an mp4 like the edits': not exact, and not spoiled.
    assert tables["ground truth"]["all"]["joint"] == 1 and 0 < tables["ground truth"]["all"]["outside_error"] < 0.02
    assert tables["copy the source"]["all"]["edit"] == 0 and tables["copy the source"]["all"]["preserved"] == 1
    assert "trajectory error" in (out / "figures.md").read_text(encoding="utf-8")


def test_clips_sheet_and_a_lora_an_expert_are_there(demo):
    out, _ = demo
    assert Image.open(out / "contact_sheet.png").size[0] > 1000
    clips = sorted((out / "edits").glob("*.mp4"))
    assert len(clips) == 6
    for path in clips:
        clip = clip_info(path)
        assert clip.frames == video_world.FRAMES and clip.fps == pytest.approx(video_world.FPS, rel=0.01)
        assert clip.size == ((132, 64) if path.stem.endswith("_side_by_side") else (64, 64))
    for side in ("high", "low"):
        tensors, metadata = read_lora(out / "training" / f"demo_video-ema_{side}_noise.safetensors")
        assert tensors and metadata["byg.family"] == "wan2.2-t2v-a14b" and float(metadata["byg.boundary"]) == 0.875


def test_other_settings_are_refused(demo, base):
    """That a second run trains nothing is the pictures' demo's to show: the commands are the same."""
    out, _ = demo
    with pytest.raises(ValueError, match="was trained with other settings"):
        run_demo(out, [*FEW_STEPS, "train.lr=0.01"], train_tuples=10, eval_tuples=3, base=base)


def test_sources_in_the_side_by_sides_are_the_clips(demo):
    """The model saw the very pixels of the lossless sources; an mp4 is a little off."""
    out, _ = demo
    for edit, path in zip(video_world.load_scenes(out / "eval"), sorted((out / "edits").glob("*_side_by_side.mp4")), strict=True):
        seen = np.stack([np.asarray(frame)[:, :64] for frame in read_clip(path, video_world.FRAMES)]).astype(int)
        assert np.abs(seen - video_world.render(edit.before, edit.motion)).mean() < 6
