"""Appendix D.2: render each prompt with a Wan text-to-video pipeline, then write the tuples of the clips.

    python dataset_tools/render_videos.py --captions data/prompts.jsonl --out data/clips
    accelerate launch --num_processes 8 dataset_tools/render_videos.py --captions ... --out ...     one clip a GPU at a time

    OUT/clips/<id>.mp4        written whole or not at all; prompt, seed and settings are in its comment
    OUT/settings/<id>.json    the same
    OUT/tuples.jsonl          written anew at the end of each run: captions share one text, the styles are swapped

A clip that is there is not rendered again. Look at the clips (review.py) and discard what misses its style.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: the repository must be importable, this folder must not
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "dataset_tools"

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from byg_plugin import _cli
from byg_plugin.config.extras import require
from byg_plugin.data import clips
from byg_plugin.data.tuples import is_unicode
from byg_plugin.documents import json_value
from byg_plugin.families import wan
from byg_plugin.folders import make_writable
from byg_plugin.journal import numbered_records, replacing, write_records
from byg_plugin.processes import joined

from .backend import seed_of
from .pool import refuse_inputs
from .settings import RenderSettings, read_settings
from .video import hold_out, video_tuple

TUPLES = "tuples.jsonl"
_LIBRARIES = (["diffusers"], ["transformers"], [None])  # that parts of a pipeline come from
# What the picture depends on; a clip made with others is not taken for one of these.
_OF_THE_PICTURE = ("model", "width", "height", "frames", "fps", "steps", "guidance", "guidance_2", "negative", "dtype")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt to render."""

    name: str
    prompt: str
    caption: str
    style: str
    seed: int
    clip: Path
    settings_file: Path

    def record(self, settings: RenderSettings) -> dict[str, Any]:
        """Prompt, seed and settings as they are written beside the clip."""
        how = {name: getattr(settings, name) for name in _OF_THE_PICTURE}
        return {"id": self.name, "prompt": self.prompt, "style": self.style, "seed": self.seed, **how}


def jobs(settings: RenderSettings) -> list[Job]:
    """All prompts in the order of the file.

    Raises:
        ValueError: no such file, a line is no prompt, or the tuples would be written over it.
    """
    path, out = Path(settings.captions), Path(settings.out)
    if not path.is_file():
        raise ValueError(f"captions = {path}: no such file; prepare_captions.py writes it")
    refuse_inputs(out / TUPLES, {"captions": settings.captions})
    made = []
    for number, record in numbered_records(path):
        texts = {}
        for name in ("id", "prompt", "caption", "style"):
            value = record.get(name)
            if not isinstance(value, str) or not value.strip() or not is_unicode(value):
                raise ValueError(f"{path}: line {number}: {name} = {value!r}; a line has id, prompt, caption and style, as texts")
            texts[name] = value.strip()
        file = _file_name(texts["id"])
        made.append(
            Job(
                name=texts["id"],
                prompt=texts["prompt"],
                caption=texts["caption"],
                style=texts["style"],
                seed=seed_of(settings.seed, texts["id"]),
                clip=out / "clips" / f"{file}.mp4",
                settings_file=out / "settings" / f"{file}.json",
            )
        )
    if not made:
        raise ValueError(f"{path}: no prompt in it")
    clips_of = Counter(job.clip for job in made)
    if twice := [job.name for job in made if clips_of[job.clip] > 1]:
        raise ValueError(f"{path}: the id {twice[0]!r} stands twice; each prompt needs its own")
    return made


