"""diffusers folders that its own pipelines have written, LoRAs beside them, and edits of ours to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from PIL import Image
from torch import Tensor

from byg_plugin import EditPipeline, pipelines
from byg_plugin.config.sections import Config
from byg_plugin.data.buckets import to_tensor
from byg_plugin.editing.sources import as_seen
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.files import write_lora
from byg_plugin.models import files, make_family
from tests.support.tiny import kept, make_host, model_folder, tiny_config
from tests.support.tiny_flux2 import SCHEDULER, flux2_folder, qwen3_tokenizer, tiny_qwen3
from tests.support.tiny_qwen import krea2_folder, qwen_folder, tiny_language_model, tiny_qwen3_vl
from tests.support.tiny_wan import A14B, wan_config
from tests.support.tiny_zimage import SHIFT, zimage_folder

CPU = torch.device("cpu")
WAN_SHIFT = {A14B: 12.0, "wan2.1-t2v-1.3b": 8.0}
BY_TOKENS = {"use_dynamic_shifting": True, "base_image_seq_len": 256, "base_shift": 0.5}
QWEN_SCHEDULER = BY_TOKENS | {"max_image_seq_len": 8192, "max_shift": 0.9, "shift_terminal": 0.02}

PROMPTS = ["add snow", "remove the dog"]


@dataclass(frozen=True)
class Made:
    """How diffusers' pipeline of an image family is put together from tiny parts.

    Attributes:
        family: its name.
        folder: of the parts.
        tokens: that a text is cut to.
        scheduler: its configuration.
        encoder: that the pipeline takes; None: FLUX.1's two.
        sinusoids: module of the network that takes the times, and the factor that is on them.
    """

    family: str
    folder: Callable[[], Path]
    tokens: int
    scheduler: Mapping[str, Any]
    encoder: Callable[[], Any] | None
    sinusoids: tuple[str, float]


IMAGE_FAMILIES = {
    "FluxBygPipeline": Made("flux", model_folder, 8, files.shipped_config("flux_dev/scheduler"), None, ("time_text_embed.time_proj", 1000)),
    "Flux2KleinBygPipeline": Made("flux2-klein-4b", flux2_folder, 20, SCHEDULER, tiny_qwen3, ("time_guidance_embed.time_proj", 1000)),
    "ZImageBygPipeline": Made("z-image", zimage_folder, 20, {"shift": SHIFT}, partial(tiny_qwen3, layers=3), ("t_embedder", -1000)),
    "QwenImageBygPipeline": Made("qwen-image", qwen_folder, 8, QWEN_SCHEDULER, tiny_language_model, ("time_text_embed.time_proj", 1)),
    "Krea2BygPipeline": Made(
        "krea2", krea2_folder, 8, BY_TOKENS | {"max_image_seq_len": 6400, "max_shift": 1.15}, tiny_qwen3_vl, ("time_embed", 1)
    ),
}


def image_config(name: str, root: Path, **sections: dict[str, Any]) -> Config:
    """A configuration of the family that a pipeline of ours is for."""
    made = IMAGE_FAMILIES[name]
    conditioning = {"max_text_tokens": made.tokens} | sections.pop("conditioning", {})
    return tiny_config(root, model={"family": made.family, "path": str(made.folder())}, conditioning=conditioning, **sections)


@cache
def image_folder(name: str) -> Path:
    """What diffusers' pipeline behind ours saves of a family's tiny parts; nobody may write into it."""
    made = IMAGE_FAMILIES[name]

    def write(folder: Path) -> Path:
        family: Any = make_family(image_config(name, folder))
        ((_, network),) = family.load_transformers(torch.float32)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(made.scheduler)
        encoders = family.load_text_encoders(CPU)
        if made.encoder is None:
            texts = (encoders.clip, encoders.clip_tokenizer, encoders.t5, encoders.t5_tokenizer)
        else:
            encoder = made.encoder()  # the family's own is cut short, and its tokenizer has no template
            texts = (encoder, qwen3_tokenizer() if type(encoder).__name__ == "Qwen3ForCausalLM" else encoders.tokenizer)
        stock = getattr(diffusers, name.replace("Byg", ""))
        stock(scheduler, family.load_vae(CPU), *texts, network).save_pretrained(folder)
        return folder

    return kept(f"saved-{made.family}", write)


@cache
def wan_saved(family: str) -> Path:
    """The same of Wan, of one or two experts."""

    def write(folder: Path) -> Path:
        experts = 2 if family == A14B else 1
        made: Any = make_family(wan_config(folder, family))
        encoders = made.load_text_encoders(CPU)
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=WAN_SHIFT[family])
        networks = dict(made.load_transformers(torch.float32))
        more = {"boundary_ratio": 0.875} if experts == 2 else {}
        vae = made.load_vae(CPU)
        WanPipeline(encoders.tokenizer, encoders.model, vae, scheduler, **networks, **more).save_pretrained(folder)
        return folder

    return kept(f"saved-{family}", write)


def write_card_lora(config: Config, path: Path, **card: Any) -> Path:
    """A LoRA that is awake, as training writes it; of two experts a pair of files, of which the first is returned."""
    host, family = make_host(config), make_family(config)
    written = []
    for suffix, tensors in host.lora_files(host.parameters).items():
        metadata = LoraCard.of(config, 1, "live", family, suffix).to_metadata() | {f"byg.{key}": str(value) for key, value in card.items()}
        written.append(path.with_name(f"{path.stem}{suffix}.safetensors"))
        write_lora(written[-1], tensors, metadata)
    return written[0]


_pipes: dict[tuple[str, Path], Any] = {}


def opened(name: str, folder: Path | None = None) -> Any:
    """Our pipeline of a folder, quiet and without LoRA; one for all tests of a process."""
    key = name, folder or image_folder(name)
    if key not in _pipes:
        _pipes[key] = getattr(pipelines, name).from_pretrained(key[1])
        _pipes[key].set_progress_bar_config(disable=True)
    pipe = _pipes[key]
    pipe.unload_lora_weights()
    pipe.position, pipe._card = "same", None
    return pipe


def forget(name: str) -> None:
    """A test has changed the pipeline's weights."""
    _pipes.pop((name, image_folder(name)))


def image(seed: int = 0, size: tuple[int, int] = (100, 70)) -> Image.Image:
    """A smooth picture, of no size that a network takes."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def edited(editor: EditPipeline, clips: list[list[Image.Image]], texts: list[str], *, steps: int, seeds: list[int]) -> Tensor:
    """Pixels (B, 3, F, H, W) in [-1, 1] of `edit.py`'s edits of frames."""
    dataset, multiple = editor.config.dataset, editor.family.pixel_multiple()
    pixels = torch.stack([torch.stack([to_tensor(as_seen(frame, dataset, multiple)) for frame in clip], dim=1) for clip in clips])
    with torch.no_grad():
        return editor._edit(pixels, texts, steps=steps, schedule=None, seeds=seeds, guided=True, on_step=None)


def lora_of(name: str, folder: Path, position: str = "same", **card: Any) -> Path:
    """A LoRA of an image family that is awake, with `card` in its header."""
    config = image_config(name, folder, conditioning={"position": position}, dataset={"resolution": 48})
    return write_card_lora(config, folder / "lora.safetensors", **card)


def generators(*seeds: int) -> list[torch.Generator]:
    """On the CPU."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def edit(pipe: Any, seed: int = 4, **options: Any) -> Any:
    """The pictures of a short call of a pipeline."""
    call = {"image": image(), "prompt": "add snow", "num_inference_steps": 2, "output_type": "pt", "generator": generators(seed)[0]}
    return pipe(**(call | options)).images
