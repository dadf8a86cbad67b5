"""Edit images and clips with a trained LoRA.

    python byg_plugin/edit.py --model black-forest-labs/FLUX.1-dev --lora out/byg_flux-ema.safetensors \
        --source photo.jpg --instruction "make it snow" --out edits

    python byg_plugin/edit.py --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --lora out/byg_wan_high_noise.safetensors \
        --source in.mp4 --instruction "make it a cartoon" --out edits

Of two experts either LoRA file names both. A clip keeps its frames a second; its length is rounded down to 4n + 1 frames.
`--source` may be a folder; `--tuples` edits every tuple of a JSONL file. Guidance, resolution, position ids and the sampler's
schedule are what the LoRA says of its training, whatever `--config` says; the options below override them. From Python:

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
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from itertools import islice
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from byg_plugin import _cli, families
from byg_plugin.config.device import resolve_device
from byg_plugin.config.extras import require_model_extras
from byg_plugin.config.loading import load_config, parse_config
from byg_plugin.config.sections import Config, DatasetConfig
from byg_plugin.data.buckets import Size, bucket_for, crop_to_bucket, to_tensor
from byg_plugin.data.clips import SUFFIXES as CLIP_SUFFIXES
from byg_plugin.data.clips import Clip, clip_info, is_clip, read_clip, write_clip
from byg_plugin.data.media import image_size, load_image, to_rgb
from byg_plugin.folders import make_writable
from byg_plugin.images import frames_of, save_png, side_by_side, to_pil
from byg_plugin.models import make_family
from byg_plugin.places import ENCODERS, NETWORKS, check_lora, check_model, check_place
from byg_plugin.progress import Progress
from byg_plugin.user_files import files_in, hidden_in

# torch, and what imports it, comes where it is used: wrong arguments are told without it, whose import takes seconds.
if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
MOST_STRENGTH = 100.0  # the base is lost well before; beyond, networks overflow
_STRENGTHS = f"a number from -{MOST_STRENGTH:g} to {MOST_STRENGTH:g}"
_MAX_SEED = 2**63 - 1  # what torch's generators take
_TOLD_CUT = 0.2  # of a picture's pixels


def _without_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.no_grad()` as a decorator that does not import torch."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.no_grad():
            return function(*args, **kwargs)

    return run


@dataclass(frozen=True, kw_only=True)
class Job:
    """One edit to make."""

    source: Path
    instruction: str
    name: str
    """Stem of the files it is written to."""


class EditPipeline:
    """A base model with an editing LoRA. Make one with `from_lora`.

    The text encoders are in memory while texts are encoded and dropped before the network comes; encodings are kept. A later
    call with a new instruction loads the encoders again: on a CUDA device the network waits on the CPU meanwhile, unless it
    is stored in int8 or nf4, whose weights stay on the device. Where instructions are known beforehand, `encode` them at once.
    """

    def __init__(self, config: Config, lora: Mapping[str, Tensor], *, strength: float = 1.0, origin: str | Path = "the LoRA"):
        if not abs(strength) <= MOST_STRENGTH:
            raise ValueError(f"strength = {strength} is not {_STRENGTHS}; 1 = as trained")
        self.config = config
        self.device = resolve_device(config.model.device)
        require_model_extras(config)
        self.family = make_family(config)
        self._lora, self._strength, self._origin = lora, strength, origin
        self._host: Any = None
        self._vae: Any = None
        self._texts: dict[str, dict[str, Tensor]] = {}

    @classmethod
    def from_lora(
        cls,
        lora: str | Path,
        *,
        model: str | None = None,
        config: Config | None = None,
        strength: float = 1.0,
        guidance: float | None = None,
        resolution: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        **sampler: Any,
    ) -> EditPipeline:
        """Read a LoRA of any of our formats; its metadata supplies family, position ids, guidance, resolution and schedule.

        Wan edits at its native size instead of the resolution that was trained, and its metadata supplies the boundary.

        Args:
            lora: the .safetensors file; of two experts either one, or their common name.
            model: diffusers folder or hub id of the base (or give `config`).
            config: a training configuration: its `[model]`, buckets and `[sample]` steps are used.
            strength: scale of the LoRA, -100 to 100; 1 = as trained, 0 = the base with source tokens.
            guidance: instead of the metadata's.
            resolution: instead of the metadata's; about resolution x resolution pixels.
            device, dtype, quantization: as in `[model]`, instead of the configuration's.
            sampler: keys of `[sample]`: solver, cfg_high_noise, cfg_low_noise, negative.

        Raises:
            ValueError: the file or a value is unusable, or the LoRA's family has no use for one.
        """
        from byg_plugin.lora.files import naming, read_lora
        from byg_plugin.lora.formats import expert_files, read_named

        with naming(lora):
            _, metadata = read_lora(next(iter(expert_files(lora).values())))
            section = {"path": model, "device": device, "dtype": dtype, "quantization": quantization}
            raw = _from_metadata(metadata, config, {key: value for key, value in section.items() if value is not None})
            tensors, _ = read_named(lora, metadata["byg.family"])
            raw["lora"] = _lora_section(tensors, metadata)
        _refuse_unused(metadata["byg.family"], {"guidance": guidance, **sampler})
        if guidance is not None:
            raw["conditioning"]["guidance"] = guidance
        if resolution is not None:
            raw["dataset"]["resolution"] = resolution
            if resolution < 256:
                raw["dataset"]["bucket_step"] = None  # the family's own
        raw["sample"] |= {key: value for key, value in sampler.items() if value is not None}
        resolved = parse_config(raw, origin=f"{lora} (its metadata byg.*), or an option of this edit")
        if sampler.get("negative") is not None and resolved.negative is None:
            raise ValueError("negative (--negative) is not used at guidance 1: leave it out, or raise cfg_high_noise (--cfg-high)")
        return cls(resolved, tensors, strength=strength, origin=lora)

    def __call__(
        self,
        source: str | Path | Image.Image,
        instruction: str,
        *,
        steps: int | None = None,
        schedule: str | None = None,
        seed: int = 0,
    ) -> Image.Image:
        """One edited image, of the size of the source's bucket (never larger than the source)."""
        return self.batch([source], [instruction], steps=steps, schedule=schedule, seeds=[seed])[0][1]

    @_without_gradient
    def batch(
        self,
        sources: Sequence[str | Path | Image.Image],
        instructions: Sequence[str],
        *,
        steps: int | None = None,
        schedule: str | None = None,
        seeds: Sequence[int],
        guided: bool = True,
        on_step: Any = None,
    ) -> list[tuple[Image.Image, Image.Image]]:
        """(source as the model saw it, edit) of each; sources of one batch must fall into one bucket.

        `guided=False` edits at guidance scale 1 whatever the configured scales are.

        Raises:
            ValueError: they do not, an instruction is empty, a seed is out of range, or the numbers of sources, instructions
                and seeds differ.
            FloatingPointError: an edit is not finite.
        """
        if not len(sources) == len(instructions) == len(seeds):
            raise ValueError(f"a batch needs as many instructions and seeds as sources: {len(sources)}, {len(instructions)}, {len(seeds)}")
        import torch

        for seed in seeds:
            if not 0 <= seed <= _MAX_SEED:
                raise ValueError(f"seed = {seed} is out of range: 0 to {_MAX_SEED}")
        pictures = [self._prepare(source) for source in sources]
        if len({picture.size for picture in pictures}) > 1:
            raise ValueError(f"images of one batch need one size, got {sorted({p.size for p in pictures})}; use a batch of 1")
        pixels = torch.stack([to_tensor(picture) for picture in pictures]).unsqueeze(2)
        decoded = self._edit(pixels, instructions, steps=steps, schedule=schedule, seeds=seeds, guided=guided, on_step=on_step)
        return [(picture, to_pil(edit[:, 0])) for picture, edit in zip(pictures, decoded, strict=True)]

    @_without_gradient
    def clip(
        self,
        source: str | Path,
        instruction: str,
        *,
        frames: int | None = None,
        steps: int | None = None,
        schedule: str | None = None,
        seed: int = 0,
        guided: bool = True,
        on_step: Any = None,
    ) -> tuple[list[Image.Image], list[Image.Image], float]:
        """A clip's frames as the model saw them, their edits, and the frames a second of both, which are the source's.

        Args:
            source: the clip.
            instruction: what to change.
            frames: how many from its beginning, rounded down to 4n + 1; default: the most up to 81.
            steps, schedule, seed, guided, on_step: as in `batch`.

        Raises:
            ValueError: the family edits images alone, or the clip is unreadable or shorter than `frames`.
            FloatingPointError: the edit is not finite.
        """
        import torch

        if not 0 <= seed <= _MAX_SEED:
            raise ValueError(f"seed = {seed} is out of range: 0 to {_MAX_SEED}")
        pictures, fps = self._prepare_clip(Path(source), frames)
        pixels = torch.stack([to_tensor(picture) for picture in pictures], dim=1)[None]
        decoded = self._edit(pixels, [instruction], steps=steps, schedule=schedule, seeds=[seed], guided=guided, on_step=on_step)
        return pictures, frames_of(decoded[0]), fps

    def _edit(
        self,
        pixels: Tensor,
        instructions: Sequence[str],
        *,
        steps: int | None,
        schedule: str | None,
        seeds: Sequence[int],
        guided: bool,
        on_step: Any,
    ) -> Tensor:
        """Pixels (B, 3, F, H, W) in [-1, 1] -> their edits."""
        import torch

        from byg_plugin import sampling

        negative = self.config.negative if guided else None
        self.encode(instructions)
        if negative is not None and negative not in self._texts:
            self._encode_apart([negative])  # an empty one is allowed
        self._load()
        latents = self.family.encode_pixels(self._vae, pixels.to(self.device))
        # One noise a seed, whatever the batch: a picture does not depend on its neighbours.
        noise = torch.cat([sampling.seeded_noise((1, *latents.shape[1:]), seed, self.device) for seed in seeds])
        with self._host.live() as velocity:
            edits = sampling.sample_as_configured(
                self.config,
                self.family,
                velocity,
                noise,
                self._text_batch(instructions),
                latents,
                steps=steps or self.config.sample.steps,
                schedule=schedule or self.config.sample.schedule,
                negative=None if negative is None else self._text_batch([negative]),
                on_step=on_step,
            )
        sampling.finite(self.config, edits, "the latents of the edit")
        return sampling.finite(self.config, self.family.decode_latents(self._vae, edits), "the decoded pixels")

    def _text_batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        import torch

        return {name: torch.stack([self._texts[text][name] for text in texts]).to(self.device) for name in self._texts[texts[0]]}

    @_without_gradient
    def encode(self, texts: Iterable[str]) -> None:
        """Encode texts that are not known yet. Call it once with all texts: the encoders are loaded for each call."""
        new = sorted({text for text in texts if text not in self._texts})
        empty = [text for text in new if not text.strip()]
        if empty:
            raise ValueError("the instruction is empty: say what to change")
        if new:
            self._encode_apart(new)

    def _encode_apart(self, texts: Sequence[str]) -> None:
        """Encoders and network by turns: a card that holds one of them need not hold both."""
        with nullcontext() if self._host is None else self._host.off_device():
            self._encode_new(texts)

    def _encode_new(self, texts: Sequence[str]) -> None:
        # On its own: the encoders must be gone before the network is back.
        encoders = self.family.load_text_encoders(self.device)
        for text in texts:
            self._texts[text] = {name: value[0] for name, value in self.family.encode_texts(encoders, [text]).items()}

    def prepare_size(self, source: str | Path | Image.Image) -> tuple[int, int]:
        """(width, height) of the edit of a source."""
        if isinstance(source, str | Path) and is_clip(Path(source)):
            return bucket_for(clip_info(Path(source)).size, self.config.dataset, self.family.pixel_multiple())
        return self._prepare(source).size

    def clip_length(self, source: Path, clip: Clip, frames: int | None) -> int:
        """How many frames of a clip are edited where `frames` are asked for (None: the most up to 81), rounded down to 4n + 1.

        Raises:
            ValueError: the family edits images alone, or the clip is shorter than `frames`.
        """
        if self.family.clip_frames(_MOST_FRAMES) == 1:
            raise ValueError(f"{source}: a clip, and {self.family.name} edits images")
        if frames is not None and frames > clip.frames:
            raise ValueError(f"{source}: has {clip.frames} frames, {frames} are asked for")
        return self.family.clip_frames(min(clip.frames, _MOST_FRAMES) if frames is None else frames)

    def _prepare_clip(self, source: Path, frames: int | None) -> tuple[list[Image.Image], float]:
        clip = clip_info(source)
        count = self.clip_length(source, clip, frames)
        bucket = bucket_for(clip.size, self.config.dataset, self.family.pixel_multiple())
        return [crop_to_bucket(frame, bucket) for frame in read_clip(source, count)], clip.fps

    def _prepare(self, source: str | Path | Image.Image) -> Image.Image:
        image = to_rgb(ImageOps.exif_transpose(source)) if isinstance(source, Image.Image) else load_image(Path(source))
        return crop_to_bucket(image, bucket_for(image.size, self.config.dataset, self.family.pixel_multiple()))

    def _load(self) -> None:
        if self._host is None:
            from byg_plugin.hosts import make_host
            from byg_plugin.lora.files import naming

            host = make_host(self.config, self.family, self.device, fresh=False)
            with naming(self._origin):
                host.load_lora(self._lora)
            host.set_strength(self._strength)
            vae = self.family.load_vae(self.device)
            # Last: a caller that catches an error and calls again must not edit without LoRA.
            self._host, self._vae = host, vae


