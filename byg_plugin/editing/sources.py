"""What of a source is edited: its size, its pixels and its frames, alike for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from PIL import Image, ImageOps

from byg_plugin.config.sections import DatasetConfig
from byg_plugin.data.buckets import Size, bucket_for, crop_to_bucket
from byg_plugin.data.clips import Clip, clip_info, is_clip, read_clip
from byg_plugin.data.media import load_image, to_rgb

MOST_FRAMES = 81  # of Wan's own training; longer clips are edited where `frames` asks for it

Source = str | Path | Image.Image


def as_seen(source: Source, dataset: DatasetConfig, multiple: int, size: Size | None = None) -> Image.Image:
    """A source as the model sees it: upright RGB, cropped to `size` (width, height), or to its bucket.

    Args:
        source: a file, or an image.
        dataset: whose buckets.
        multiple: of pixels, which the model's sides are.
        size: instead of the bucket's; at most the source's own.
    """
    image = to_rgb(ImageOps.exif_transpose(source)) if isinstance(source, Image.Image) else load_image(Path(source))
    return crop_to_bucket(image, size or bucket_for(image.size, dataset, multiple))


class SizeRules(Protocol):
    """What a model takes: `models.base.Family` knows it."""

    @property
    def name(self) -> str: ...
    def pixel_multiple(self) -> int: ...
    def clip_frames(self, frames: int) -> int: ...


class Sources:
    """Sources at the sizes of `[dataset]` and of a model."""

    def __init__(self, dataset: DatasetConfig, rules: SizeRules):
        self.dataset, self._rules = dataset, rules

    def size(self, source: Source) -> Size:
        """(width, height) of the edit of a source."""
        if isinstance(source, str | Path) and is_clip(Path(source)):
            return self._bucket(clip_info(Path(source)).size)
        return self.image(source).size

    def image(self, source: Source) -> Image.Image:
        """The picture at its edit's size."""
        return as_seen(source, self.dataset, self._rules.pixel_multiple())

    def clip(self, source: Path, frames: int | None) -> tuple[list[Image.Image], float]:
        """A clip's frames at its edit's size and length, and the frames a second; see `clip_length`."""
        clip = clip_info(source)
        count = self.clip_length(source, clip, frames)
        bucket = self._bucket(clip.size)
        return [crop_to_bucket(frame, bucket) for frame in read_clip(source, count)], clip.fps

    def clip_length(self, source: Path, clip: Clip, frames: int | None) -> int:
        """How many frames of a clip are edited where `frames` are asked for (None: the most up to 81), rounded down to 4n + 1.

        Raises:
            ValueError: the model edits images alone, or the clip is shorter than `frames`.
        """
        if self._rules.clip_frames(MOST_FRAMES) == 1:
            raise ValueError(f"{source}: a clip, and {self._rules.name} edits images")
        if frames is not None and frames > clip.frames:
            raise ValueError(f"{source}: has {clip.frames} frames, {frames} are asked for")
        return self._rules.clip_frames(min(clip.frames, MOST_FRAMES) if frames is None else frames)

    def _bucket(self, size: Size) -> Size:
        return bucket_for(size, self.dataset, self._rules.pixel_multiple())
