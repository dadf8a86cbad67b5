"""A colour-and-shape reader in CLIP's stead: exact features of the tiny world's pictures and captions, and CLIP's formulas over them.

A feature vector says the background's colour and, of each corner, the colour and the shape that lie in it. Unlike CLIP's it knows this
world alone, and says nothing of place, size, texture or pebble.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from byg_plugin.demo import metrics, world
from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.metrics.base import Scores
from byg_plugin.evaluation.metrics.clip import directional

_COLOURS, _SHAPES = list(world.COLOURS), list(world.SHAPES)
_CORNER = len(_COLOURS) + len(_SHAPES)  # features of one
_LEAST = 0.02  # of a picture's pixels: an object
_HALF = world.SIZE // 2
_OBJECT = re.compile(rf"a ({'|'.join(_COLOURS)}) ({'|'.join(_SHAPES)}) ({'|'.join(world.CORNERS)})")
_BACKGROUND = re.compile(rf"({'|'.join(_COLOURS)}) background")


def read_caption(text: str) -> np.ndarray:
    """The features that a caption names."""
    features = np.zeros(len(_COLOURS) + len(world.CORNERS) * _CORNER)
    background = _BACKGROUND.search(text)
    if background is None:
        raise ValueError(f"the caption {text!r} is none of the tiny world's: it names no background")
    features[_COLOURS.index(background[1])] = 1
    for colour, shape, corner in _OBJECT.findall(text):
        _set(features, world.CORNERS.index(corner), colour, shape)
    return features


def read_picture(image: np.ndarray) -> np.ndarray:
    """The features that a (SIZE, SIZE, 3) uint8 picture shows."""
    labels = world.nearest_labels(image)
    areas = [(labels == index).sum() for index in range(len(_COLOURS))]
    background = int(np.argmax(areas))
    features = np.zeros(len(_COLOURS) + len(world.CORNERS) * _CORNER)
    features[background] = 1
    for corner in range(len(world.CORNERS)):
        here = np.zeros_like(labels, dtype=bool)
        top, left = corner // 2 * _HALF, corner % 2 * _HALF
        here[top : top + _HALF, left : left + _HALF] = True
        pieces = {colour: metrics.solid(here & (labels == index)) for index, colour in enumerate(_COLOURS) if index != background}
        colour = max(pieces, key=lambda name: pieces[name].sum())
        if pieces[colour].mean() >= _LEAST:
            shape = next((name for name in _SHAPES if metrics.is_shape(pieces[colour], name)), None)
            _set(features, corner, colour, shape)
    return features


def _set(features: np.ndarray, corner: int, colour: str, shape: str | None) -> None:
    start = len(_COLOURS) + corner * _CORNER
    features[start + _COLOURS.index(colour)] = 1
    if shape is not None:
        features[start + len(_COLOURS) + _SHAPES.index(shape)] = 1


class Reader:
    """Implements `evaluation.metrics.base.Metric`; `images` and `captions` are those of `evaluation.metrics.clip.Clip`."""

    columns: ClassVar[Mapping[str, bool]] = {"read_directional": True, "read_text": True}
    texts: ClassVar[tuple[str, ...]] = ("src_caption", "tgt_caption")
    settings: Mapping[str, object] = {}

    def images(self, frames: np.ndarray) -> Tensor:
        """(F, SIZE, SIZE, 3) uint8 -> (F, D) of length 1."""
        return _normalised([read_picture(frame) for frame in frames])

    def captions(self, texts: Sequence[str]) -> tuple[Tensor, int]:
        """(texts, D) of length 1, and how many of them were cut: none."""
        return _normalised([read_caption(text) for text in texts]), 0

    def __call__(self, seen: Seen) -> Scores:
        """Two columns."""
        assert seen.item.src_caption is not None and seen.item.tgt_caption is not None, "tuples have captions"
        (before, after), _ = self.captions([seen.item.src_caption, seen.item.tgt_caption])
        source, edit = self.images(seen.source), self.images(seen.edit)
        return {
            "read_directional": float(directional(source, edit, before, after).mean()),
            "read_text": float((edit @ after).mean()),
        }


def _normalised(features: Sequence[np.ndarray]) -> Tensor:
    return torch.nn.functional.normalize(torch.from_numpy(np.stack(features)), dim=-1)
