"""Sizes that a model takes: pictures are scaled and cropped to one in a single resampling, and put back where they were cut out.

Sizes are (width, height) in pixels; pictures are ComfyUI's: (B, H, W, 3) in [0, 1].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MAX_ASPECT = 2.0  # of a size; narrower pictures are cropped
MOST_FRAMES = 81  # of Wan's own training
Size = tuple[int, int]
Box = tuple[float, float, float, float]


def step_of(resolution: int, multiple: int, native: int | None) -> int:
    """Sides are multiples of this many pixels."""
    if native is not None:
        return math.lcm(32, multiple)
    return multiple if resolution < 256 else math.lcm(64, multiple)


def size_for(picture: Size, resolution: int, multiple: int, step: int) -> Size:
    """The size that a picture is edited at: about resolution x resolution pixels in the nearest shape, and never larger than the picture.

    Args:
        picture: its size.
        resolution: side of the square with as many pixels.
        multiple: sides must be multiples of this.
        step: sides of the usual sizes are multiples of this.

    Raises:
        ValueError: the picture or the resolution is too small.
    """
    width, height = picture
    if min(width, height) < multiple:
        raise ValueError(f"the picture has {width} x {height} pixels, the model needs at least {multiple} a side: give a larger one")
    if resolution < step:
        raise ValueError(f"resolution {resolution} is less than one step of {step} pixels: raise it")
    side = resolution // step * step
    sizes = {(side, side)}
    for across in range(step, int(resolution * MAX_ASPECT) + step, step):
        down = resolution**2 // across // step * step
        if down and max(across / down, down / across) <= MAX_ASPECT:
            sizes.add((across, down))
    aspect = math.log(width / height)
    size = min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - aspect), -s[0] * s[1]))
    if size[0] <= width and size[1] <= height:
        return size
    # Too small for it: the same shape scaled down to fit inside, in whole numbers.
    have, of = (width, size[0]) if width * size[1] <= height * size[0] else (height, size[1])
    small = [max(multiple, s * have // of // multiple * multiple) for s in size]
    return small[0], small[1]


def clip_length(frames: int, frame_multiple: int | None) -> int:
    """How many of a clip's frames are edited: n times the multiple and one, at most 81.

    Raises:
        ValueError: the model takes single pictures, and there are more.
    """
    if frame_multiple is None:
        return frames  # a batch of pictures
    return (min(frames, MOST_FRAMES) - 1) // frame_multiple * frame_multiple + 1


def crop_box(picture: Size, size: Size) -> Box:
    """(left, top, right, bottom): the largest centred part of a picture that has the shape of `size`; not in whole pixels."""
    width, height = picture
    across = min(1.0, height * size[0] / (size[1] * width))
    down = min(1.0, width * size[1] / (size[0] * height))
    left, top = (1 - across) / 2 * width, (1 - down) / 2 * height
    return left, top, min(left + across * width, width), min(top + down * height, height)


def fit(pictures: Tensor, size: Size) -> Tensor:
    """Scale and crop to a size, as the trainer does: LANCZOS on 8 bits, one resampling."""
    width, height = pictures.shape[2], pictures.shape[1]
    if (width, height) == size:
        return pictures
    box = crop_box((width, height), size)
    return torch.stack([_to_tensor(_to_pil(one).resize(size, Image.Resampling.LANCZOS, box=box)) for one in pictures])


def put_back(edits: Tensor, originals: Tensor) -> Tensor:
    """Edits at the size and in the frame of the pictures that they were cut out of; what was cut off is the original's.

    Args:
        edits: (B, h, w, 3), what became of `fit(originals, (w, h))`.
        originals: (B or more, H, W, 3), or one for all.

    Raises:
        ValueError: there are fewer originals than edits.
    """
    if len(originals) == 1:
        originals = originals.expand(len(edits), *originals.shape[1:])
    if len(originals) < len(edits):
        raise ValueError(f"{len(edits)} edits and {len(originals)} originals: connect the pictures that ByG Size was given")
    size = edits.shape[2], edits.shape[1]
    frame = originals.shape[2], originals.shape[1]
    if size == frame:
        return edits
    return torch.stack([_put_back(edit, original, frame) for edit, original in zip(edits, originals, strict=False)])


def _put_back(edit: Tensor, original: Tensor, frame: Size) -> Tensor:
    """Every pixel of the frame that lies wholly inside the box is the edit's, found by the inverse of `fit`'s map."""
    picture = _to_pil(edit)
    left, top, right, bottom = crop_box(frame, picture.size)
    first = math.ceil(left - 1e-6), math.ceil(top - 1e-6)
    last = math.floor(right + 1e-6), math.floor(bottom + 1e-6)
    across, down = picture.width / (right - left), picture.height / (bottom - top)
    box = (first[0] - left) * across, (first[1] - top) * down, (last[0] - left) * across, (last[1] - top) * down
    box = max(box[0], 0.0), max(box[1], 0.0), min(box[2], picture.width), min(box[3], picture.height)
    inside = picture.resize((last[0] - first[0], last[1] - first[1]), Image.Resampling.LANCZOS, box=box)
    whole = original.clone().cpu()
    whole[first[1] : last[1], first[0] : last[0], :3] = _to_tensor(inside)
    return whole[..., :3]


def _to_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture[..., :3].cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)