_MOST_FRAMES = 81  # of Wan's own training; longer clips are edited where `frames` asks for it
_NEEDED = ("byg.family", "byg.position", "byg.guidance", "byg.max_text_tokens", "byg.resolution")


def _from_metadata(metadata: Mapping[str, str], config: Config | None, model: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of an edit: what the LoRA says of itself over a training configuration; `model` over its [model]."""
    if config is None and "path" not in model:
        raise ValueError("name the base model: --model FOLDER_OR_HUB_ID, or --config with a [model] section")
    missing = [key for key in _NEEDED if key not in metadata]
    if missing:
        raise ValueError(
            f"the LoRA's metadata lacks {', '.join(missing)}: it was not made by byg_plugin, or a tool dropped them; "
            f"how its source tokens are placed is unknown"
        )
    family = metadata["byg.family"]
    if family not in families.SPECS:
        raise ValueError(f"the LoRA was trained for {family!r}, which is unknown here; known: {', '.join(families.SPECS)}")
    spec = families.named(family)
    if config is None:
        section: dict[str, Any] = {"family": family}
        expected = family
        raw: dict[str, Any] = {"dataset": {"tuples": ".", "cache_dir": "."}, "output": {"dir": "."}}
        raw["sample"] = {}
    else:
        raw = config.model_dump(include={"model", "dataset", "sample", "output"})
        section, expected = raw["model"], config.model.family
        if config.model.host != "diffusers":  # edits are made by the embedded host, whatever has trained
            section |= {"host": "diffusers", "host_path": None}
    if "byg.schedule" in metadata:
        raw["sample"]["schedule"] = metadata["byg.schedule"]
    if family != expected:
        raise ValueError(f"the LoRA was trained for {family!r}, the base model is {expected!r}")
    if "path" in model:
        section |= dict.fromkeys(("transformer", "transformer_2", "vae", "t5", "clip"))
    raw["model"] = section | model | {"gradient_checkpointing": False}
    try:
        raw["conditioning"] = {
            "position": metadata["byg.position"],
            # Without the embedding, what stood in the configuration was not used.
            **({"guidance": float(metadata["byg.guidance"])} if spec.guidance == "embedding" else {}),
            "max_text_tokens": int(metadata["byg.max_text_tokens"]),
        }
        raw["dataset"]["resolution"] = int(metadata["byg.resolution"])
        if "byg.boundary" in metadata:
            raw["model"]["boundary"] = float(metadata["byg.boundary"])
    except ValueError as error:
        raise ValueError(f"the LoRA's metadata is damaged: {error}") from error
    if spec.native is not None:
        raw["dataset"] |= {"resolution": spec.native, "bucket_step": 32}
    raw["objective"] = {"ema_decay": 0.0}
    in_float32 = raw["model"].get("dtype") == "float32"
    raw["train"] = {"steps": 1, "mixed_precision": config.train.mixed_precision if config else "no" if in_float32 else "bf16"}
    return raw


_OPTIONS = {
    "guidance": "--guidance",
    "cfg_high_noise": "--cfg-high",
    "cfg_low_noise": "--cfg-low",
    "negative": "--negative",
    "solver": "--solver",
}


def _refuse_unused(family: str, given: Mapping[str, Any]) -> None:
    """What a family has no place for is an error, not an option without effect."""
    spec = families.named(family)
    if spec.guidance == "classifier_free":
        foreign = ["guidance", *([] if spec.has_experts else ["cfg_low_noise"])]
        remedy = "its guidance is cfg_high_noise (--cfg-high)" + (" and cfg_low_noise (--cfg-low)" if spec.has_experts else "")
    else:
        foreign = ["cfg_high_noise", "cfg_low_noise", "negative"]
        remedy = "its guidance is the embedding, guidance (--guidance)"
    if given.get("solver") not in (None, "auto", "euler", *spec.solvers):
        foreign.append("solver")
    if unused := [f"{name} ({_OPTIONS[name]}) = {given[name]!r}" for name in foreign if given.get(name) is not None]:
        raise ValueError(f"{', '.join(unused)}: not for {family}, leave it out; {remedy}")


def _lora_section(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The `[lora]` section that fits the tensors of a file or a pair."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise ValueError(f"the LoRA mixes ranks {sorted(ranks)}; LoRAs of byg_plugin have one")
    modules = sorted({name.partition(".")[2].rpartition(".lora_")[0] for name in tensors})
    shared = families.named(metadata["byg.family"]).has_experts and len({name.partition(".")[0] for name in tensors}) == 1
    experts = {"experts": "shared"} if shared else {}
    return {"rank": ranks.pop(), "targets": "|".join(re.escape(module) for module in modules), **experts}


def _files(out: Path, job: Job) -> tuple[Path, Path]:
    """The edit and its side-by-side."""
    suffix = ".mp4" if is_clip(job.source) else ".png"
    return out / f"{job.name}{suffix}", out / f"{job.name}_side_by_side{suffix}"


def _check_out(out: Path, jobs: Sequence[Job]) -> None:
    """Before the long work: the folder can be written, and no result would overwrite a source or another result."""
    sources = {job.source.resolve() for job in jobs}
    made_by: dict[Path, Path] = {}
    for job in jobs:
        for file in _files(out, job):
            if file.resolve() in sources:
                raise ValueError(f"--out {out}: {file.name} would overwrite a source; choose another folder")
            if file in made_by:
                raise ValueError(f"--source: {made_by[file].name} and {job.source.name} would both become {file.name}; rename one")
            made_by[file] = job.source
    try:
        make_writable(out)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written: {error.strerror}; choose another folder") from error


def jobs_of(args: argparse.Namespace, config: Config | None = None) -> list[Job]:
    """What the command line asks for; relative sources of `--tuples` start from the configuration's dataset.image_root.

    Raises:
        ValueError: nothing, too much, or something missing.
    """
    if args.tuples:
        if args.source or args.instruction:
            raise ValueError("--tuples has its own sources and instructions: leave out --source and --instruction")
        from byg_plugin.data.tuples import read_tuples, read_tuples_file

        # A folder of tuples has its images beside them, wherever those of training are.
        if config is None or Path(args.tuples).is_dir():
            tuples = read_tuples_file(Path(args.tuples))
        else:
            tuples = read_tuples(config.dataset.model_copy(update={"tuples": args.tuples}))
        return [
            Job(source=item.source, instruction=item.instruction, name=f"{index:05d}_{item.source.stem}")
            for index, item in enumerate(tuples)
        ]
    if args.instruction is not None and not args.instruction.strip():
        raise ValueError("--instruction is empty: say what to change")
    if not args.source or not args.instruction:
        raise ValueError("give --source IMAGE_OR_FOLDER and --instruction TEXT, or --tuples FILE")
    source = Path(args.source)
    if source.is_dir():
        suffixes = sorted({*IMAGE_SUFFIXES, *CLIP_SUFFIXES})
        images = files_in(source, suffixes)
        if not images:
            raise ValueError(f"--source {source}: no image or clip in this folder ({', '.join(suffixes)}{hidden_in(source, suffixes)})")
        return [Job(source=path, instruction=args.instruction, name=path.stem) for path in images]
    if not source.is_file():
        raise ValueError(f"--source {source}: no such file or folder")
    return [Job(source=source, instruction=args.instruction, name=source.stem)]


def _parser() -> argparse.ArgumentParser:
    parser = _cli.common_parser(__doc__ or "", config_required=False)
    parser.add_argument("--model", type=_cli.not_empty, help="base model: diffusers folder or hub id (instead of the one in --config)")
    parser.add_argument("--lora", required=True, type=_cli.not_empty, help="LoRA file (.safetensors)")
    parser.add_argument("--source", type=_cli.not_empty, help="image or clip, or folder of them")
    parser.add_argument("--instruction", help="what to change")
    parser.add_argument(
        "--tuples",
        type=_cli.not_empty,
        help="JSONL or folder of tuples: edit each source by its instruction; relative sources start from dataset.image_root of --config, "
        "or the file's folder",
    )
    parser.add_argument("--out", type=_cli.not_empty, default="edits", help="folder of the results (default: edits)")
    parser.add_argument(
        "--steps",
        type=whole_number(1, 1000),
        help="steps of the sampler, at most 1000 (default: sample.steps of --config, or 20; Wan: the published 40 or 50)",
    )
    parser.add_argument(
        "--schedule",
        choices=["uniform", "shifted"],
        help="nodes of the sampler (default: the LoRA's byg.schedule, which wins over sample.schedule of --config)",
    )
    parser.add_argument(
        "--seed",
        type=whole_number(0, _MAX_SEED),
        default=0,
        help="seed of the noise, 0 to 2^63 - 1 (default 0; image i, counted from 0, uses seed + i)",
    )
    parser.add_argument(
        "--frames", type=whole_number(1, 10_000), help="frames of a clip (default: the most up to 81; rounded down to 4n + 1)"
    )
    parser.add_argument(
        "--solver",
        choices=["auto", "euler", "unipc", "unipc_diffusers"],
        help="default: the configuration's, or auto (Wan: unipc, at Wan's own times)",
    )
    parser.add_argument(
        "--cfg-high", type=number(1, 100), help="Wan: guidance scale of the (high-noise) expert, 1 = none (default: published)"
    )
    parser.add_argument("--cfg-low", type=number(1, 100), help="Wan: guidance scale of the low-noise expert (default: published)")
    parser.add_argument(
        "--show-unguided", action="store_true", help="Wan: also the edit at guidance scale 1, third in the side-by-side; half as long again"
    )
    parser.add_argument("--negative", help="Wan: text that guidance leads away from (default: published)")
    parser.add_argument("--guidance", type=number(0, 1000), help="FLUX: guidance embedding (default: the LoRA's)")
    parser.add_argument(
        "--strength",
        type=number(-MOST_STRENGTH, MOST_STRENGTH),
        default=1.0,
        help=f"scale of the LoRA, {-MOST_STRENGTH:g} to {MOST_STRENGTH:g} (default 1 = as trained)",
    )
    parser.add_argument("--resolution", type=whole_number(16, 4096), help="about resolution x resolution pixels (default: the LoRA's)")
    parser.add_argument(
        "--batch-size",
        type=whole_number(1, 1024),
        default=1,
        help="images of one size edited at once (default 1); clips are edited one by one",
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], help="default: the configuration's, or auto")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="default: the configuration's, or bfloat16")
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
    if args.seed + len(jobs) - 1 > _MAX_SEED:
        raise ValueError(f"--seed {args.seed}: edit i uses seed + i, and {len(jobs)} edits go beyond {_MAX_SEED}; lower it")
    if args.model is None and not args.config:
        raise ValueError("name the base model: --model FOLDER_OR_HUB_ID, or --config with a [model] section")
    check_lora(args.lora, "--lora ")


# Keys that the LoRA knows better than --config, and the options that stand above it.
_FROM_LORA = {"conditioning.guidance": "guidance", "dataset.resolution": "resolution", "sample.schedule": "schedule"}


def check_overrides(args: argparse.Namespace, given: Config | None, resolved: Config) -> None:
    """A `--set` whose value the LoRA's own has replaced is an error.

    Raises:
        ValueError: names key, both values and the option that has the last word.
    """
    for override in args.set:
        key = override.partition("=")[0].replace(" ", "")
        option = _FROM_LORA.get(key)
        if option is None or getattr(args, option) is not None:
            continue
        section, name = key.split(".")
        asked, used = (getattr(getattr(config, section), name) for config in (given, resolved))
        if asked != used:
            raise ValueError(f"--set {override}: edits do not take it from --config, and use {used!r}; give --{option} {asked}")


def _tell_cut(source: Path, size: Size, bucket: Size, dataset: DatasetConfig) -> None:
    """Say on stderr that much of a picture will not be in its edit."""
    kept = min(size[0] / size[1], bucket[0] / bucket[1]) / max(size[0] / size[1], bucket[0] / bucket[1])
    if 1 - kept > _TOLD_CUT:
        remedy = "raise dataset.max_aspect" if dataset.buckets else "set dataset.buckets = true"
        text = f"{source}: {1 - kept:.0%} of its {size[0]} x {size[1]} pixels are cut off for an edit of {bucket[0]} x {bucket[1]}"
        Progress.write(f"{text}; pad it, or {remedy} in --config", file=sys.stderr)


def _tell_shortened(source: Path, there: int, edited: int, asked: int | None) -> None:
    """Say on stderr that fewer frames are edited than the clip has, or than `asked` for, because Wan takes 4n + 1 alone."""
    wanted = min(there, _MOST_FRAMES) if asked is None else asked
    if edited < wanted:
        Progress.write(f"{source}: {edited} of {wanted} frames are edited, Wan takes 4n + 1", file=sys.stderr)


def main() -> None:
    """The command; see the module."""
    args = _parser().parse_args()
    if args.set and not args.config:
        raise ValueError("--set overrides a key of --config: give --config, or use edit's own options")
    config = load_config(args.config, args.set) if args.config else None
    jobs = jobs_of(args, config)
    check_arguments(args, jobs)
    if args.model is not None:
        check_place(args.model, "--model ")
    elif config is not None and config.model.host == "diffusers":
        check_model(config, *NETWORKS, "vae", *ENCODERS)
    out = Path(args.out)
    _check_out(out, jobs)
    pipe = EditPipeline.from_lora(
        args.lora,
        model=args.model,
        config=config,
        strength=args.strength,
        guidance=args.guidance,
        resolution=args.resolution,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
        solver=args.solver,
        cfg_high_noise=args.cfg_high,
        cfg_low_noise=args.cfg_low,
        negative=args.negative,
    )
    check_overrides(args, config, pipe.config)
    if args.show_unguided and pipe.config.negative is None:
        raise ValueError("--show-unguided: nothing is guided here (FLUX takes guidance as an input; for Wan drop --cfg-high, --cfg-low)")
    passes = [True, False] if args.show_unguided else [True]
    # All texts first: then the encoders leave for good. Sizes too: an unreadable image stops before the long work.
    sized = [(pipe.prepare_size(job.source), index, job) for index, job in enumerate(jobs)]
    for bucket, _, job in sized:
        if is_clip(job.source):
            clip = clip_info(job.source)
            size = clip.size
            _tell_shortened(job.source, clip.frames, pipe.clip_length(job.source, clip, args.frames), args.frames)
        else:
            size = image_size(job.source)
        _tell_cut(job.source, size, bucket, pipe.config.dataset)
    pipe.encode([job.instruction for job in jobs])
    settings = {
        "lora": Path(args.lora).name,
        "steps": args.steps or pipe.config.sample.steps,
        "schedule": args.schedule or pipe.config.sample.schedule,
        "guidance": pipe.config.conditioning.guidance,
        "strength": args.strength,
    }
    if pipe.family.spec.guidance == "classifier_free":
        settings |= {"cfg_high_noise": pipe.config.cfg_at(True), "cfg_low_noise": pipe.config.cfg_at(False)}
    with Progress(total=len(jobs) * len(passes) * settings["steps"], desc="edit", unit="step") as bar:
        for bucket, index, job in (item for item in sized if is_clip(item[2].source)):
            make = partial(pipe.clip, job.source, job.instruction, frames=args.frames, steps=args.steps, schedule=args.schedule)
            made = [make(seed=args.seed + index, guided=guided, on_step=partial(bar.update, 1)) for guided in passes]
            columns = [made[0][0], *(edit for _, edit, _ in made)]
            mine = settings | {"instruction": job.instruction, "seed": args.seed + index, "size": [*bucket, len(columns[0])]}
            _save(out, job, columns, made[0][2], mine)
        images = [item for item in sized if not is_clip(item[2].source)]
        for group in _batches(sorted(images, key=lambda item: item[:2]), args.batch_size):
            sources, texts = [job.source for _, _, job in group], [job.instruction for _, _, job in group]
            seeds = [args.seed + index for _, index, _ in group]
            edit_all = partial(pipe.batch, sources, texts, seeds=seeds, steps=args.steps, schedule=args.schedule)
            edited = [edit_all(guided=guided, on_step=partial(bar.update, len(group))) for guided in passes]
            for (bucket, index, job), *pairs in zip(group, *edited, strict=True):
                columns = [[pairs[0][0]], *([edit] for _, edit in pairs)]
                mine = settings | {"instruction": job.instruction, "seed": args.seed + index, "size": list(bucket)}
                _save(out, job, columns, None, mine)
    print(f"{len(jobs)} edits in {out}")


def _save(out: Path, job: Job, columns: Sequence[Sequence[Image.Image]], fps: float | None, settings: Mapping[str, Any]) -> None:
    """Write the edit and all columns beside each other: frames of source, edit and, where it was asked for, edit at scale 1."""
    edit_file, pair_file = _files(out, job)
    beside = [side_by_side(*frames) for frames in zip(*columns, strict=True)]
    try:
        for file, frames in ((edit_file, columns[1]), (pair_file, beside)):
            if fps is None:
                save_png(frames[0], file, settings)
            else:
                write_clip(file, frames, fps, settings)
    except OSError as error:
        raise ValueError(f"--out {out}: cannot write {job.name}: {error.strerror}; earlier edits are there") from error


def _batches(items: Sequence[tuple[tuple[int, int], int, Job]], size: int) -> Iterator[list[tuple[tuple[int, int], int, Job]]]:
    """Runs of at most `size` items of one picture size; `items` are sorted by it."""
    start = 0
    while start < len(items):
        group = [item for item in islice(items, start, start + size) if item[0] == items[start][0]]
        yield group
        start += len(group)


if __name__ == "__main__":
    _cli.run(main)
