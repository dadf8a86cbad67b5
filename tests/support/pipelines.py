"""diffusers folders that its own pipelines have written, LoRAs beside them, and edits of ours to compare with."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from PIL import Image
from torch import Tensor

from byg_plugin import EditPipeline, pipelines
from byg_plugin.config.sections import Config
from byg_plugin.data.buckets import to_tensor
from byg_plugin.editing.pipeline import as_seen
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.files import write_lora
from byg_plugin.models import make_family
from tests.models import test_flux, test_flux2, test_krea2, test_qwen_image, test_zimage
from tests.models.contract import FamilyContract
from tests.support.tiny import kept, make_host
from tests.support.tiny_wan import A14B, wan_config

WAN_SHIFT = {A14B: 12.0, "wan2.1-t2v-1.3b": 8.0}
CONTRACTS: dict[str, type[FamilyContract]] = {
    "FluxBygPipeline": test_flux.TestContract,
    "Flux2KleinBygPipeline": test_flux2.TestContract,
    "ZImageBygPipeline": test_zimage.TestContract,
    "QwenImageBygPipeline": test_qwen_image.TestContract,
    "Krea2BygPipeline": test_krea2.TestContract,
}


@cache
def image_folder(name: str) -> Path:
    """What diffusers' pipeline behind ours saves of a family's tiny parts; nobody may write into it."""
    contract = CONTRACTS[name]()

    def write(folder: Path) -> Path:
        contract.pipeline(contract.family(), contract.network()).save_pretrained(folder)
        return folder

    return kept(f"saved-{contract.name}", write)


@cache
def wan_saved(family: str) -> Path:
    """The same of Wan, of one or two experts."""

    def write(folder: Path) -> Path:
        experts = 2 if family == A14B else 1
        made: Any = make_family(wan_config(folder, family))
        encoders = made.load_text_encoders(torch.device("cpu"))
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=WAN_SHIFT[family])
        networks = dict(made.load_transformers(torch.float32))
        more = {"boundary_ratio": 0.875} if experts == 2 else {}
        vae = made.load_vae(torch.device("cpu"))
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


@cache
def _opened(name: str, folder: Path) -> Any:
    pipe: Any = getattr(pipelines, name).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def opened(name: str, folder: Path | None = None) -> Any:
    """Our pipeline of a folder, quiet and without LoRA; one for all tests of a process."""
    pipe = _opened(name, folder or image_folder(name))
    pipe.unload_lora_weights()
    pipe.position, pipe._card = "same", None
    return pipe


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