def _file_name(name: str) -> str:
    """A file's stem for an id, the same on every system and different for different ids."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80].strip(".")
    return plain if plain == name else f"{plain}-{zlib.crc32(name.encode()):08x}"


def missing(every: Sequence[Job], settings: RenderSettings) -> list[Job]:
    """Jobs whose clip is not there.

    Raises:
        ValueError: a clip was made with other settings.
    """
    left = []
    for job in every:
        if not job.clip.is_file():
            left.append(job)
        elif (before := _read(job.settings_file)) != job.record(settings):
            now = job.record(settings)
            changed = [name for name, value in now.items() if before.get(name) != value]
            named = ", ".join(f"{name} {before.get(name)!r} -> {now[name]!r}" for name in changed)
            raise ValueError(f"{job.clip}: was rendered with other settings ({named}); use those, remove the clip, or give another --out")
    return left


def render(settings: RenderSettings, shard: Sequence[Job], device: Any, show: bool) -> None:
    """Render jobs one after another on one device.

    Raises:
        ValueError: the pipeline cannot be loaded, makes values that are no picture, or a file cannot be written.
    """
    import torch

    from byg_plugin.progress import Progress

    if not shard:
        return
    pipe = load_pipeline(settings, device)
    experts = pipe.config.get("boundary_ratio") is not None
    negative = wan.NEGATIVE if settings.negative is None else settings.negative
    for job in Progress(shard, desc="render", unit="clip", disable=not show):
        frames = pipe(
            prompt=job.prompt,
            negative_prompt=negative,
            width=settings.width,
            height=settings.height,
            num_frames=settings.frames,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            guidance_scale_2=settings.guidance_2 if experts else None,
            generator=torch.Generator("cpu").manual_seed(job.seed),  # the CPU's: the same noise on every card
            output_type="np",
        ).frames[0]
        if not np.isfinite(frames).all():
            raise ValueError(f"{job.name}: the pipeline made values that are not finite with dtype = {settings.dtype!r}; use bfloat16")
        _write(job, frames, settings)


def load_pipeline(settings: RenderSettings, device: Any) -> Any:
    """The pipeline with its VAE in float32.

    Raises:
        ValueError: it is not there, or no Wan text-to-video pipeline.
    """
    require("diffusers", "rendering", "diffusers")
    require("av", "writing clips", "video")
    import torch
    from diffusers import AutoencoderKLWan, WanPipeline

    try:
        _refuse_foreign_code(WanPipeline.load_config(settings.model))
        vae = AutoencoderKLWan.from_pretrained(settings.model, subfolder="vae", use_safetensors=True, torch_dtype=torch.float32)
        dtype = getattr(torch, settings.dtype)
        pipe = WanPipeline.from_pretrained(settings.model, trust_remote_code=False, use_safetensors=True, vae=vae, torch_dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model = {settings.model!r} cannot be loaded as a Wan pipeline: {reason}") from error
    pipe.set_progress_bar_config(disable=True)
    if settings.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def _refuse_foreign_code(index: Mapping[str, Any]) -> None:
    """Not left to diffusers: earlier versions import whatever module a folder's model_index.json names."""
    named = {"_class_name": index.get("_class_name"), **{part: value for part, value in index.items() if not part.startswith("_")}}
    for part, value in named.items():
        own = not isinstance(value, str) if part == "_class_name" else isinstance(value, list) and value[:1] not in _LIBRARIES
        if own:
            raise ValueError(f"model_index.json: {part} = {value} is code of its own, which is never run")


def write_tuples(settings: RenderSettings, every: Sequence[Job]) -> tuple[Path, int]:
    """Write OUT/tuples.jsonl of the clips that are there; returns (file, how many)."""
    out = Path(settings.out)
    path = out / TUPLES
    rendered = [job for job in every if job.clip.is_file()]

    def records() -> Iterator[Mapping[str, Any]]:
        for job in rendered:
            meta = {"seed": job.seed, "model": settings.model}
            yield video_tuple(job.clip.relative_to(out).as_posix(), job.name, job.caption, job.style, meta)

    write_records(path, records())
    return path, len(rendered)


def _images(frames: np.ndarray) -> Iterator[Image.Image]:
    for frame in frames:
        yield Image.fromarray((frame.clip(0, 1) * 255).round().astype(np.uint8))


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(job: Job, frames: np.ndarray, settings: RenderSettings) -> None:
    import av

    record = job.record(settings)
    with replacing(job.settings_file) as file:
        file.write(json.dumps(record, ensure_ascii=False, indent=1).encode())
    try:
        # Its presence says that it is done: last, and in one step.
        clips.write_clip(job.clip, _images(frames), settings.fps, record)
    except (OSError, av.error.FFmpegError) as error:
        raise ValueError(f"{job.clip}: cannot be written: {error.strerror or error}; make room and run the same command again") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    settings = read_settings(RenderSettings, "render", __doc__ or "", arguments)
    every = jobs(settings)
    left = [] if settings.tuples_only else missing(every, settings)
    for folder in ("clips", "settings"):
        make_writable(Path(settings.out) / folder)

    first = os.environ.get("RANK", "0") == "0"
    if left:
        from byg_plugin.config.device import resolve_device

        state = joined(cpu=resolve_device(settings.device).type == "cpu")
        first = state.is_main_process
        _cli.say(f"{len(left)} of {len(every)} clips to render, {state.num_processes} at once", first)
        try:
            # Nobody renders before everybody has looked, or the shares would differ.
            state.wait_for_everyone()
            render(settings, left[state.process_index :: state.num_processes], state.device, first)
            state.wait_for_everyone()
        finally:
            state.destroy_process_group()
    if not first:
        return
    path, count = write_tuples(settings, every)
    _cli.say(f"{count} clips, their tuples: {path}")
    if settings.hold_out and count:
        _cli.say(str(hold_out(path, settings.hold_out, required=False)))


if __name__ == "__main__":
    _cli.run(main)
