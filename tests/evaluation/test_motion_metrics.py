"""Dynamic degree, aesthetic quality and motion fidelity: closed forms, real classes with random weights, what is missing named."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from byg_plugin import evaluate
from byg_plugin.evaluation import scores
from byg_plugin.evaluation.metrics.aesthetic import Aesthetic
from byg_plugin.evaluation.metrics.base import Options
from byg_plugin.evaluation.metrics.dynamic import Dynamic, moves, strongest
from byg_plugin.evaluation.metrics.motion import Motion, fidelity, likeness
from tests.support.evaluation import noise, save, seen, tiny_clip, write_edits

# --- dynamic degree ---


def flow_of(length: float) -> Any:
    """A flow that is (length, 0) everywhere, whatever the frames show."""
    return lambda one, following: np.broadcast_to(np.array([length, 0.0]), (*one.shape[:2], 2))


def by_mark(one: np.ndarray, following: np.ndarray) -> np.ndarray:
    """As many pixels as the first pixel's colours differ by."""
    return flow_of(abs(int(following[0, 0, 0]) - int(one[0, 0, 0])))(one, following)


def marked(*marks: int, height: int = 128, width: int = 256) -> np.ndarray:
    frames = np.zeros((len(marks), height, width, 3), dtype=np.uint8)
    frames[:, 0, 0, 0] = marks
    return frames


def test_the_strongest_twentieth_of_the_vectors_counts():
    flow = np.zeros((20, 20, 2))
    flow[0, :, 0], flow[0, :, 1] = 3.0, 4.0  # 5 % of them, of length 5
    assert strongest(flow) == pytest.approx(5)
    flow[0, :10] = 0
    assert strongest(flow) == pytest.approx(2.5)
    assert strongest(np.full((2, 2, 2), 1.0)) == pytest.approx(2**0.5), "of few vectors the longest alone"


def test_the_limit_grows_with_the_shorter_side():
    frames = marked(*[0] * 16)
    assert moves(frames, 8.0, flow_of(3.01)) == 1 and moves(frames, 8.0, flow_of(2.99)) == 0, "6 * 128 / 256 pixels"
    assert moves(frames.swapaxes(1, 2), 8.0, flow_of(3.01)) == 1
    assert moves(marked(*[0] * 16, height=256), 8.0, flow_of(3.01)) == 0
    assert moves(frames, 4.0, flow_of(3.01)) == 1, "not with the rate"
    assert moves(frames, 8.0, flow_of(0)) == 0, "a still clip"


def test_a_quarter_as_many_pairs_as_frames_must_move():
    four, three = marked(0, 9, 0, 9, 0, *[0] * 11), marked(0, 9, 0, 9, *[9] * 12)
    assert moves(four, 8.0, by_mark) == 1 and moves(three, 8.0, by_mark) == 0
    assert moves(marked(0, 9), 8.0, by_mark) == 1 and moves(marked(0, 0), 8.0, by_mark) == 0 and moves(marked(0), 8.0, by_mark) is None


def test_frames_are_taken_at_eight_a_second():
    blinking = marked(*[0, 9] * 16)
    assert moves(blinking, 8.0, by_mark) == 1 and moves(blinking, 16.0, by_mark) == 0, "every second frame is the same"
    assert moves(blinking, 24.0, by_mark) == 1


def test_dynamic_reads_the_clips_own_rate_and_is_not_of_images(tmp_path: Path):
    clip = save(tmp_path / "a.mkv", marked(*[0, 200] * 8), 16.0)
    found = Dynamic(Options(), by_mark)(seen(marked(*[0, 9] * 8), marked(*[0, 9] * 8), str(clip)))
    assert found == {"dynamic_degree": 0.0, "dynamic_degree_of_source": 0.0}
    assert Dynamic(Options(), by_mark)(seen(noise(1), noise(2))) == {"dynamic_degree": None, "dynamic_degree_of_source": None}


def test_dynamic_by_torchvisions_raft_with_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    optical_flow = pytest.importorskip("torchvision.models.optical_flow")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    torch.manual_seed(0)
    model = optical_flow.raft_large(weights=None).eval()
    (tmp_path / "checkpoints").mkdir()
    torch.save(model.state_dict(), tmp_path / "checkpoints" / "raft_large_C_T_V1-22a6c225.pth")
    metric = Dynamic(Options())
    one, other = noise(1, 130, 133)[0], noise(2, 130, 133)[0]
    found = metric._flow(one, other)
    assert found.shape == (136, 136, 2), "sides that 8 divides"
    padded = [np.pad(frame, ((3, 3), (1, 2), (0, 0)), mode="edge") / 255 for frame in (one, other)]
    inputs = [torch.tensor(frame).permute(2, 0, 1)[None].float() * 2 - 1 for frame in padded]
    with torch.no_grad():
        wanted = model(*inputs, num_flow_updates=20)[-1][0].permute(1, 2, 0).numpy()
    assert np.allclose(found, wanted, atol=1e-3 * np.abs(wanted).max()) and np.abs(wanted).max() > 1e-3
    with pytest.raises(ValueError, match="dynamic needs sides of 128 pixels, not 40 x 32"):
        metric._flow(noise(1)[0], noise(2)[0])


