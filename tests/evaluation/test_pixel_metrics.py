"""Metrics of pixels in closed form: identical pictures, known shifts, masks, both ranges, still and shuffled clips."""

from __future__ import annotations

import numpy as np
import pytest

from byg_plugin.evaluation.metrics.base import Options, unit
from byg_plugin.evaluation.metrics.error import Error, mean_error
from byg_plugin.evaluation.metrics.flicker import Flicker, steadiness
from byg_plugin.evaluation.metrics.psnr import MOST, Psnr, psnr
from byg_plugin.evaluation.metrics.ssim import Ssim, ssim
from tests.support.evaluation import noise, seen

METRICS = [Error, Psnr, Ssim]
ONE, OTHER = noise(1)[0], noise(2)[0]


@pytest.mark.parametrize("function", [mean_error, psnr, ssim])
def test_is_symmetric_and_the_same_in_both_ranges(function):
    assert function(ONE, OTHER) == pytest.approx(function(OTHER, ONE), rel=1e-12)
    assert function(ONE / 255, OTHER / 255) == pytest.approx(function(ONE, OTHER), rel=1e-12)
    assert function(ONE, ONE) != function(ONE, OTHER)


@pytest.mark.parametrize("wrong", [ONE.astype(float), ONE / 127.5 - 1, ONE.astype(np.int64)])
def test_another_range_is_refused(wrong):
    with pytest.raises(ValueError, match=r"uint8, or floats in \[0, 1\]"):
        unit(wrong)


def test_a_known_shift_of_colours():
    grey = np.full((32, 40, 3), 100, dtype=np.uint8)
    assert mean_error(grey, grey + np.uint8(51)) == pytest.approx(0.2)
    assert psnr(grey, grey + np.uint8(51)) == pytest.approx(-20 * np.log10(0.2))
    a, b = 100 / 255, 151 / 255  # no variance: luminance alone
    assert ssim(grey, grey + np.uint8(51)) == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), rel=1e-9)


def test_identical_pictures_are_perfect_and_finite():
    assert (mean_error(ONE, ONE), psnr(ONE, ONE), ssim(ONE, ONE)) == (0, MOST, pytest.approx(1))


def test_similarity_by_its_formula():
    """One window: the mean over the picture's inner part of one pixel."""
    one, other = noise(3, 11, 11)[0] / 255, noise(4, 11, 11)[0] / 255
    along = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(along, along)[..., None] / np.outer(along, along).sum()
    mean_one, mean_other = (weights * one).sum((0, 1)), (weights * other).sum((0, 1))
    spread_one, spread_other = (weights * one**2).sum((0, 1)) - mean_one**2, (weights * other**2).sum((0, 1)) - mean_other**2
    both = (weights * one * other).sum((0, 1)) - mean_one * mean_other
    c1, c2 = 0.01**2, 0.03**2
    wanted = (2 * mean_one * mean_other + c1) * (2 * both + c2) / ((mean_one**2 + mean_other**2 + c1) * (spread_one + spread_other + c2))
    assert ssim(one, other) == pytest.approx(float(wanted.mean()), abs=1e-9)


def test_a_picture_below_the_window_is_refused():
    with pytest.raises(ValueError, match="11 pixels or more, not 40 x 8"):
        ssim(noise(1, 8)[0], noise(2, 8)[0])


@pytest.mark.parametrize("metric", METRICS)
def test_outside_the_mask_an_edit_inside_it_counts_nothing(metric):
    source = noise(1)
    edit, outside = source.copy(), np.ones((32, 40), dtype=bool)
    edit[:, :16, :16], outside[:16, :16] = 0, False
    scores = metric(Options())(seen(source, edit, outside=outside, reference=edit))
    perfect = metric(Options())(seen(source, source))
    (name,) = {column.partition("_")[0] for column in scores}
    assert scores[f"{name}_outside"] == pytest.approx(perfect[f"{name}_source"])
    assert scores[f"{name}_truth"] == pytest.approx(perfect[f"{name}_source"])
    assert abs(scores[f"{name}_source"] - perfect[f"{name}_source"]) > 0.01
    edit[:, 20:, 20:] = 0
    worse = metric(Options())(seen(source, edit, outside=outside))
    assert abs(worse[f"{name}_outside"] - perfect[f"{name}_source"]) > 0.01
    assert worse[f"{name}_truth"] is None


@pytest.mark.parametrize("metric", METRICS)
def test_without_mask_and_truth_and_with_a_mask_of_everything_there_is_no_score(metric):
    everything = np.zeros((32, 40), dtype=bool)
    scores = metric(Options())(seen(noise(1), noise(2), outside=everything))
    known = {column for column, value in scores.items() if value is not None}
    assert {column.partition("_")[2] for column in known} == {"source"}
    assert set(scores) == set(metric.columns)


def test_a_mask_that_leaves_no_whole_window_has_no_similarity():
    outside = np.zeros((32, 40), dtype=bool)
    outside[:10] = True
    assert ssim(ONE, OTHER, outside) is None
    outside[:11] = True
    assert ssim(ONE, OTHER, outside) is not None


def test_clips_count_frame_by_frame():
    source, edit = noise(1, frames=3), noise(1, frames=3)
    edit[2] = source[2] // 2
    wanted = mean_error(source[2], edit[2]) / 3
    assert Error(Options())(seen(source, edit, "a.mkv"))["error_source"] == pytest.approx(wanted)
    shuffled = Error(Options())(seen(source, source[[1, 2, 0]], "a.mkv"))["error_source"]
    assert shuffled > 0.2


def test_flicker_of_a_still_clip_of_black_and_white_and_of_a_known_shift():
    still = np.repeat(noise(1), 4, axis=0)
    assert steadiness(still) == 1
    assert steadiness(np.stack([np.zeros_like(ONE), np.full_like(ONE, 255)] * 2)) == 0
    ramp = np.stack([np.full_like(ONE, 10 * number) for number in range(5)])
    assert steadiness(ramp) == pytest.approx(1 - 10 / 255)
    assert steadiness(ramp[[0, 2, 1, 3, 4]]) == pytest.approx(1 - (20 + 10 + 20 + 10) / 4 / 255)
    assert steadiness(noise(1)) is None
    assert Flicker(Options())(seen(ramp, still[[0, 1, 2, 3, 3]], "a.mkv")) == {
        "flicker": 1,
        "flicker_of_source": pytest.approx(1 - 10 / 255),
    }
