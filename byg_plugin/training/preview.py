"""Previews: the source beside its edit, at fixed seeds, while training."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image
from torch import Tensor

from byg_plugin import folders, sampling
from byg_plugin.config.sections import Config, OutputConfig
from byg_plugin.data.clips import write_clip
from byg_plugin.images import frames_of, save_png, side_by_side, strip
from byg_plugin.models.base import Family
from byg_plugin.objectives.base import Text

if TYPE_CHECKING:
    from byg_plugin.data.dataset import CachedTuples
    from byg_plugin.hosts import Host

logger = get_logger(__name__)
THUMBNAIL = 512  # pixels
_NAME = re.compile(r"step-(\d{6,})")


def folder(output: OutputConfig, step: int) -> Path:
    """Where the previews of a step lie."""
    return Path(output.dir) / "previews" / f"step-{step:06d}"


def is_whole(config: Config, data: CachedTuples, step: int) -> bool:
    """Whether the previews of a step are all there: an earlier version's folder may lack what a kill has cost."""
    written = folder(config.output, step)
    wanted = [written / f"{i:03d}{suffix}" for i in range(min(config.sample.items, len(data))) for suffix in _suffixes(data, i)]
    return written.is_dir() and all(path.is_file() for path in wanted)


def _suffixes(data: CachedTuples, index: int) -> tuple[str, ...]:
    return (".png", ".mp4") if len(data.bucket(index)) > 2 else (".png",)


def set_aside_later(beside: Path, step: int) -> list[Path]:
    """Rename the previews, or whatever lies in such folders of steps, after `step`; returns their new places.

    Args:
        beside: the folder that holds them.
        step: the last that stays.

    Raises:
        OSError: one cannot be renamed.
    """
    numbered = [(path, _NAME.fullmatch(path.name)) for path in sorted(beside.glob("step-*"))]
    return [folders.set_aside(path) for path, match in numbered if match and int(match[1]) > step]


