"""Previews: the source beside its edit, at fixed seeds, while training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image

from byg_plugin import sampling
from byg_plugin.images import save_png, side_by_side, to_pil
from byg_plugin.models.base import Family
from byg_plugin.training.config import Config

if TYPE_CHECKING:
    from byg_plugin.data.dataset import CachedTuples
    from byg_plugin.hosts import Host

logger = get_logger(__name__)


def folder(config: Config, step: int) -> Path:
    """Where the previews of a step lie."""
    return Path(config.output.dir) / "previews" / f"step-{step:06d}"


def write(config: Config, family: Family, host: Host, data: CachedTuples, step: int, accelerator: Accelerator) -> None:
    """Edit the first `[sample] items` tuples and write `previews/step-000500/<n>.png`. A failure is told, never raised."""
    try:
        images = _render(config, family, host, data)
        place = folder(config, step)
        place.mkdir(parents=True, exist_ok=True)
        for index, (image, instruction) in enumerate(images):
            settings = {"step": step, "instruction": instruction, "seed": config.sample.seed + index, "steps": config.sample.steps}
            save_png(image, place / f"{index:03d}.png", settings)
        _log(accelerator, [image for image, _ in images], step)
    except Exception as error:  # noqa: BLE001 - a picture is no reason to lose a run; what it touches is restored by contexts
        logger.warning("preview at step %d failed and training goes on: %s: %s", step, type(error).__name__, error)


@torch.no_grad()
def _render(config: Config, family: Family, host: Host, data: CachedTuples) -> list[tuple[Image.Image, str]]:
    sample = config.sample
    latents = []
    weights = host.ema if sample.weights == "ema" else host.live
    for index in range(min(sample.items, len(data))):
        example = data[index]
        source = example["source"][None].to(host.device)
        text = {name: value[None].to(host.device) for name, value in example["instruction"].items()}
        noise = sampling.seeded_noise(tuple(source.shape), sample.seed + index, host.device)
        nodes = sampling.sampling_nodes(family, sample.steps, sample.schedule, tuple(source.shape))
        with weights() as velocity:
            latents.append((source, sampling.sample(velocity, noise, text, source, nodes), data.tuples[index].instruction))
    # The VAE comes only now and goes at once: by turns with the activations of the network.
    vae = family.load_vae(host.device)
    rows = []
    for source, edit, instruction in latents:
        pictures = [to_pil(family.decode_latents(vae, x)[0, :, 0]) for x in (source, edit)]
        rows.append((side_by_side(*pictures), instruction))
    return rows


def _log(accelerator: Accelerator, images: list[Image.Image], step: int) -> None:
    for tracker in accelerator.trackers:
        arrays: Any = {f"preview/{i}": np.asarray(image)[None] for i, image in enumerate(images)}
        if tracker.name == "tensorboard":
            tracker.log_images(arrays, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({name: list(value) for name, value in arrays.items()}, step=step)
