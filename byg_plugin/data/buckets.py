"""Aspect-ratio buckets: every picture becomes one of a few sizes, scaled down and cropped, never scaled up."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from byg_plugin.training.config import DatasetConfig

Size = tuple[int, int]
"""(width, height) in pixels."""


def bucket_step(dataset: DatasetConfig, pixel_multiple: int) -> int:
    """Sides of buckets are multiples of this many pixels.

    Raises:
        ValueError: `dataset.bucket_step` or `dataset.resolution` does not fit the model.
    """
    step = dataset.bucket_step
    if step is None:
        step = pixel_multiple if dataset.resolution < 256 else math.lcm(64, pixel_multiple)
    if step % pixel_multiple:
        raise ValueError(f"dataset.bucket_step = {step} must be a multiple of {pixel_multiple}, the model's own step")
    if dataset.resolution < step:
        raise ValueError(f"dataset.resolution = {dataset.resolution} is less than one bucket step of {step} pixels; raise it")
    return step


def all_buckets(dataset: DatasetConfig, pixel_multiple: int) -> list[Size]:
    """The sizes of about resolution x resolution pixels within the allowed aspect ratios, by aspect."""
    step = bucket_step(dataset, pixel_multiple)
    side = dataset.resolution // step * step
    if not dataset.buckets:
        return [(side, side)]
    area = dataset.resolution**2
    sizes = {(side, side)}
    for width in range(step, int(dataset.resolution * dataset.max_aspect) + step, step):
        height = area // width // step * step
        if height and max(width / height, height / width) <= dataset.max_aspect:
            sizes.add((width, height))
    return sorted(sizes, key=lambda size: size[0] / size[1])


def bucket_for(size: Size, dataset: DatasetConfig, pixel_multiple: int) -> Size:
    """The bucket of a picture of this size: the nearest aspect ratio; a smaller picture gets the largest size it fills.

    Raises:
        ValueError: a side is less than the model's own step.
    """
    width, height = size
    if min(width, height) < pixel_multiple:
        raise ValueError(f"{width} x {height} pixels are too few: the model needs at least {pixel_multiple} a side; remove it")
    aspect = math.log(width / height)
    bucket = min(all_buckets(dataset, pixel_multiple), key=lambda b: (abs(math.log(b[0] / b[1]) - aspect), -b[0] * b[1]))
    if bucket[0] <= width and bucket[1] <= height:
        return bucket
    # Scaled down to fit inside the picture: the longest side that covers both, in the model's own (finer) step.
    scale = min(width / bucket[0], height / bucket[1])
    small = [max(pixel_multiple, int(side * scale) // pixel_multiple * pixel_multiple) for side in bucket]
    return small[0], small[1]


def is_below_resolution(bucket: Size, dataset: DatasetConfig, pixel_multiple: int) -> bool:
    """Whether a picture was too small for a bucket of the asked resolution."""
    return bucket not in all_buckets(dataset, pixel_multiple)


def crop_to_bucket(image: Image.Image, bucket: Size) -> Image.Image:
    """Scale (LANCZOS) so that the bucket is just covered, then crop the centre. Both sides must be at least the bucket's."""
    if image.size == bucket:
        return image
    scale = max(bucket[0] / image.width, bucket[1] / image.height)
    assert scale <= 1, f"{image.size} would be scaled up to {bucket}"
    width, height = (max(side, round(have * scale)) for side, have in zip(bucket, image.size, strict=True))
    left, top = (width - bucket[0]) // 2, (height - bucket[1]) // 2
    # One resampling: the crop as a box in the original's pixels.
    box = (left / width * image.width, top / height * image.height)
    far = ((left + bucket[0]) / width * image.width, (top + bucket[1]) / height * image.height)
    return image.resize(bucket, Image.Resampling.LANCZOS, box=(*box, *far))


def to_tensor(image: Image.Image) -> Tensor:
    """8-bit RGB -> (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
