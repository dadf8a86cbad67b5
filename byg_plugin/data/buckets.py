"""Aspect-ratio buckets: every picture becomes one of a few sizes, scaled down and cropped, never scaled up."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

    from byg_plugin.config.sections import DatasetConfig

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


@lru_cache(maxsize=16)  # asked for once an image
def all_buckets(dataset: DatasetConfig, pixel_multiple: int) -> tuple[Size, ...]:
    """The sizes of about resolution x resolution pixels within the allowed aspect ratios, by aspect."""
    step = bucket_step(dataset, pixel_multiple)
    side = dataset.resolution // step * step
    if not dataset.buckets:
        return ((side, side),)
    area = dataset.resolution**2
    sizes = {(side, side)}
    for width in range(step, int(dataset.resolution * dataset.max_aspect) + step, step):
        height = area // width // step * step
        if height and max(width / height, height / width) <= dataset.max_aspect:
            sizes.add((width, height))
    return tuple(sorted(sizes, key=lambda size: size[0] / size[1]))


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
    # The bucket's shape, scaled down to fit inside the picture, in the model's own (finer) step. In whole numbers: a quotient
    # just under its exact value would cost a step.
    have, of = (width, bucket[0]) if width * bucket[1] <= height * bucket[0] else (height, bucket[1])
    small = [max(pixel_multiple, side * have // of // pixel_multiple * pixel_multiple) for side in bucket]
    return small[0], small[1]


def is_below_resolution(bucket: Size, dataset: DatasetConfig, pixel_multiple: int) -> bool:
    """Whether a picture was too small for a bucket of the asked resolution."""
    return bucket not in all_buckets(dataset, pixel_multiple)


def crop_to_bucket(image: Image.Image, bucket: Size, frame: Size | None = None) -> Image.Image:
    """Scale (LANCZOS) so that the bucket is just covered, and crop the centre, in one resampling.

    Args:
        image: both sides at least the bucket's.
        bucket: the result's size.
        frame: a picture of the same frame in another size, whose relative crop is taken; default: the image's own.
    """
    assert image.width >= bucket[0] and image.height >= bucket[1], f"{image.size} would be scaled up to {bucket}"
    return cover(image, bucket, frame)


def cover(
    image: Image.Image, bucket: Size, frame: Size | None = None, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """`crop_to_bucket` of an image of any size: what judges edits also meets sources smaller than their edits."""
    if image.size == bucket and frame in (None, bucket):
        return image
    width, height = frame or image.size
    # The largest centred part of the frame that has the bucket's shape, as fractions of the frame's sides.
    across = min(1.0, height * bucket[0] / (bucket[1] * width))
    down = min(1.0, width * bucket[1] / (bucket[0] * height))
    left, top = (1 - across) / 2 * image.width, (1 - down) / 2 * image.height
    box = (left, top, min(left + across * image.width, image.width), min(top + down * image.height, image.height))
    return image.resize(bucket, resample, box=box)


def to_tensor(image: Image.Image) -> Tensor:
    """8-bit RGB -> (3, H, W) float32 in [-1, 1]."""
    import torch  # not above: edit.py's arguments are checked without it

    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
