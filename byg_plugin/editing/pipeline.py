"""A base model with an editing LoRA. torch, and what imports it, is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from byg_plugin.config.device import resolve_device
from byg_plugin.config.extras import require_model_extras
from byg_plugin.config.loading import parse_config
from byg_plugin.config.sections import Config, DatasetConfig
from byg_plugin.data.buckets import bucket_for, crop_to_bucket, to_tensor
from byg_plugin.data.clips import Clip, clip_info, is_clip, read_clip
from byg_plugin.data.media import load_image, to_rgb
from byg_plugin.editing import request
from byg_plugin.images import frames_of, to_pil
from byg_plugin.lora.card import LoraCard
from byg_plugin.models import make_family

if TYPE_CHECKING:
    from torch import Tensor

MOST_STRENGTH = 100.0  # the base is lost well before; beyond, networks overflow
MOST_FRAMES = 81  # of Wan's own training; longer clips are edited where `frames` asks for it
MAX_SEED = 2**63 - 1  # what torch's generators take
STRENGTHS = f"a number from -{MOST_STRENGTH:g} to {MOST_STRENGTH:g}"


def _without_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.no_grad()` as a decorator that does not import torch."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        import torch

        with torch.no_grad():
            return function(*args, **kwargs)

    return run


def as_seen(source: str | Path | Image.Image, dataset: DatasetConfig, multiple: int, size: tuple[int, int] | None = None) -> Image.Image:
    """A source as the model sees it: upright RGB, cropped to `size` (width, height), or to its bucket.

    Args:
        source: a file, or an image.
        dataset: whose buckets.
        multiple: of pixels, which the model's sides are.
        size: instead of the bucket's; at most the source's own.
    """
    image = to_rgb(ImageOps.exif_transpose(source)) if isinstance(source, Image.Image) else load_image(Path(source))
    return crop_to_bucket(image, size or bucket_for(image.size, dataset, multiple))


class EditPipeline:
    """A base model with an editing LoRA, of which `card` tells. Make one with `from_lora`.

    The text encoders are in memory while texts are encoded and dropped before the network comes; encodings are kept. A later
    call with a new instruction loads the encoders again: on a CUDA device the network waits on the CPU meanwhile, unless it
    is stored in int8 or nf4, whose weights stay on the device. Where instructions are known beforehand, `encode` them at once.
    """

    def __init__(
        self, config: Config, lora: Mapping[str, Tensor], card: LoraCard, *, strength: float = 1.0, origin: str | Path = "the LoRA"
    ):
        if not abs(strength) <= MOST_STRENGTH:
            raise ValueError(f"strength = {strength} is not {STRENGTHS}; 1 = as trained")
        self.config, self.card = config, card
        self.device = resolve_device(config.model.device)
        require_model_extras(config.model)
        self.family = make_family(config)
        self.strength = strength
        self._lora, self._origin = lora, origin
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
            card = LoraCard.from_metadata(metadata)
            section = {"path": model, "device": device, "dtype": dtype, "quantization": quantization}
            raw = request.sections_of(card, config, {key: value for key, value in section.items() if value is not None})
            family = raw["model"]["family"]
            tensors, _ = read_named(lora, family)
            raw["lora"] = request.lora_section(tensors, family)
        request.refuse_unused(family, {"guidance": guidance, **sampler})
        request.refuse_guided(card, sampler)
        if guidance is not None:
            raw["conditioning"]["guidance"] = guidance
        if resolution is not None:
            raw["dataset"]["resolution"] = resolution
            if resolution < 256:
                raw["dataset"]["bucket_step"] = None  # the family's own
        raw["sample"] |= {key: value for key, value in sampler.items() if value is not None}
        resolved = parse_config(raw, origin=f"{lora} (its metadata byg.*), or an option of this edit")
        if sampler.get("negative") is not None and resolved.negative is None:
            none = resolved.model.spec.unguided
            raise ValueError(f"negative (--negative) is not used at guidance {none:g}: leave it out, or raise cfg_high_noise (--cfg-high)")
        return cls(resolved, tensors, card, strength=strength, origin=lora)

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
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"seed = {seed} is out of range: 0 to {MAX_SEED}")
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

        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed = {seed} is out of range: 0 to {MAX_SEED}")
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
                seeds=seeds,
                negative=None if negative is None else self._text_batch([negative]),
                on_step=on_step,
            )
        sampling.finite(self.config.model.dtype, edits, "the latents of the edit")
        return sampling.finite(self.config.model.dtype, self.family.decode_latents(self._vae, edits), "the decoded pixels")

    def _text_batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        from byg_plugin.texts import stack_texts

        return {name: value.to(self.device) for name, value in stack_texts([self._texts[text] for text in texts]).items()}

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
        from byg_plugin.texts import text_at

        # On its own: the encoders must be gone before the network is back.
        encoders = self.family.load_text_encoders(self.device)
        for text in texts:
            self._texts[text] = text_at(self.family.encode_texts(encoders, [text]), 0)

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
        if self.family.clip_frames(MOST_FRAMES) == 1:
            raise ValueError(f"{source}: a clip, and {self.family.name} edits images")
        if frames is not None and frames > clip.frames:
            raise ValueError(f"{source}: has {clip.frames} frames, {frames} are asked for")
        return self.family.clip_frames(min(clip.frames, MOST_FRAMES) if frames is None else frames)

    def _prepare_clip(self, source: Path, frames: int | None) -> tuple[list[Image.Image], float]:
        clip = clip_info(source)
        count = self.clip_length(source, clip, frames)
        bucket = bucket_for(clip.size, self.config.dataset, self.family.pixel_multiple())
        return [crop_to_bucket(frame, bucket) for frame in read_clip(source, count)], clip.fps

    def _prepare(self, source: str | Path | Image.Image) -> Image.Image:
        return as_seen(source, self.config.dataset, self.family.pixel_multiple())

    def _load(self) -> None:
        if self._host is None:
            from byg_plugin.hosts import make_host
            from byg_plugin.lora.files import naming

            host = make_host(self.config, self.family, self.device, fresh=False)
            with naming(self._origin):
                host.load_lora(self._lora)
            host.set_strength(self.strength)
            vae = self.family.load_vae(self.device)
            # Last: a caller that catches an error and calls again must not edit without LoRA.
            self._host, self._vae = host, vae
