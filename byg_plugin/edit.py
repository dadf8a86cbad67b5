"""Edit images and clips with a trained LoRA, or by a baseline on the same items.

    python byg_plugin/edit.py --model black-forest-labs/FLUX.1-dev --lora out/byg_flux-ema.safetensors \
        --source photo.jpg --instruction "make it snow" --out edits

    python byg_plugin/edit.py --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --lora out/byg_wan_high_noise.safetensors \
        --source in.mp4 --instruction "make it a cartoon" --out edits

Of two experts either LoRA file names both. A clip keeps its frames a second; its first 81 frames are edited, or `--frames`, rounded
down to 4n + 1.
`--source` may be a folder; `--tuples` edits every tuple of a JSONL file. FLUX's guidance, resolution, position ids and the sampler's
schedule are what the LoRA says of its training, whatever `--config` says (Wan edits at its native size, and classifier-free guidance is
that of `--config` or the published one); the options below override them. `edits.jsonl` beside the
results says what was edited by what (`editing/manifest.py`).

Baselines, to be scored in one table with it (`evaluate.py --compare`), with the same tuples and `--seed`:

    python byg_plugin/edit.py --method flowedit --config configs/flux_image.toml --tuples held_out.jsonl --out edits_flowedit

`base` paints the target caption without the source, `copy` is the source, `flowedit` is FlowEdit (Kulikov et al. 2024) by both captions;
their sizes are those of a LoRA trained by --config. `kontext` is stock FLUX.1 Kontext; of --config it takes the sizes alone. From Python:

    from byg_plugin import EditPipeline
    pipe = EditPipeline.from_lora("out/byg_flux-ema.safetensors", model="black-forest-labs/FLUX.1-dev")
    pipe("photo.jpg", "make it snow").save("edit.png")
    source, edit, fps = pipe.clip("in.mp4", "make it snow")
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from byg_plugin import _cli
from byg_plugin.config.loading import load_config
from byg_plugin.config.sections import Config, DatasetConfig
from byg_plugin.data.clips import clip_info, is_clip
from byg_plugin.editing.copies import Copies
from byg_plugin.editing.editor import Editor, texts_of
from byg_plugin.editing.jobs import OF_METHOD, Sized, check_arguments, check_out, check_overrides, jobs_of, report_losses
from byg_plugin.editing.kontext import Kontext
from byg_plugin.editing.methods import Base, FlowEdit
from byg_plugin.editing.pipeline import MAX_SEED, MOST_STRENGTH, EditPipeline
from byg_plugin.editing.results import Results
from byg_plugin.families import FamilySpec
from byg_plugin.places import ENCODERS, NETWORKS, check_model, check_path, lora_at
from byg_plugin.progress import Progress


def _parser() -> argparse.ArgumentParser:
    parser = _cli.common_parser(__doc__ or "", config_required=False)
    parser.add_argument("--model", type=_cli.not_empty, help="base model: diffusers folder or hub id (instead of the one in --config)")
    parser.add_argument("--method", choices=[*OF_METHOD], default="lora", help="what edits (default: lora)")
    parser.add_argument("--lora", type=_cli.not_empty, help="LoRA file (.safetensors)")
    parser.add_argument("--source", type=_cli.given_place, help="image or clip, or folder of them")
    parser.add_argument("--instruction", help="what to change")
    parser.add_argument(
        "--tuples",
        type=_cli.given_place,
        help="JSONL or folder of tuples: edit each source by its instruction; relative sources start from dataset.image_root of --config, "
        "or the file's folder",
    )
    parser.add_argument("--out", type=_cli.given_place, default="edits", help="folder of the results (default: edits)")
    parser.add_argument(
        "--steps",
        type=whole_number(1, 1000),
        help="steps of the sampler, at most 1000 (default: the LoRA's, if it is trained for few; else sample.steps of --config, or 20; "
        "or the family's published 40 to 52; flowedit and kontext: the published 28, flowedit with classifier-free guidance 50)",
    )
    parser.add_argument(
        "--schedule",
        choices=["uniform", "shifted"],
        help="nodes of the sampler (default: the LoRA's byg.schedule, which wins over sample.schedule of --config)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, MAX_SEED),
        default=0,
        help="seed of the noise, 0 to 2^63 - 1 (default 0; image i, counted from 0, uses seed + i)",
    )
    parser.add_argument(
        "--frames", type=whole_number(1, 10_000), help="frames of a clip (default: the most up to 81; rounded down to 4n + 1)"
    )
    parser.add_argument(
        "--solver",
        choices=["auto", "euler", "unipc", "unipc_diffusers", "stochastic"],
        help="default: the LoRA's, the configuration's, or auto (Wan: unipc, at Wan's own times)",
    )
    parser.add_argument(
        "--cfg-high",
        type=number(0, 100),
        help="classifier-free guidance (Wan2.2 A14B: of the high-noise expert), 1 = none, of Krea 2 and Z-Image 0 (default: published)",
    )
    parser.add_argument("--cfg-low", type=number(0, 100), help="Wan2.2 A14B: the same of the low-noise expert")
    parser.add_argument(
        "--show-unguided",
        action="store_true",
        help="also the edit without guidance, third in the side-by-side; half as long again",
    )
    parser.add_argument("--negative", help="text that classifier-free guidance leads away from (default: published)")
    parser.add_argument("--guidance", type=number(0, 1000), help="FLUX: guidance embedding (default: the LoRA's; kontext: 2.5)")
    parser.add_argument(
        "--strength",
        type=number(-MOST_STRENGTH, MOST_STRENGTH),
        help=f"scale of the LoRA, {-MOST_STRENGTH:g} to {MOST_STRENGTH:g} (default 1 = as trained)",
    )
    published = "(default: FlowEdit's for FLUX.1, of other families those for Stable Diffusion 3)"
    parser.add_argument("--n-max", type=whole_number(1, 1000), help=f"flowedit: the last steps, which are made {published}")
    parser.add_argument("--n-min", type=whole_number(0, 1000), help="flowedit: of these the last ones, which sample (default 0)")
    parser.add_argument("--n-avg", type=whole_number(1, 1000), help="flowedit: noises a step is averaged over (default 1)")
    parser.add_argument("--source-guidance", type=number(0, 1000), help=f"flowedit: of the source caption {published}")
    parser.add_argument("--target-guidance", type=number(0, 1000), help=f"flowedit: of the target caption {published}")
    parser.add_argument(
        "--resolution", type=whole_number(16, 4096), help="about resolution x resolution pixels (default: the LoRA's; Wan: native)"
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number(1, 1024),
        default=1,
        help="images of one size edited at once (default 1); clips are edited one by one",
    )
    parser.add_argument(
        "--skip-done",
        action="store_true",
        help="go on where a run was stopped: leave out what edits.jsonl in --out tells of with the same words, seed and settings, "
        "and a source and a LoRA of the same names that are no newer",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="default: the configuration's, or auto")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="default: the configuration's, or bfloat16; float16 is that of the weights alone",
    )
    parser.add_argument("--quantization", choices=["none", "fp8", "int8", "nf4"], help="default: the configuration's, or none")
    return parser


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """An argument's type."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{_shown(text)} is not a whole number from {least} to {most}")
        return value

    return parse


