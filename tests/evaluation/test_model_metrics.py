"""CLIP and DINO of the real classes with random weights, beside transcriptions by hand; what is not there is named."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from byg_plugin.evaluation.metrics.base import Options
from byg_plugin.evaluation.metrics.clip import Clip, directional
from byg_plugin.evaluation.metrics.dino import Dino
from byg_plugin.evaluation.metrics.lpips import Lpips
from tests.support.evaluation import noise, seen, tiny_clip, tiny_dino


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Clip:
    return Clip(Options(clip=str(clip_folder)))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dino(tmp_path_factory.mktemp("dino"))


def test_directional_similarity_in_closed_form():
    axes = torch.eye(3)
    changes = torch.stack([axes[1], axes[0], (axes[0] + axes[1]) / 2**0.5])
    source = axes[0].expand(3, 3)
    along = directional(source, changes, axes[0], axes[1])
    assert along[0] == pytest.approx(1) and along[1] == 0
    assert torch.allclose(directional(source, changes, axes[1], axes[0]), -along), "mirrored captions"
    assert directional(axes[:1], axes[1:2], axes[0], axes[2]) == pytest.approx(0.5)


def test_clip_is_what_its_parts_say(clip: Clip, clip_folder: Path):
    """Written from the formula: transformers' own feature methods, one frame and one text at a time."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)

    def of_image(frame: np.ndarray) -> torch.Tensor:
        pixels = interpolate(torch.tensor(frame / 255).permute(2, 0, 1)[None].float(), size=(32, 32), mode="bicubic")
        mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
        found = model.get_image_features((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        found = found if isinstance(found, torch.Tensor) else found.pooler_output
        return (found / found.norm())[0]

    def of_text(text: str) -> torch.Tensor:
        found = model.get_text_features(**tokenizer(text, return_tensors="pt"))
        found = found if isinstance(found, torch.Tensor) else found.pooler_output
        return (found / found.norm())[0]

    source, edit = noise(1, 48, 64, frames=2), noise(2, 48, 64, frames=2)
    with torch.no_grad():
        words = of_text("a blue circle on a green field") - of_text("red")
        moved = [of_image(b) - of_image(a) for a, b in zip(source, edit, strict=True)]
        wanted = np.mean([float(one @ words / one.norm() / words.norm()) for one in moved])
        wanted_text = np.mean([float(of_image(frame) @ of_text("a blue circle on a green field")) for frame in edit])
    texts = {"src_caption": "red", "tgt_caption": "a blue circle on a green field"}
    scores = clip(seen(source, edit, "a.mkv", texts=texts))
    assert scores["clip_directional"] == pytest.approx(wanted, abs=1e-5) and abs(wanted) > 1e-3
    assert scores["clip_text"] == pytest.approx(wanted_text, abs=1e-5)
    assert scores["clip_captions_cut"] == 0


def test_clip_of_no_change_is_zero_and_mirrored_captions_turn_it_round(clip: Clip):
    source, edit = noise(1), noise(2)
    assert clip(seen(source, source))["clip_directional"] == 0
    one = clip(seen(source, edit))["clip_directional"]
    mirrored = {"src_caption": "a blue circle", "tgt_caption": "a red square"}
    assert clip(seen(source, edit, texts=mirrored))["clip_directional"] == pytest.approx(-one, abs=1e-6)
    assert abs(one) > 1e-3


def test_long_captions_are_cut_and_counted(clip: Clip):
    scores = clip(seen(noise(1), noise(2), texts={"tgt_caption": "a very " + "long " * 100 + "text"}))
    assert scores["clip_captions_cut"] == 1 and np.isfinite(scores["clip_text"])


@pytest.mark.parametrize("frames", [1, 17])
def test_dino_is_the_mean_of_its_frames(dino_folder: Path, frames: int):
    dino = Dino(Options(dino=str(dino_folder)))
    source, edit = noise(1, frames=frames), noise(2, frames=frames)
    single = [dino(seen(a[None], b[None]))["dino"] for a, b in zip(source, edit, strict=True)]
    assert dino(seen(source, edit))["dino"] == pytest.approx(np.mean(single), abs=1e-6)
    assert dino(seen(source, source))["dino"] == pytest.approx(1, abs=1e-6) and np.mean(single) < 0.999
    if frames > 1:
        assert dino(seen(source, source[::-1]))["dino"] < 0.999, "shuffled frames"


def test_dino_v2_reads_pictures_of_224(tmp_path: Path):
    dino = Dino(Options(dino=str(tiny_dino(tmp_path, version=2))))
    assert dino.images(noise(1)).shape == (1, 16)
    assert dino._size == 224


def test_what_is_no_dino_is_refused(clip_folder: Path):
    with pytest.raises(ValueError, match="is a clip; give one of vit, dinov2"):
        Dino(Options(dino=str(clip_folder)))


@pytest.mark.parametrize(
    ("metric", "options", "says"),
    [
        (Clip, {"clip": "nobody/has-this"}, "--clip nobody/has-this: is not on this machine; fetch it with: hf download nobody/has-this"),
        (Dino, {"dino": "nobody/has-this"}, "--dino nobody/has-this: is not on this machine; fetch it with: hf download"),
        (Clip, {"clip": "no_such_folder"}, "--clip no_such_folder: no such file or folder"),
    ],
)
def test_missing_weights_are_one_line(metric: type, options: dict[str, str], says: str):
    with pytest.raises(ValueError, match=says):
        metric(Options(**options))


def test_a_folder_without_the_model_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="is not a folder of that model"):
        Dino(Options(dino=str(tmp_path)))


class DistanceOfPixels(torch.nn.Module):
    """In LPIPS' place: the mean distance of what it is given, which it keeps."""

    def __init__(self, net: str, verbose: bool):
        super().__init__()
        self.net = net
        self.given: list[torch.Tensor] = []

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        self.given += [one, other]
        return (one - other).abs().mean().reshape(1, 1, 1, 1)


def test_lpips_is_given_pixels_from_minus_1_to_1_and_the_sources_inside_the_mask(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("byg_plugin.evaluation.metrics.lpips.find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-397923af.pth").touch()
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=DistanceOfPixels))
    source, edit = np.zeros((1, 4, 6, 3), dtype=np.uint8), np.zeros((1, 4, 6, 3), dtype=np.uint8)
    edit[0, 0, 5, 2] = edit[0, 3, 1, 0] = 255
    outside = np.ones((4, 6), dtype=bool)
    outside[0, 5] = False  # may change
    metric = Lpips(Options(lpips_net="vgg"))
    scores = metric(seen(source, edit, reference=edit, outside=outside))
    assert scores == {"lpips_source": pytest.approx(4 / 72), "lpips_outside": pytest.approx(2 / 72), "lpips_truth": 0}
    shown, beside, filled, _, _, _ = metric._model.given
    assert metric._model.net == "vgg" and not metric._model.training
    assert shown.shape == (1, 3, 4, 6) and shown.dtype == torch.float32 and (beside == -1).all()
    assert shown[0, 2, 0, 5] == shown[0, 0, 3, 1] == 1 and (shown == 1).sum() == 2 and (shown == -1).sum() == 70
    assert filled[0, 2, 0, 5] == -1 and filled[0, 0, 3, 1] == 1


@pytest.mark.parametrize("package", ["torchvision", "lpips"])
def test_lpips_without_its_packages_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, package: str):
    monkeypatch.setattr("byg_plugin.evaluation.metrics.lpips.find_spec", lambda name: None if name == package else object())
    with pytest.raises(ValueError, match=f"needs {package}, which is not installed: pip install torchvision lpips"):
        Lpips(Options())


def test_lpips_without_its_features_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("byg_plugin.evaluation.metrics.lpips.find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"alexnet-owt-7be5be79.pth, which is not on this machine; fetch it with: python -c"):
        Lpips(Options())
