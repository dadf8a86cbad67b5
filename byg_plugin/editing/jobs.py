"""What the command line asks for, checked before anything heavy is imported or loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from byg_plugin.config.sections import Config, DatasetConfig
from byg_plugin.data.buckets import Size
from byg_plugin.data.clips import clip_info, is_clip
from byg_plugin.data.media import image_size
from byg_plugin.data.placeholders import known
from byg_plugin.data.tuples import MEDIA_SUFFIXES, EditTuple, read_tuples, read_tuples_file
from byg_plugin.editing import manifest
from byg_plugin.editing.editor import Editor, Words
from byg_plugin.editing.pipeline import MAX_SEED
from byg_plugin.editing.request import NO_MODEL
from byg_plugin.editing.sources import MOST_FRAMES
from byg_plugin.folders import make_writable
from byg_plugin.places import check_lora
from byg_plugin.progress import Progress
from byg_plugin.user_files import files_in, hidden_in

_REPORTED_CUT = 0.2  # of a picture's pixels
_SAMPLER = ("device", "dtype", "quantization", "steps", "schedule", "negative")
# Options of edit.py that only some methods honour.
OF_METHOD = {
    "lora": (*_SAMPLER, "lora", "strength", "solver", "guidance", "cfg_high", "cfg_low", "show_unguided"),
    "base": (*_SAMPLER, "solver", "guidance", "cfg_high", "cfg_low", "show_unguided"),
    "copy": (),
    "flowedit": (*_SAMPLER, "n_max", "n_min", "n_avg", "source_guidance", "target_guidance"),
    "kontext": ("device", "dtype", "steps", "guidance"),
}
# Keys that the LoRA may know better than --config, and the options that stand above it; None: there is none.
_FROM_LORA = {
    "conditioning.guidance": "guidance",
    "conditioning.max_text_tokens": None,
    "conditioning.position": None,
    "dataset.resolution": "resolution",
    "model.boundary": None,
    "sample.cfg_high_noise": "cfg_high",
    "sample.cfg_low_noise": "cfg_low",
    "sample.negative": "negative",
    "sample.schedule": "schedule",
    "sample.solver": "solver",
    "sample.steps": "steps",
}
_GUIDED = ("cfg_high", "cfg_low", "negative")  # which few-step LoRAs are not


@dataclass(frozen=True, kw_only=True)
class Job:
    """One edit to make."""

    source: Path
    instruction: str
    name: str
    """Stem of the files it is written to."""
    item: EditTuple | None = None
    """The tuple it was asked for by."""

    def words(self, reads: Sequence[str]) -> Words:
        """What a method reads of it; `reads` are fields of a tuple.

        Raises:
            ValueError: its tuple, of a benchmark without captions, has none to read.
        """
        if lacking := [name for name in reads if self.item is not None and known(name, getattr(self.item, name)) is None]:
            raise ValueError(
                f"{self.name}: its tuple has no {' and '.join(lacking)}, which this method reads; evaluate.py --captions adds it"
            )
        words = tuple(self.instruction if name == "instruction" else str(getattr(self.item, name)) for name in reads)
        return words[0] if len(words) == 1 else words

    def files(self, out: Path) -> tuple[Path, Path]:
        """The edit and its side-by-side."""
        suffix = ".mp4" if is_clip(self.source) else ".png"
        return out / f"{self.name}{suffix}", out / f"{self.name}_side_by_side{suffix}"


Sized = tuple[Size, int, Job]
"""A job with its edit's (width, height) and its place among all jobs, which its seed follows."""