def test_dynamic_without_its_package_or_weights_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for spec, says in (
        (None, "needs torchvision, which is not installed: pip install"),
        (object(), "raft_large_C_T_V1-22a6c225.pth, which"),
    ):
        monkeypatch.setattr("byg_plugin.evaluation.metrics.dynamic.find_spec", lambda name, spec=spec: spec)
        with pytest.raises(ValueError, match=re.escape(says)):
            Dynamic(Options())


# --- aesthetic quality ---


def head(path: Path, width: int = 8, **more: torch.Tensor) -> Path:
    torch.manual_seed(1)
    save_file({"weight": torch.randn(1, width), "bias": torch.randn(1)} | more, path)
    return path


def test_aesthetic_is_a_tenth_of_the_head_on_cropped_frames(tmp_path: Path):
    """Written from the formula: transformers' own feature method, one frame at a time."""
    from safetensors.torch import load_file
    from transformers import CLIPModel

    folder, file = tiny_clip(tmp_path / "clip"), head(tmp_path / "head.safetensors")
    metric = Aesthetic(Options(clip=str(folder), aesthetic=file))
    model, weights = CLIPModel.from_pretrained(folder).eval(), load_file(file)
    edit = noise(1, 48, 80, frames=3)

    def wanted(frame: np.ndarray) -> float:
        pixels = torch.tensor(frame / 255).permute(2, 0, 1)[None].float()
        small = torch.nn.functional.interpolate(pixels, size=(32, 53), mode="bicubic")[..., 10:42]
        mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
        found = model.get_image_features((small - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        found = (found if isinstance(found, torch.Tensor) else found.pooler_output)[0]
        return float((found / found.norm()) @ weights["weight"][0] + weights["bias"][0]) / 10

    with torch.no_grad():
        values = [wanted(frame) for frame in edit]
    found = metric(seen(edit[:1], edit, "a.mkv"))
    assert found == {"aesthetic": pytest.approx(np.mean(values), abs=1e-5), "aesthetic_of_source": pytest.approx(values[0], abs=1e-5)}
    assert np.ptp(values) > 1e-4
    shuffled = metric(seen(edit, edit[::-1], "a.mkv"))
    assert shuffled["aesthetic"] == pytest.approx(found["aesthetic"], abs=1e-6), "the order of frames does not count"


def test_what_is_no_head_is_named_and_pickles_are_not_read(tmp_path: Path):
    clip = str(tiny_clip(tmp_path / "clip"))
    (tmp_path / "head.pth").write_bytes(b"pickled")
    for file, says in (
        (None, "give --aesthetic FILE: fetch https://github.com/LAION-AI/aesthetic-predictor"),
        (tmp_path / "none.safetensors", "no such file; fetch https://github.com/LAION-AI"),
        (tmp_path / "head.pth", "is no .safetensors file"),
        (head(tmp_path / "wide.safetensors", 9), "and a head for --clip"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            Aesthetic(Options(clip=clip, aesthetic=file))


# --- motion fidelity ---


def track(*steps: tuple[float, float], start: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """(F, 1, 2) by its steps."""
    return np.cumsum([start, *steps], axis=0)[:, None]


RIGHT, LEFT, DOWN = [(3.0, 0.0)] * 4, [(-1.0, 0.0)] * 4, [(0.0, 2.0)] * 4


def test_likeness_is_the_mean_cosine_of_steps():
    assert likeness(track(*RIGHT), track(*RIGHT, start=(50, 9)))[0, 0] == 1, "places and lengths do not count"
    assert likeness(track(*RIGHT), track(*LEFT))[0, 0] == -1 and likeness(track(*RIGHT), track(*DOWN))[0, 0] == 0
    assert likeness(track(*RIGHT), track(*RIGHT[:2], *LEFT[:2]))[0, 0] == 0
    assert likeness(track(*RIGHT), track(*[(1.0, 1.0)] * 4))[0, 0] == pytest.approx(0.5**0.5)


def test_points_that_stand_still_are_like_each_other_and_like_nothing_that_moves():
    still, trembling = track(*[(0.0, 0.0)] * 4), track(*[(0.09, 0.0)] * 4)
    assert likeness(still, trembling)[0, 0] == 1 and likeness(still, track(*RIGHT))[0, 0] == 0
    assert likeness(still, still)[0, 0] == 1, "no division by zero"


def test_fidelity_matches_tracks_whatever_their_order_in_both_directions():
    source = np.concatenate([track(*RIGHT), track(*DOWN)], axis=1)
    assert fidelity(source, source) == 1 and fidelity(source, source[:, ::-1]) == 1
    one = track(*RIGHT)
    assert fidelity(source, one) == (0.5 + 1) / 2 == fidelity(one, source), "half of the source's tracks are in the edit"
    assert fidelity(one, track(*LEFT)) == -1
    draw = np.random.default_rng(0)
    tracks = np.cumsum(draw.normal(size=(30, 7, 2)), axis=0)
    assert fidelity(tracks, tracks[::-1]) < 0.7 < fidelity(tracks, tracks) == 1, "played backwards"


def brightest(frames: np.ndarray) -> np.ndarray:
    """A tracker of the one brightest pixel."""
    flat = frames[..., 0].reshape(len(frames), -1).argmax(1)
    return np.stack([flat % frames.shape[2], flat // frames.shape[2]], axis=-1)[:, None].astype(float)


def dots(*places: tuple[int, int]) -> np.ndarray:
    frames = np.zeros((len(places), 16, 16, 3), dtype=np.uint8)
    for frame, (x, y) in zip(frames, places, strict=True):
        frame[y, x] = 255
    return frames


def test_any_tracker_can_be_given():
    metric = Motion(Options(), brightest)
    right, left = dots((1, 1), (3, 1), (5, 1)), dots((9, 4), (6, 4), (3, 4))
    assert metric(seen(right, dots((4, 9), (5, 9), (6, 9)), "a.mkv")) == {"motion_fidelity": 1.0}
    assert metric(seen(right, left, "a.mkv")) == {"motion_fidelity": -1.0}
    assert metric(seen(right[:1], right[:1])) == {"motion_fidelity": None} and metric.settings == {"tracker": "brightest"}


def test_cotracker_is_asked_for_a_grid_and_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stand-in of its predictor: it is no part of the tests' environment."""

    class Predictor(torch.nn.Module):
        def __init__(self, checkpoint: None, offline: bool, window_len: int):
            super().__init__()
            assert checkpoint is None and offline and window_len == 60
            self.model = torch.nn.Linear(1, 1)

        def forward(self, video: torch.Tensor, grid_size: int) -> tuple[torch.Tensor, None]:
            assert video.shape == (1, 3, 3, 16, 16) and video.max() == 255 and grid_size == 55
            return torch.from_numpy(brightest(video[0].permute(0, 2, 3, 1).numpy()))[None], None

    with pytest.raises(ValueError, match=r"give --cotracker FILE: fetch https://\S+ \(CC-BY-NC 4.0\); then: python -c"):
        Motion(Options())
    file = tmp_path / "c.safetensors"
    save_file(torch.nn.Linear(1, 1).state_dict(), file)
    if "cotracker" not in sys.modules:
        with pytest.raises(ValueError, match="needs CoTracker .CC-BY-NC 4.0., which is not installed: pip install git"):
            Motion(Options(cotracker=file))
    module = types.ModuleType("cotracker.predictor")
    module.CoTrackerPredictor = Predictor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cotracker", types.ModuleType("cotracker"))
    monkeypatch.setitem(sys.modules, "cotracker.predictor", module)
    monkeypatch.setattr("byg_plugin.evaluation.metrics.motion.find_spec", lambda name: object())
    right = dots((1, 1), (3, 1), (5, 1))
    assert Motion(Options(cotracker=file))(seen(right, right, "a.mkv")) == {"motion_fidelity": 1.0}
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not CoTracker3's offline model"):
        Motion(Options(cotracker=tmp_path / "other.safetensors"))


# --- by the command ---


def test_aesthetic_by_the_command_and_anew_for_another_head(tmp_path: Path):
    edits, out, clip = write_edits(tmp_path, 1, suffix=".mkv", level=9), tmp_path / "out", tiny_clip(tmp_path / "clip")
    words = ["--edits", edits, "--metrics", "aesthetic", "--clip", clip, "--out", out, "--aesthetic"]
    found = []
    for number in (1, 2):
        file = head(tmp_path / f"{number}.safetensors", bias=torch.tensor([float(number)]))
        evaluate.main([str(word) for word in (*words, file)])
        found.append(scores.read(out)[0].scores["aesthetic"])
    assert found[1] - found[0] == pytest.approx(0.1, abs=1e-6)
