"""Sizes and crops of buckets."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from byg_plugin.config.sections import DatasetConfig
from byg_plugin.data.buckets import all_buckets, bucket_for, bucket_step, crop_to_bucket, is_below_resolution


def dataset(resolution: int = 512, **keys: object) -> DatasetConfig:
    return DatasetConfig.model_validate({"tuples": "t", "cache_dir": "c", "resolution": resolution, **keys})


@pytest.mark.parametrize("resolution", [64, 256, 512, 768, 1024])
@pytest.mark.parametrize("max_aspect", [1.0, 2.0, 3.5])
def test_buckets_have_about_the_asked_area_and_bounded_aspect(resolution: int, max_aspect: float) -> None:
    config = dataset(resolution, max_aspect=max_aspect)
    step = bucket_step(config, 16)
    assert step == (16 if resolution < 256 else 64)
    found = all_buckets(config, 16)
    assert (resolution, resolution) in found and len(set(found)) == len(found)
    for width, height in found:
        assert width % step == height % step == 0
        assert max(width / height, height / width) <= max_aspect
        # A side less than a step is lost by flooring.
        assert resolution**2 - width * step < width * height <= resolution**2


def test_every_bucket_has_its_turned_one() -> None:
    found = set(all_buckets(dataset(512), 16))
    assert {(height, width) for width, height in found} == found


SIZES = [(w, h) for w in (16, 17, 100, 333, 512, 640, 1000, 1920, 6000) for h in (16, 31, 99, 256, 511, 512, 1080, 4000)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("keys", [{}, {"buckets": False}, {"max_aspect": 4.0}, {"resolution": 64}, {"bucket_step": 32}])
def test_never_scaled_up(size: tuple[int, int], keys: dict[str, object]) -> None:
    config = dataset(**keys)
    bucket = bucket_for(size, config, 16)
    assert bucket[0] <= size[0] and bucket[1] <= size[1] and not [side for side in bucket if side % 16]
    if not is_below_resolution(bucket, config, 16):
        assert bucket in all_buckets(config, 16)
    if min(size) >= 2 * config.resolution:
        assert bucket in all_buckets(config, 16)


def test_aspect_error_is_bounded() -> None:
    # In steps of 64 the widest bucket within 2:1 is 640 x 384; elsewhere the neighbours are nearer.
    for width in range(600, 1200, 7):
        bucket = bucket_for((width, 600), dataset(512), 16)
        assert abs(math.log(bucket[0] / bucket[1] * 600 / width)) < (0.183 if width > 1000 else 0.14), (width, bucket)


def test_small_pictures_fill_what_they_have() -> None:
    config = dataset(512)
    assert bucket_for((500, 500), config, 16) == (496, 496)
    assert bucket_for((511, 511), config, 16) == (496, 496)
    assert bucket_for((512, 512), config, 16) == (512, 512)
    assert bucket_for((100, 300), config, 16) == (96, 160)  # the shape of 384 x 640, the highest within 1:2
    assert is_below_resolution((496, 496), config, 16)
    # Exact multiples lose nothing to rounding.
    for side in range(16, 512, 16):
        assert bucket_for((side, side), config, 16) == (side, side)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (15, 15), (500, 15)])
def test_too_small_for_the_model(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels are too few: the model needs at least 16"):
        bucket_for(size, dataset(), 16)


def test_bucket_step_must_fit_the_model() -> None:
    with pytest.raises(ValueError, match=r"dataset\.bucket_step = 24 must be a multiple of 16"):
        bucket_step(dataset(bucket_step=24), 16)
    with pytest.raises(ValueError, match=r"dataset\.resolution = 64 is less than one bucket step of 128"):
        bucket_step(dataset(64, bucket_step=128), 16)


def ramp(width: int, height: int) -> Image.Image:
    """Red is the column, green the row, both from 0 to 255."""
    x = np.broadcast_to((np.arange(width) + 0.5) / width * 255, (height, width))
    y = np.broadcast_to(((np.arange(height) + 0.5) / height * 255)[:, None], (height, width))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize(
    ("size", "bucket"), [((300, 100), (64, 64)), ((100, 300), (64, 64)), ((200, 150), (96, 48)), ((130, 131), (128, 128))]
)
def test_crop_is_centred_and_as_small_as_can_be(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    cropped = crop_to_bucket(ramp(*size), bucket)
    assert cropped.size == bucket
    pixels = np.asarray(cropped, dtype=float)
    first, last = pixels[bucket[1] // 2, [0, -1], 0] / 255, pixels[[0, -1], bucket[0] // 2, 1] / 255
    for ends, side, other, have, had in ((first, 0, 1, size, bucket), (last, 1, 0, size, bucket)):
        # The share of this side that is kept: all of it, or what the bucket's shape leaves of it.
        kept = min(1.0, have[other] * had[side] / (had[other] * have[side]))
        pixel = kept / had[side]
        assert ends[0] == pytest.approx((1 - kept) / 2 + pixel / 2, abs=0.012)
        assert ends[1] == pytest.approx((1 + kept) / 2 - pixel / 2, abs=0.012)


def test_crop_takes_the_frame_of_a_picture_in_another_size() -> None:
    # The middle half of a 2:1 frame; of its own 2.1:1 a square is 48 %.
    framed, own = (np.asarray(crop_to_bucket(ramp(210, 100), (64, 64), frame=frame), dtype=float)[32, :, 0] for frame in ((400, 200), None))
    assert framed[[0, -1]] / 255 == pytest.approx([0.25 + 0.5 / 128, 0.75 - 0.5 / 128], abs=0.005)
    assert own[0] - framed[0] > 2


def test_crop_that_would_scale_up_is_our_error() -> None:
    with pytest.raises(AssertionError, match="scaled up"):
        crop_to_bucket(ramp(60, 64), (64, 64))
