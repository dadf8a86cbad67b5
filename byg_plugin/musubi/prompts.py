"""`musubi.sample_prompts`: previews are edits, so each prompt has a source. All is looked at before a model is loaded.

Imports nothing of the host: its readers are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from byg_plugin.data import clips
from byg_plugin.data.media import load_image

Prompt = Mapping[str, Any]
LoadVideo = Callable[[str, int, int], list[Any]]
"""The host's: path, first frame, last one -> frames (H, W, 3)."""
SIDE = 16
"""Sides of previews are rounded down to multiples of so many pixels."""

_SUFFIXES = (".txt", ".toml", ".json")  # as the host compares them
_LEAST = {"width": ("w", SIDE), "height": ("h", SIDE), "frame_count": ("f", 1), "sample_steps": ("s", 1)}
# The host hands them in and prints them.
_UNUSED = {
    "guidance_scale": "--g does nothing here: FLUX.1's guidance is conditioning.guidance, others have --l (classifier-free guidance)",
    "discrete_flow_shift": "--fs does nothing here, the times of a preview are the model's own: leave it out",
}


def check_prompts(path: str, load_prompts: Callable[[str], Any], load_video: LoadVideo) -> None:
    """Read the prompts as the host will, and a frame of each source.

    Args:
        path: `musubi.sample_prompts`.
        load_prompts: the host's.
        load_video: the host's.

    Raises:
        ValueError: the file is not what the host reads or has no prompt, or a prompt has no source that can be read, sizes that are
            none, or what previews do not heed.
    """
    what = f"musubi.sample_prompts = {path}"
    if not path.endswith(_SUFFIXES):
        raise ValueError(f"{what}: the host reads .txt (a prompt each line), .toml and .json: rename it")
    try:
        prompts = load_prompts(path)
    except (OSError, ValueError, LookupError, TypeError, AssertionError, RecursionError) as error:
        raise ValueError(f"{what}: no prompts as the host reads them ({type(error).__name__}: {error}): mend it, or use a .txt") from error
    if not prompts:
        raise ValueError(f"{what}: no prompt in it: add lines like make it snow --ci photo.jpg --w 512 --h 512, or leave the option out")
    for number, prompt in enumerate(prompts, 1):
        try:
            _check(prompt)
            source_frames(prompt, 1, load_video)
        except ValueError as error:
            raise ValueError(f"{what}: prompt {number} {error}") from error


def _check(prompt: Prompt) -> None:
    for name, why in _UNUSED.items():
        if prompt.get(name) is not None:
            raise ValueError(f"has {name} = {prompt[name]!r}: {why}")
    for name, (letter, least) in _LEAST.items():
        value = prompt.get(name, least)
        if type(value) is not int or value < least:
            raise ValueError(f"has {name} = {value!r}: give --{letter} as a whole number, {least} or more")


def source_of(prompt: Prompt) -> str | None:
    """The clip or image that a prompt edits."""
    images = prompt.get("control_image_path") or [None]
    image = images if isinstance(images, str) else images[0]
    return prompt.get("control_video_path") or image or prompt.get("image_path")


def source_frames(prompt: Prompt, frames: int, load_video: LoadVideo) -> list[Image.Image]:
    """An image, or up to `frames` frames of a clip.

    Raises:
        ValueError: there is no source, or it cannot be read; goes on from "prompt 1 ".
    """
    source = source_of(prompt)
    if source is None:
        raise ValueError("has no source; add --ci IMAGE (of a clip --cn CLIP)")
    if not Path(source).is_file():
        raise ValueError(f"has the source {source}, which is no file; add --ci IMAGE (of a clip --cn CLIP)")
    if prompt.get("control_video_path"):
        return _clip(source, frames, load_video)
    if clips.is_clip(Path(source)):
        raise ValueError(f"has the clip {source} as an image: name it with --cn")
    try:
        return [load_image(Path(source))]
    except ValueError as error:  # of a training image one may remove the tuples
        raise ValueError(f"has a source that cannot be used: {str(error).replace(' or remove its tuples', '')}") from error


def _clip(source: str, frames: int, load_video: LoadVideo) -> list[Image.Image]:
    import av  # the host reads clips with it

    try:
        found = load_video(source, 0, frames)
    except (av.error.FFmpegError, LookupError, OSError) as error:  # LookupError: no video in it
        raise ValueError(f"has a source that cannot be used: {source}: no readable clip ({error}); replace it") from error
    if not found:
        raise ValueError(f"has a source that cannot be used: {source}: no frame can be decoded from it; replace it")
    return [Image.fromarray(array) for array in found]