def jobs_of(args: argparse.Namespace, dataset: DatasetConfig | None = None) -> list[Job]:
    """What the command line asks for; relative sources of `--tuples` start from the configuration's dataset.image_root.

    Texts that break a rule of training's are edited by all the same, unless a configuration's dataset.rules forbids it.

    Raises:
        ValueError: nothing, too much, or something missing.
    """
    if args.tuples:
        if args.source or args.instruction:
            raise ValueError("--tuples has its own sources and instructions: leave out --source and --instruction")
        # A folder of tuples has its images beside them, wherever those of training are.
        if dataset is None or Path(args.tuples).is_dir():
            tuples = read_tuples_file(Path(args.tuples), rules=dataset.rules if dataset else "warn")
        else:
            tuples = read_tuples(dataset.model_copy(update={"tuples": args.tuples}))
        return [
            Job(source=item.source, instruction=item.instruction, name=f"{index:05d}_{item.source.stem}", item=item)
            for index, item in enumerate(tuples)
        ]
    if args.instruction is not None and not args.instruction.strip():
        raise ValueError("--instruction is empty: say what to change")
    if not args.source or not args.instruction:
        raise ValueError("give --source IMAGE_OR_FOLDER and --instruction TEXT, or --tuples FILE")
    source = Path(args.source)
    if source.is_dir():
        suffixes = sorted(MEDIA_SUFFIXES)
        images = files_in(source, suffixes)
        if not images:
            raise ValueError(f"--source {source}: no image or clip in this folder ({', '.join(suffixes)}{hidden_in(source, suffixes)})")
        return [Job(source=path, instruction=args.instruction, name=path.stem) for path in images]
    if not source.is_file():
        raise ValueError(f"--source {source}: no such file or folder")
    return [Job(source=source, instruction=args.instruction, name=source.stem)]


