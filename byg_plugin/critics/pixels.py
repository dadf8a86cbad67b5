"""Pictures as vision-language models take them, in torch: what an image processor does, differentiable.

A processor rounds to 8 bits after it has resized; this does not, so that a resized picture differs from it by at most that rounding
(1.5 / 255 of the range, before the division by the standard deviation). A picture of the right size is the same to float32's rounding.

Legend: C = 3, H W picture height and width, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_ASPECT = 200  # longest side over shortest that Qwen's processors take


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One picture as a model takes it.

    Attributes:
        inputs: what the model's `get_image_features` is called with; `pixel_values` carries the gradient.
        tokens: of the model's sequence.
        grid: (1, 3) rows of patches, for models that count positions by them.
    """

    inputs: Mapping[str, Any]
    tokens: int
    grid: Tensor | None = None


class View(Protocol):
    """How one kind of model sees a picture."""

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a picture of this size is resized to.

        Raises:
            ValueError: the model cannot see such a picture.
        """
        ...

    def see(self, picture: Tensor) -> Seen:
        """(3, H, W) in [0, 1] -> what the model takes."""
        ...


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """(3, H, W) -> (3, height, width): bicubic, antialiased, clamped to [0, 1] as 8 bits would."""
    if picture.shape[-2:] == (height, width):
        return picture
    return F.interpolate(picture[None], (height, width), mode="bicubic", align_corners=False, antialias=True)[0].clamp(0, 1)


def normalised(picture: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(3, H, W) in [0, 1] -> zero mean and unit variance, by the channel's published figures."""
    mean_, std_ = (torch.tensor(values, dtype=picture.dtype, device=picture.device)[:, None, None] for values in (mean, std))
    return (picture - mean_) / std_


@dataclass(frozen=True, kw_only=True)
class PatchView:
    """Qwen2-VL to Qwen3-VL: any size, in patches, those that become one token beside each other.

    Attributes:
        patch: side of a patch in pixels.
        merge: patches a side of a token.
        frames: times that a picture is repeated in a patch.
        least, most: pixels of a picture.
    """

    patch: int
    merge: int
    frames: int
    least: int
    most: int
    mean: Sequence[float]
    std: Sequence[float]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Multiples of a token's side near the picture's own, with `least` to `most` pixels; see `View`."""
        if max(height, width) > _MOST_ASPECT * min(height, width):
            raise ValueError(f"a picture of {width} x {height} pixels: the critic sees sides of at most 1 : {_MOST_ASPECT}")
        side = self.patch * self.merge
        rows, columns = (round(value / side) * side for value in (height, width))
        if rows * columns > self.most:
            shrink = math.sqrt(height * width / self.most)
            rows, columns = (max(side, math.floor(value / shrink / side) * side) for value in (height, width))
        elif rows * columns < self.least:
            grow = math.sqrt(self.least / (height * width))
            rows, columns = (math.ceil(value * grow / side) * side for value in (height, width))
        return rows, columns

    def see(self, picture: Tensor) -> Seen:
        """See `View`."""
        height, width = self.size(*picture.shape[-2:])
        patches = self._patches(normalised(resized(picture, height, width), self.mean, self.std))
        grid = torch.tensor([[1, height // self.patch, width // self.patch]], device=picture.device)
        tokens = patches.shape[0] // self.merge**2
        return Seen(inputs={"pixel_values": patches, "image_grid_thw": grid}, tokens=tokens, grid=grid)

    def _patches(self, picture: Tensor) -> Tensor:
        """(3, H, W) -> (patches, 3 x frames x patch x patch), the patches of a token after one another."""
        channels, height, width = picture.shape
        p, m = self.patch, self.merge
        split = picture.reshape(channels, height // p // m, m, p, width // p // m, m, p).permute(1, 4, 2, 5, 0, 3, 6)
        repeated = split.unsqueeze(5).expand(*split.shape[:5], self.frames, p, p)
        return repeated.reshape(height * width // p**2, channels * self.frames * p * p)


@dataclass(frozen=True, kw_only=True)
class SquareView:
    """InternVL: one square, the picture stretched to it.

    Attributes:
        side: of the square in pixels.
        tokens: that it becomes.
    """

    side: int
    tokens: int
    mean: Sequence[float]
    std: Sequence[float]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """See `View`."""
        return self.side, self.side

    def see(self, picture: Tensor) -> Seen:
        """See `View`."""
        pixels = normalised(resized(picture, self.side, self.side), self.mean, self.std)
        return Seen(inputs={"pixel_values": pixels[None]}, tokens=self.tokens)


class PaddedView(SquareView):
    """LLaVA-OneVision, as it sees each of several pictures: one square, the picture in its middle on the mean colour.

    `tokens` counts the one that ends a picture too.
    """

    def see(self, picture: Tensor) -> Seen:
        """See `View`."""
        pixels = normalised(resized(self._padded(picture), self.side, self.side), self.mean, self.std)
        size = torch.tensor([picture.shape[-2:]], device=picture.device)
        # One of two pictures: a single one would be shown in crops too.
        return Seen(inputs={"pixel_values": pixels[None], "image_sizes": size, "batch_num_images": [2]}, tokens=self.tokens)

    def _padded(self, picture: Tensor) -> Tensor:
        _, height, width = picture.shape
        side = max(height, width)
        if height == width:
            return picture
        top, left = (side - height) // 2, (side - width) // 2
        colour = torch.tensor([int(value * 255) / 255 for value in self.mean], dtype=picture.dtype, device=picture.device)
        around = F.pad(torch.ones_like(picture[:1]), (left, side - width - left, top, side - height - top))
        return F.pad(picture, (left, side - width - left, top, side - height - top)) + (1 - around) * colour[:, None, None]
