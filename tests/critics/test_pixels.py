"""Pictures as the models' own image processors make them, and with a gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from byg_plugin.critics.pixels import PatchView, resized
from byg_plugin.critics.vlm import describe
from tests.support.critic_runs import NATIVE, picture, tensor
from tests.support.tiny_critics import KINDS, critic_config, critic_folder

STRANGE = [(37, 53), (90, 41), (21, 20), (64, 64)]
TOLERANCE = 1e-5
LEAST_STD = 0.26  # of the processors' standard deviations: CLIP's


def own(kind: str, image: Image.Image) -> dict[str, Tensor]:
    """What the model's own processor makes of it; of LLaVA-OneVision, of the first of two."""
    processor = AutoImageProcessor.from_pretrained(critic_folder(kind), backend="pil")
    several = kind == "llava_onevision"
    made = processor(images=[[image, image]] if several else image, return_tensors="pt")
    return {name: value[:1] if several else value for name, value in made.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_of_the_right_size_is_the_processors_own(kind: str):
    image = picture(*NATIVE[kind])
    view = describe(critic_config(critic_folder(kind), image_size=None)).view
    theirs, ours = own(kind, image), view.see(tensor(image)).inputs
    values = theirs["pixel_values"]
    values = values[:, 0] if values.dim() == 5 else values
    assert values.shape == ours["pixel_values"].shape and values.std() > 0.3
    assert (values - ours["pixel_values"]).abs().max() <= TOLERANCE
    if "image_grid_thw" in theirs:
        assert torch.equal(theirs["image_grid_thw"], ours["image_grid_thw"])


@pytest.mark.parametrize("size", STRANGE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resized_picture_differs_by_the_rounding_to_8_bits_alone(kind: str, size: tuple[int, int]):
    image = picture(*size)
    view = describe(critic_config(critic_folder(kind))).view
    theirs, ours = own(kind, image), view.see(tensor(image)).inputs
    values = theirs["pixel_values"]
    values = values[:, 0] if values.dim() == 5 else values
    assert values.shape == ours["pixel_values"].shape
    # Pillow rounds after the rows and after the columns.
    assert (values - ours["pixel_values"]).abs().max() <= 1.5 / 255 / LEAST_STD


@pytest.mark.parametrize("size", [(16, 24), (64, 48), (37, 90)])
def test_resizing_is_pillows_without_its_rounding(size: tuple[int, int]):
    image = picture(40, 56)
    planes = [plane.convert("F").resize(size[::-1], Image.Resampling.BICUBIC) for plane in image.split()]
    exact = torch.stack([torch.from_numpy(np.asarray(plane).copy()) for plane in planes]) / 255
    assert (resized(tensor(image), *size) - exact.clamp(0, 1)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_every_pixel_has_a_gradient_and_it_is_the_difference(kind: str):
    view = describe(critic_config(critic_folder(kind))).view
    leaf = (tensor(picture(44, 36)).double() * 0.8 + 0.1).requires_grad_()

    def value(x: Tensor) -> Tensor:
        pixels = view.see(x).inputs["pixel_values"]
        return (pixels * torch.linspace(-1, 1, pixels.numel(), dtype=pixels.dtype).reshape(pixels.shape)).sum()

    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    assert (gradient != 0).float().mean() > 0.95
    along = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-6
    difference = (value(leaf + step * along) - value(leaf - step * along)) / (2 * step)
    assert difference.item() == pytest.approx((gradient * along).sum().item(), rel=1e-7)


def test_sizes_are_limited_by_the_key():
    view = describe(critic_config(critic_folder("qwen3_vl"), image_size=24)).view
    assert isinstance(view, PatchView) and view.most == 24**2
    assert view.size(48, 48) == (24, 24) and view.size(20, 20) == (16, 16) and view.size(8, 100) == (8, 80)
    with pytest.raises(ValueError, match=r"1 : 200"):
        view.size(1, 201)
