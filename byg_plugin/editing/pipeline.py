"""A base model with an editing LoRA. torch, and what imports it, is imported where it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from byg_plugin.config.device import resolve_device
from byg_plugin.config.extras import require_model_extras
from byg_plugin.config.loading import parse_config
from byg_plugin.config.sections import Config
from byg_plugin.data.buckets import to_tensor
from byg_plugin.editing import request
from byg_plugin.editing.editor import Words, texts_of
from byg_plugin.editing.encodings import Encodings
from byg_plugin.editing.methods import Batch, Lora, Method
from byg_plugin.editing.sources import Sources
from byg_plugin.images import frames_of, to_pil
from byg_plugin.lora.card import LoraCard, base_name
from byg_plugin.models import make_family
from byg_plugin.progress import Progress
from byg_plugin.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

MOST_STRENGTH = 100.0  # the base is lost well before; beyond, networks overflow
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


class EditPipeline:
    """A base model with an editing LoRA, of which `card` tells, or by itself. Make one with `from_lora` or `from_base`.

    The text encoders are in memory while texts are encoded and dropped before the network comes; encodings are kept (`Encodings`). A later
    call with a new instruction loads the encoders again: on a CUDA device the network waits on the CPU meanwhile, unless it
    is stored in int8 or nf4, whose weights stay on the device. Where instructions are known beforehand, `encode` them at once.
    """

    def __init__(
        self,
        config: Config,
        lora: Mapping[str, Tensor] | None,
        card: LoraCard,
        *,
        strength: float = 1.0,
        origin: str | Path = "the LoRA",
        method: Method | None = None,
    ):
        if not abs(strength) <= MOST_STRENGTH:
            raise ValueError(f"strength = {strength} is not {STRENGTHS}; 1 = as trained")
        self.config, self.card = config, card
        self.device = resolve_device(config.model.device)
        require_model_extras(config.model)
        self.family = make_family(config)
        self.sources = Sources(config.dataset, self.family)
        self.strength = None if lora is None else strength
        self._method = method or Lora()
        self.reads = self._method.reads
        self._lora, self._origin = lora, origin
        self._host: Any = None
        self._vae: Any = None
        self._texts = Encodings()

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
        request.refuse_guided(card, sampler)
        resolved = _resolved(raw, guidance, resolution, sampler, origin=f"{lora} (its metadata byg.*), or an option of this edit")
        if sampler.get("negative") is not None and resolved.negative is None:
            none = resolved.model.spec.unguided
            raise ValueError(f"negative (--negative) is not used at guidance {none:g}: leave it out, or raise cfg_high_noise (--cfg-high)")
        return cls(resolved, tensors, card, strength=strength, origin=lora)

    @classmethod
    def from_base(
        cls,
        config: Config,
        method: Method,
        *,
        model: str | None = None,
        guidance: float | None = None,
        resolution: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
        **sampler: Any,
    ) -> EditPipeline:
        """The base of a training configuration without a LoRA, by a method of `editing.methods`; sizes are those of a LoRA trained by it.

        Args:
            config: its `[model]`, `[conditioning]`, `[dataset]` sizes and `[sample]` are used.
            method: reads the texts that it names.
            model, guidance, resolution, device, dtype, quantization, sampler: as of `from_lora`.

        Raises:
            ValueError: a value is unusable, or the family has no use for one.
        """
        section = {"path": model, "device": device, "dtype": dtype, "quantization": quantization}
        raw = request.sections_of_base(config, {key: value for key, value in section.items() if value is not None})
        resolved = _resolved(raw, guidance, resolution, sampler, origin="--config, or an option of this edit")
        if sampler.get("negative") is not None and method.negative(resolved) is None:
            raise ValueError("negative (--negative) is not used without guidance: leave it out, or raise the scale")
        return cls(resolved, None, LoraCard(), method=method)

    @property
    def steps(self) -> int:
        """Of the sampler, unless asked for otherwise."""
        return self._method.steps(self.config.sample)

    def settings(self, steps: int, schedule: str | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """What an edit is made with, for the file itself and for the manifest."""
        config = self.config
        scales, embedded = request.guidance_scales(config), config.conditioning.guidance
        lora = None if self._lora is None else Path(self._origin).name
        shared: dict[str, Any] = {"method": self._method.name, "lora": lora, "steps": steps, "schedule": schedule or config.sample.schedule}
        # A LoRA's card has a value of the embedding also where the family has none.
        shared |= {"guidance": None if scales and lora is None else embedded, "strength": self.strength}
        own = self._method.settings()
        in_file = shared | scales | own
        if self._lora is None:
            in_file = {name: value for name, value in in_file.items() if value is not None}
        negative = config.sample.negative
        base = {"base": base_name(config.model.part("transformer")), "dtype": config.model.dtype, "quantization": config.model.quantization}
        in_manifest = shared | {
            "guidance": None if scales else embedded,
            "cfg_high_noise": scales.get("cfg_high_noise"),
            "cfg_low_noise": scales.get("cfg_low_noise"),
            "negative": negative,
            "solver": config.sample.solver,
        }
        return in_file, in_manifest | own | base | {"version": __version__}

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
        instructions: Sequence[Words],
        *,
        steps: int | None = None,
        schedule: str | None = None,
        seeds: Sequence[int],
        guided: bool = True,
        on_step: Any = None,
    ) -> list[tuple[Image.Image, Image.Image]]:
        """(source as the model saw it, edit) of each; sources of one batch must fall into one bucket.

        `instructions` are, of a method without a LoRA, what it reads instead.

        `guided=False` edits without guidance whatever the configured scales are.

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
        pictures = [self.sources.image(source) for source in sources]
        if len({picture.size for picture in pictures}) > 1:
            raise ValueError(f"images of one batch need one size, got {sorted({p.size for p in pictures})}; use a batch of 1")
        pixels = torch.stack([to_tensor(picture) for picture in pictures]).unsqueeze(2)
        decoded = self._edit(pixels, instructions, steps=steps, schedule=schedule, seeds=seeds, guided=guided, on_step=on_step)
        return [(picture, to_pil(edit[:, 0])) for picture, edit in zip(pictures, decoded, strict=True)]

    @_without_gradient
    def clip(
        self,
        source: str | Path,
        instruction: Words,
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
        pictures, fps = self.sources.clip(Path(source), frames)
        pixels = torch.stack([to_tensor(picture) for picture in pictures], dim=1)[None]
        decoded = self._edit(pixels, [instruction], steps=steps, schedule=schedule, seeds=[seed], guided=guided, on_step=on_step)
        return pictures, frames_of(decoded[0]), fps

    def _edit(
        self,
        pixels: Tensor,
        instructions: Sequence[Words],
        *,
        steps: int | None,
        schedule: str | None,
        seeds: Sequence[int],
        guided: bool,
        on_step: Any,
    ) -> Tensor:
        """Pixels (B, 3, F, H, W) in [-1, 1] -> their edits."""
        from byg_plugin import sampling

        negative = self._method.negative(self.config) if guided else None
        self.encode(texts_of(instructions))
        if negative is not None and negative not in self._texts:
            self._encode_apart([negative])  # an empty one is allowed
        self._load()
        latents = self.family.encode_pixels(self._vae, pixels.to(self.device))
        read = [words if isinstance(words, tuple) else (words,) for words in instructions]
        batch = Batch(
            config=self.config,
            family=self.family,
            host=self._host,
            latents=latents,
            texts=[self._text_batch(column) for column in zip(*read, strict=True)],
            negative=None if negative is None else self._text_batch([negative]),
            seeds=seeds,
            steps=steps or self.steps,
            schedule=schedule or self.config.sample.schedule,
            on_step=on_step,
        )
        edits = self._method.sample(batch)
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
        # One text needs no bar.
        with Progress(total=len(texts), desc="encode", unit="text", disable=len(texts) < 2) as bar:
            for text in texts:
                self._texts[text] = text_at(self.family.encode_texts(encoders, [text]), 0)
                bar.update(1)

    def _load(self) -> None:
        if self._host is None:
            from byg_plugin.hosts import make_host
            from byg_plugin.lora.files import naming

            host = make_host(self.config, self.family, self.device, fresh=False)
            if self._lora is not None and self.strength is not None:
                with naming(self._origin):
                    host.load_lora(self._lora)
                host.set_strength(self.strength)
            vae = self.family.load_vae(self.device)
            # Last: a caller that catches an error and calls again must not edit without LoRA.
            self._host, self._vae = host, vae


def _resolved(raw: dict[str, Any], guidance: float | None, resolution: int | None, sampler: Mapping[str, Any], *, origin: str) -> Config:
    """The configuration of an edit, with options above what LoRA or configuration say."""
    request.refuse_unused(raw["model"]["family"], {"guidance": guidance, **sampler})
    if guidance is not None:
        raw["conditioning"]["guidance"] = guidance
    if resolution is not None:
        raw["dataset"]["resolution"] = resolution
        if resolution < 256:
            raw["dataset"]["bucket_step"] = None  # the family's own
    raw["sample"] |= {key: value for key, value in sampler.items() if value is not None}
    return parse_config(raw, origin=origin)