def thumbnail(output: OutputConfig) -> str | None:
    """The first picture of the last previews as `data:image/jpeg;base64,...`, at most 512 pixels a side; None: there are none yet.

    One that cannot be read is warned of: it is no reason to lose the file that it was to be in.
    """
    numbered = [(_NAME.fullmatch(path.parent.name), path) for path in folder(output, 0).parent.glob("step-*/000.png")]
    written = sorted((int(match[1]), path) for match, path in numbered if match)
    if not written:
        return None
    try:
        with Image.open(written[-1][1]) as image:
            small = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # of Pillow: what a broken file is
        logger.warning("output.thumbnail: %s cannot be read (%s) and is left out", written[-1][1], error)
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    jpeg = BytesIO()
    small.save(jpeg, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{b64encode(jpeg.getvalue()).decode('ascii')}"


def write(
    config: Config,
    family: Family,
    host: Host,
    data: CachedTuples,
    step: int,
    accelerator: Accelerator,
    *,
    writes: bool = True,
    agree: Callable[[bool], bool] = bool,
) -> None:
    """Edit the first `[sample] items` tuples and write `previews/step-000500/<n>.png`, of clips also `<n>.mp4`.

    Source beside edit; with guidance, the edit without it comes third. The folder appears whole, in place of an earlier one. A failure
    is told, never raised; but in the passes through weights in shards, which the others would wait for.

    Args:
        config: the whole configuration.
        family: decodes.
        host: edits.
        data: whose first tuples.
        step: of the folder's name.
        accelerator: its trackers get the pictures.
        writes: false where weights in shards are gathered by every process, and this one only takes part in that.
        agree: whether any process says yes.
    """
    edits = edited(config, family, host, data, f"preview at step {step}", items=config.sample.items, agree=agree)
    if writes and edits:
        with logged(f"preview at step {step}"):
            _write(config, family, host, data, step, accelerator, edits)


def edited(
    config: Config,
    family: Family,
    host: Host,
    data: CachedTuples,
    what: str,
    *,
    items: int,
    unguided: bool = True,
    agree: Callable[[bool], bool] = bool,
) -> list[Latents]:
    """The first `items` tuples and their edits as latents; none where that fails, which is told as of `what`.

    Args:
        config: the whole configuration.
        family: whose sampler.
        host: edits.
        data: whose tuples.
        what: for the log.
        items: at most as many.
        unguided: where there is guidance, also the edit without it.
        agree: whether any process says yes, of those that take part.
    """
    inputs: list[Inputs] = []
    with logged(what):
        inputs = _inputs(config, host, data, items, unguided=unguided)
    if agree(not inputs):
        return []
    edits: list[Latents] = []
    with nullcontext() if host.sharding else logged(what):
        edits = _edits(config, family, host, inputs)
    return edits


@contextmanager
def logged(what: str) -> Iterator[None]:
    """A failure is told as of `what`, not raised."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a picture is no reason to lose a run; what it touches is restored by contexts
        logger.warning("%s failed and training goes on: %s: %s", what, type(error).__name__, error, main_process_only=False)


def _write(
    config: Config, family: Family, host: Host, data: CachedTuples, step: int, accelerator: Accelerator, latents: list[Latents]
) -> None:
    rendered = decoded(config.model.dtype, family, host, latents)
    pictures = []
    with folders.written_whole(folder(config.output, step), replace=True) as written:
        for index, columns in enumerate(rendered):
            instruction = data.tuples[index].instruction
            settings = {"step": step, "instruction": instruction, "seed": config.sample.seed + index, "steps": config.sample.steps}
            is_clip = len(columns[0]) > 1
            picture = strip(columns) if is_clip else side_by_side(*(frames[0] for frames in columns))
            save_png(picture, written / f"{index:03d}.png", settings)
            if is_clip:
                beside = [side_by_side(*frames) for frames in zip(*columns, strict=True)]
                write_clip(written / f"{index:03d}.mp4", beside, config.fps or 1.0, settings)
            pictures.append(picture)
    _log(accelerator, pictures, step)


Latents = list[Tensor]
"""Of one tuple: source, edit and, with guidance, the edit without it."""
Inputs = tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor] | None]]
"""Of one tuple: source, instruction, and the negative text of each edit."""


def _inputs(config: Config, host: Host, data: CachedTuples, items: int, *, unguided: bool = True) -> list[Inputs]:
    negative = None if config.negative is None else _on(host, data.encoding(config.negative))
    negatives: list[dict[str, Tensor] | None] = [None] if negative is None else [negative, None][: 1 + unguided]
    examples = [data[index] for index in range(min(items, len(data)))]
    return [(each["source"][None].to(host.device), _on(host, each["instruction"]), negatives) for each in examples]


@torch.no_grad()
def _edits(config: Config, family: Family, host: Host, inputs: list[Inputs]) -> list[Latents]:
    sample = config.sample
    latents = []
    weights = host.ema if sample.weights == "ema" else host.live
    for index, (source, text, negatives) in enumerate(inputs):
        seed = sample.seed + index
        noise = sampling.seeded_noise(tuple(source.shape), seed, host.device)
        with weights() as velocity:
            edit = partial(sampling.sample_as_configured, config, family, velocity, noise, text, source, seeds=[seed])
            latents.append([source, *(edit(steps=sample.steps, schedule=sample.schedule, negative=each) for each in negatives)])
    return latents


@torch.no_grad()
def decoded(dtype: str, family: Family, host: Host, latents: list[Latents]) -> Iterator[list[list[Image.Image]]]:
    """Of each tuple, one at a time, the frames of each column. The VAE comes only now: by turns with the activations of the network."""
    for x in (x for columns in latents for x in columns):
        sampling.finite(dtype, x, "the latents of the edit")
    vae = family.load_vae(host.device)

    def frames(x: Tensor) -> list[Image.Image]:
        return frames_of(sampling.finite(dtype, family.decode_latents(vae, x), "the decoded pixels")[0])

    for columns in latents:
        yield [frames(x) for x in columns]


def _on(host: Host, text: Text) -> dict[str, Tensor]:
    """One text as a batch of one, on the host's device."""
    return {name: value[None].to(host.device) for name, value in text.items()}


def _log(accelerator: Accelerator, images: list[Image.Image], step: int) -> None:
    for tracker in accelerator.trackers:
        arrays: Any = {f"preview/{i}": np.asarray(image)[None] for i, image in enumerate(images)}
        if tracker.name == "tensorboard":
            tracker.log_images(arrays, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: list(value) for name, value in arrays.items()}, step=step)
