"""Sizes of the ComfyUI nodes are the trainer's, and nothing is shifted on the way there and back."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from byg_plugin.config.sections import DatasetConfig
from byg_plugin.data.buckets import bucket_for, crop_to_bucket, to_tensor
from comfyui import sizes


@pytest.mark.parametrize("resolution", [64, 256, 512, 632, 950, 1024])
@pytest.mark.parametrize("multiple", [16, 32])
def test_sizes_are_the_trainers(resolution: int, multiple: int) -> None:
    native = resolution if resolution in (632, 950) else None
    dataset = DatasetConfig(tuples=".", cache_dir=".", resolution=resolution, bucket_step=None if native is None else 32)
    step = sizes.step_of(resolution, multiple, native)
    draw = Random(0)
    for _ in range(300):
        # As many small pictures as large ones.
        picture = int(2 ** draw.uniform(5, 12)), int(2 ** draw.uniform(5, 12))
        assert sizes.size_for(picture, resolution, multiple, step) == bucket_for(picture, dataset, multiple), picture


def test_a_picture_below_a_step_of_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="has 500 x 15 pixels, the model needs at least 16 a side"):
        sizes.size_for((500, 15), 512, 16, 64)


def test_a_resolution_below_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="less than one step of 64"):
        sizes.size_for((500, 500), 32, 16, 64)


def picture(width: int, height: int, seed: int = 0) -> Tensor:
    """One smooth random picture, 8 bits deep."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=g)
    smooth = torch.nn.functional.interpolate(small, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)
    return ((smooth * 255).round() / 255).permute(0, 2, 3, 1)


@pytest.mark.parametrize("size", [(640, 480), (333, 517)])
def test_pixels_are_the_trainers(size: tuple[int, int]) -> None:
    image = picture(*size)
    target = sizes.size_for(size, 256, 16, 64)
    fitted = sizes.fit(image, target)
    pil = Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy())
    wanted = to_tensor(crop_to_bucket(pil, target))
    assert torch.equal((fitted[0] * 255).round(), ((wanted.permute(1, 2, 0) + 1) * 127.5).round())


def offsets(a: Tensor, b: Tensor) -> tuple[float, float]:
    """By how many pixels (across, down) b lies beside a: the least-squares solution of b - a = -gradient(a) . offset."""
    grey, moved = a.mean(-1), b.mean(-1)
    down, across = (torch.from_numpy(g) for g in np.gradient(grey.numpy()))
    gradients = torch.stack([across[8:-8, 8:-8].flatten(), down[8:-8, 8:-8].flatten()], dim=1)
    solution = torch.linalg.lstsq(gradients, (grey - moved)[8:-8, 8:-8].flatten()[:, None]).solution
    return float(solution[0]), float(solution[1])


def test_the_measure_of_offsets_sees_a_tenth_of_a_pixel() -> None:
    image = picture(128, 96)[0]
    for across in (0.1, 1.0):
        box = (across, 0, 128, 96)
        pil = Image.fromarray((image * 255).round().to(torch.uint8).numpy())
        moved = torch.from_numpy(np.array(pil.resize((128, 96), Image.Resampling.LANCZOS, box=box))).float() / 255
        assert offsets(image, moved)[0] < -across / 4


@pytest.mark.parametrize("size", [(256, 256), (300, 200), (257, 515), (331, 333), (640, 359), (1000, 320)])
def test_back_is_not_shifted(size: tuple[int, int]) -> None:
    """What a model leaves as it was comes back where it was, in every shape."""
    image = picture(*size)
    fitted = sizes.fit(image, sizes.size_for(size, 192, 16, 16))
    back = sizes.put_back(fitted, image)
    assert back.shape == image.shape
    h, w = image.shape[1:3]
    left, top, right, bottom = (round(side) for side in sizes.crop_box(size, (fitted.shape[2], fitted.shape[1])))
    windows = [(left, (left + right) // 2), ((left + right) // 2, right)], [(top, (top + bottom) // 2), ((top + bottom) // 2, bottom)]
    for x in [(0, w), *windows[0]]:  # halves tell a wrong scale
        for y in [(0, h), *windows[1]]:
            across, down = offsets(image[0, slice(*y), slice(*x)], back[0, slice(*y), slice(*x)])
            assert abs(across) < 0.02 and abs(down) < 0.02, (x, y)
    assert (back - image).abs().mean() < 0.02


def test_what_was_cut_off_is_the_originals() -> None:
    image = picture(1000, 320)
    edit = torch.zeros(1, 128, 256, 3)
    back = sizes.put_back(edit, image)
    left, top, right, bottom = sizes.crop_box((1000, 320), (256, 128))
    assert (left, top, right, bottom) == (180.0, 0.0, 820.0, 320.0)
    assert torch.equal(back[:, :, :180], image[:, :, :180]) and torch.equal(back[:, :, 820:], image[:, :, 820:])
    assert back[:, :, 180:820].abs().max() == 0


def test_a_picture_of_the_right_size_is_untouched() -> None:
    image = picture(64, 64)
    assert sizes.fit(image, (64, 64)) is image
    assert sizes.put_back(image, image) is image


def test_fewer_originals_than_edits_are_refused() -> None:
    with pytest.raises(ValueError, match="3 edits and 2 originals"):
        sizes.put_back(torch.zeros(3, 16, 16, 3), torch.zeros(2, 32, 32, 3))
    assert sizes.put_back(torch.zeros(3, 16, 16, 3), torch.ones(1, 32, 48, 3)).shape == (3, 32, 48, 3)


@pytest.mark.parametrize(("frames", "kept"), [(1, 1), (4, 1), (5, 5), (80, 77), (81, 81), (200, 81)])
def test_clips_are_cut_as_edit_py_cuts_them(frames: int, kept: int) -> None:
    assert sizes.clip_length(frames, 4) == kept
    assert sizes.clip_length(frames, None) == frames
