"""The supervised baseline: stock FLUX.1 Kontext (Labs et al. 2025) by diffusers' own pipeline, at the sizes of the other methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from byg_plugin.config.device import resolve_device
from byg_plugin.config.extras import require
from byg_plugin.config.sections import DatasetConfig
from byg_plugin.editing.editor import OnStep, Words
from byg_plugin.editing.sources import Source, Sources
from byg_plugin.images import to_pil
from byg_plugin.lora.card import LoraCard, base_name
from byg_plugin.version import __version__

if TYPE_CHECKING:
    import torch

STEPS = 28  # diffusers' default
GUIDANCE = 2.5  # of the model's own card; diffusers' default is 3.5
_PIXEL_MULTIPLE = 16
_CLASS = "FluxKontextPipeline"


class _Sizes:
    """FLUX.1's."""

    name = "FLUX.1 Kontext"

    def pixel_multiple(self) -> int:
        """VAE down-sampling x patch."""
        return _PIXEL_MULTIPLE

    def clip_frames(self, frames: int) -> int:
        """Images alone."""
        return 1


class Kontext:
    """Implements `editor.Editor`. The model is loaded with the first edit; on CUDA a part of it is on the device at a time.

    Args:
        model: diffusers folder or hub id.
        dataset: sizes.
        guidance: of the guidance embedding; None: the published 2.5.
        device: auto, cpu or cuda.
        dtype: bfloat16, float16 or float32.

    Raises:
        ValueError: diffusers is missing, or the folder is of another pipeline.
    """

    reads: tuple[str, ...] = ("instruction",)
    card = LoraCard()
    steps = STEPS

    def __init__(self, model: str, dataset: DatasetConfig, *, guidance: float | None = None, device: str = "auto", dtype: str = "bfloat16"):
        for package in ("diffusers", "transformers"):
            require(package, "--method kontext", "diffusers")
        _check_class(model)
        self.sources = Sources(dataset, _Sizes())
        self._model, self._dtype = model, dtype
        self._guidance = GUIDANCE if guidance is None else guidance
        self._device = resolve_device(device)
        self._pipe: Any = None

    def settings(self, steps: int, schedule: str | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """What an edit is made with, for the file itself and for the manifest."""
        made = {"method": "kontext", "steps": steps, "guidance": self._guidance, "base": base_name(self._model)}
        return made, made | {"dtype": self._dtype, "version": __version__}

    def encode(self, texts: Iterable[str]) -> None:
        """The pipeline encodes for itself."""

    def batch(
        self,
        sources: Sequence[Source],
        instructions: Sequence[Words],
        *,
        steps: int | None = None,
        schedule: str | None = None,
        seeds: Sequence[int],
        guided: bool = True,
        on_step: OnStep = None,
    ) -> list[tuple[Image.Image, Image.Image]]:
        """(source as the model saw it, edit) of each, one by one."""
        import torch

        from byg_plugin import sampling

        pipe = self._loaded()
        made = []
        for source, words, seed in zip(sources, instructions, seeds, strict=True):
            assert isinstance(words, str), "an instruction"
            picture = self.sources.image(source)
            width, height = picture.size

            def after(pipe: Any, index: int, t: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
                if on_step is not None:
                    on_step()
                return values

            # `max_area` and `_auto_resize`: else it paints at 1024 x 1024 pixels whatever the source has.
            pixels = pipe(
                image=picture,
                prompt=words,
                width=width,
                height=height,
                max_area=width * height,
                _auto_resize=False,
                num_inference_steps=steps or STEPS,
                guidance_scale=self._guidance,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=after,
                output_type="pt",
            ).images[0]
            edit = to_pil(sampling.finite(self._dtype, pixels, "the decoded pixels") * 2 - 1)
            assert edit.size == picture.size, (edit.size, picture.size)
            made.append((picture, edit))
        return made

    def clip(self, source: str | Path, instruction: Words, **options: Any) -> tuple[list[Image.Image], list[Image.Image], float]:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{source}: a clip, and {_Sizes.name} edits images")

    def _loaded(self) -> Any:
        if self._pipe is None:
            import torch
            from diffusers import FluxKontextPipeline

            from byg_plugin.models.files import from_hub
            from byg_plugin.progress import quiet_loading

            where = str(Path(self._model).expanduser()) if Path(self._model).expanduser().is_dir() else self._model
            options = {"torch_dtype": getattr(torch, self._dtype)}

            def load() -> Any:
                return FluxKontextPipeline.from_pretrained(where, trust_remote_code=False, use_safetensors=True, **options)

            with quiet_loading():
                pipe = from_hub(load, where)
            pipe.set_progress_bar_config(disable=True)
            if self._device.type == "cuda":
                pipe.enable_model_cpu_offload(device=self._device)
            self._pipe = pipe
        return self._pipe


def _check_class(model: str) -> None:
    """A folder says what it is of; a hub id is asked when it is loaded."""
    from byg_plugin.models.files import read_json

    folder = Path(model).expanduser()
    if not folder.exists():
        return
    index = folder / "model_index.json"
    found = read_json(index).get("_class_name") if index.is_file() else None
    if found != _CLASS:
        raise ValueError(
            f"--model {model}: {'is of ' + str(found) if found else 'has no model_index.json'}; --method kontext takes a diffusers folder "
            f"of {_CLASS} or its hub id, e.g. black-forest-labs/FLUX.1-Kontext-dev"
        )