def check_arguments(args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """What would be without effect, or stop late, before anything heavy is imported.

    Raises:
        ValueError: names the option.
    """
    clips = sum(is_clip(job.source) for job in jobs)
    if args.frames is not None and not clips:
        raise ValueError(f"--frames {args.frames} is for clips, and there is none among the sources: leave it out")
    if args.batch_size > 1 and clips == len(jobs):
        raise ValueError(f"--batch-size {args.batch_size} is for images, clips are edited one by one: leave it out")
    if args.seed + len(jobs) - 1 > MAX_SEED:
        raise ValueError(f"--seed {args.seed}: edit i uses seed + i, and {len(jobs)} edits go beyond {MAX_SEED}; lower it")
    _check_method(args)
    if args.skip_done and args.show_unguided:
        raise ValueError("--skip-done cannot tell whether what is there shows --show-unguided's column: leave one of them out")
    if args.model is None and not args.config:
        raise ValueError(NO_MODEL)
    if args.method == "lora":
        check_lora(args.lora, "--lora ")


def _check_method(args: argparse.Namespace) -> None:
    own = OF_METHOD[args.method]
    given = [name for names in OF_METHOD.values() for name in names if _given(args, name)]
    if foreign := [f"--{name.replace('_', '-')}" for name in dict.fromkeys(given) if name not in own]:
        raise ValueError(f"--method {args.method} has no use for {', '.join(foreign)}: leave it out")
    if args.method == "lora" and args.lora is None:
        raise ValueError("--lora is missing: give the LoRA's .safetensors file, or --method base, copy, flowedit or kontext")
    if args.method == "kontext" and args.model is None:
        raise ValueError("--method kontext: give --model, a folder or hub id such as black-forest-labs/FLUX.1-Kontext-dev")
    if args.method in ("base", "copy", "flowedit") and not args.config:
        raise ValueError(f"--method {args.method}: give --config, a training configuration; it says family, sizes and guidance")
    if args.method in ("base", "flowedit") and not args.tuples:
        raise ValueError(f"--method {args.method} edits by captions, not by an instruction: give --tuples")
    if args.method == "kontext" and not args.config and args.resolution is None:
        raise ValueError("--method kontext: give --config, for the sizes of the methods it is compared with, or --resolution")
    if args.method == "kontext" and args.batch_size > 1:
        raise ValueError(f"--batch-size {args.batch_size}: --method kontext edits images one by one, leave it out")


def _given(args: argparse.Namespace, name: str) -> bool:
    """0 is given too, and equals False."""
    value = getattr(args, name)
    return value is not None and value is not False


def check_overrides(args: argparse.Namespace, given: Config | None, resolved: Config, *, few_steps: bool = False) -> None:
    """A `--set` whose value the LoRA's own has replaced is an error; `few_steps`: it is trained for few, without guidance.

    Raises:
        ValueError: names key, both values and the option that has the last word, if there is one.
    """
    for override in args.set:
        key = override.partition("=")[0].replace(" ", "")
        option = _FROM_LORA.get(key)
        if key not in _FROM_LORA or (option is not None and getattr(args, option) is not None):
            continue
        section, name = key.split(".")
        asked, used = (getattr(getattr(config, section), name) for config in (given, resolved))
        if asked != used:
            own = option is None or (few_steps and option in _GUIDED)
            remedy = "leave it out" if own else f"give --{str(option).replace('_', '-')} {asked}"
            whose = "the LoRA's own value, " if own else ""
            raise ValueError(f"--set {override}: edits do not take it from --config, and use {whose}{used!r}; {remedy}")


def check_out(out: Path, jobs: Sequence[Job]) -> None:
    """Before the long work: the folder can be written, and no result would overwrite a source, another result or a file of the user's.

    A folder of edits has a manifest, and its edits may be made again; in any other folder every file is the user's.

    Raises:
        ValueError: it cannot, one would, or the manifest there is none of ours.
    """
    sources = {job.source.resolve() for job in jobs}
    edited_into = (out / manifest.NAME).exists()
    made_by: dict[Path, Path] = {}
    for job in jobs:
        for file in job.files(out):
            if file.resolve() in sources:
                raise ValueError(f"--out {out}: {file.name} would overwrite a source; choose another folder")
            if file in made_by:
                raise ValueError(f"--source: {made_by[file].name} and {job.source.name} would both become {file.name}; rename one")
            if not edited_into and file.exists():
                raise ValueError(
                    f"--out {out}: {file.name} is there, and without {manifest.NAME} it is no edit of edit.py's; move it, or choose "
                    "another folder"
                )
            made_by[file] = job.source
    if edited_into:
        manifest.read_manifest(out)
    try:
        make_writable(out)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written: {error.strerror}; choose another folder") from error


def report_losses(pipe: Editor, job: Job, bucket: Size, frames: int | None) -> None:
    """Say on stderr what of a source will not be in its edit.

    Raises:
        ValueError: it is unreadable, or a clip shorter than `frames`.
    """
    if is_clip(job.source):
        clip = clip_info(job.source)
        size = clip.size
        _report_shortened(job.source, clip.frames, pipe.sources.clip_length(job.source, clip, frames), frames)
    else:
        size = image_size(job.source)
    _report_cut(job.source, size, bucket, pipe.sources.dataset)


def _report_cut(source: Path, size: Size, bucket: Size, dataset: DatasetConfig) -> None:
    """Say on stderr that much of a picture will not be in its edit."""
    kept = min(size[0] / size[1], bucket[0] / bucket[1]) / max(size[0] / size[1], bucket[0] / bucket[1])
    if 1 - kept > _REPORTED_CUT:
        remedy = "raise dataset.max_aspect" if dataset.buckets else "set dataset.buckets = true"
        text = f"{source}: {1 - kept:.0%} of its {size[0]} x {size[1]} pixels are cut off for an edit of {bucket[0]} x {bucket[1]}"
        Progress.write(f"{text}; pad it, or {remedy} in --config", file=sys.stderr)


def _report_shortened(source: Path, available: int, edited: int, asked: int | None) -> None:
    """Say on stderr that fewer frames are edited than the clip has, or than `asked` for, and why."""
    wanted = available if asked is None else asked
    if asked is None and available >= MOST_FRAMES + 4:
        Progress.write(f"{source}: its first {edited} of {available} frames are edited; --frames asks for more", file=sys.stderr)
    elif edited < wanted:
        Progress.write(f"{source}: {edited} of {wanted} frames are edited, Wan takes 4n + 1", file=sys.stderr)