def number(least: float, most: float) -> Callable[[str], float]:
    """An argument's type."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{_shown(text)} is not a number from {least:g} to {most:g}")
        return value

    return parse


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def main() -> None:
    """The command; see the module."""
    args = _parser().parse_args()
    if args.set and not args.config:
        raise ValueError("--set overrides a key of --config: give --config, or use edit's own options")
    config = load_config(args.config, args.set) if args.config else None
    jobs = jobs_of(args, config.dataset if config else None)
    check_arguments(args, jobs)
    if args.model is not None:
        check_path(args.model, "--model ")
    elif config is not None and config.model.host == "diffusers":
        check_model(config.model, *(() if args.method == "copy" else (*NETWORKS, *ENCODERS)), "vae")
    out = Path(args.out)
    check_out(out, jobs)
    pipe = editor_of(args, config)
    # Sizes first: an unreadable image stops before the long work.
    sized = [(pipe.sources.size(job.source), index, job) for index, job in enumerate(jobs)]
    for bucket, _, job in sized:
        report_losses(pipe, job, bucket, args.frames)
    steps = args.steps or pipe.steps
    results = Results(out, pipe, steps=steps, schedule=args.schedule)
    if args.skip_done:
        since = max((file.stat().st_mtime for file in (lora_at(args.lora) if args.lora else ())), default=0.0)
        frames = partial(_frames, pipe, asked=args.frames)
        sized = results.without_done(sized, first_seed=args.seed, frames=frames, since=since)
        print(f"{len(jobs) - len(sized)} of {len(jobs)} edits are in {out} already", flush=True)
    results.start([job for _, _, job in sized])
    # All texts at once: then the encoders leave for good.
    pipe.encode(texts_of(job.words(pipe.reads) for _, _, job in sized))
    passes = [True, False] if args.show_unguided else [True]
    with Progress(total=len(sized) * len(passes) * steps, desc="edit", unit="step") as bar:
        _edit_clips(pipe, [item for item in sized if is_clip(item[2].source)], args, passes, results, bar)
        _edit_images(pipe, [item for item in sized if not is_clip(item[2].source)], args, passes, results, bar)
    print(f"{len(sized)} edits in {out}")


def editor_of(args: argparse.Namespace, config: Config | None) -> Editor:
    """The editor that `--method` names, with no weights loaded.

    Raises:
        ValueError: a file or value is unusable.
    """
    if args.method == "kontext":
        dataset = config.dataset if config else DatasetConfig(tuples=".", cache_dir=".")
        if args.resolution is not None:
            small = {"bucket_step": None} if args.resolution < 256 else {}
            dataset = dataset.model_copy(update={"resolution": args.resolution, **small})
        return Kontext(args.model, dataset, guidance=args.guidance, device=args.device or "auto", dtype=args.dtype or "bfloat16")
    options = {
        "model": args.model,
        "guidance": args.guidance,
        "resolution": args.resolution,
        "device": args.device,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "solver": args.solver,
        "cfg_high_noise": args.cfg_high,
        "cfg_low_noise": args.cfg_low,
        "negative": args.negative,
    }
    if args.method == "lora":
        strength = 1.0 if args.strength is None else args.strength
        pipe = EditPipeline.from_lora(args.lora, config=config, strength=strength, **options)
    else:
        assert config is not None, "checked with the arguments"
        pipe = EditPipeline.from_base(config, _flowedit(args, config.model.spec) if args.method == "flowedit" else Base(), **options)
    check_overrides(args, config, pipe.config, few_steps=pipe.card.sampler is not None)
    if args.show_unguided and pipe.config.negative is None:
        raise ValueError("--show-unguided: nothing is guided here (FLUX.1 takes guidance as an input; else drop --cfg-high, --cfg-low)")
    return Copies(pipe.sources) if args.method == "copy" else pipe


def _flowedit(args: argparse.Namespace, spec: FamilySpec) -> FlowEdit:
    scales = {"source_guidance": args.source_guidance, "target_guidance": args.target_guidance}
    return FlowEdit.of(spec, steps=args.steps, n_max=args.n_max, n_min=args.n_min, n_avg=args.n_avg, **scales)


def _frames(pipe: Editor, source: Path, *, asked: int | None) -> int | None:
    """Of the edit of a source; None of an image."""
    return pipe.sources.clip_length(source, clip_info(source), asked) if is_clip(source) else None


def _edit_clips(
    pipe: Editor, clips: Sequence[Sized], args: argparse.Namespace, passes: Sequence[bool], results: Results, bar: Progress
) -> None:
    for bucket, index, job in clips:
        make = partial(pipe.clip, job.source, job.words(pipe.reads), frames=args.frames, steps=args.steps, schedule=args.schedule)
        made = [make(seed=args.seed + index, guided=guided, on_step=partial(bar.update, 1)) for guided in passes]
        columns = [made[0][0], *(edit for _, edit, _ in made)]
        results.save(job, columns, made[0][2], seed=args.seed + index, size=bucket)


def _edit_images(
    pipe: Editor, images: Sequence[Sized], args: argparse.Namespace, passes: Sequence[bool], results: Results, bar: Progress
) -> None:
    for group in _batches(sorted(images, key=lambda item: item[:2]), args.batch_size):
        sources, texts = [job.source for _, _, job in group], [job.words(pipe.reads) for _, _, job in group]
        seeds = [args.seed + index for _, index, _ in group]
        edit_all = partial(pipe.batch, sources, texts, seeds=seeds, steps=args.steps, schedule=args.schedule)
        edited = [edit_all(guided=guided, on_step=partial(bar.update, len(group))) for guided in passes]
        for (bucket, _, job), seed, *pairs in zip(group, seeds, *edited, strict=True):
            results.save(job, [[pairs[0][0]], *([edit] for _, edit in pairs)], None, seed=seed, size=bucket)


def _batches(items: Sequence[Sized], size: int) -> Iterator[list[Sized]]:
    """Runs of at most `size` items of one picture size; `items` are sorted by it."""
    start = 0
    while start < len(items):
        group = [item for item in items[start : start + size] if item[0] == items[start][0]]
        yield group
        start += len(group)


if __name__ == "__main__":
    _cli.run(main)
