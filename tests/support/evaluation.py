"""Items to judge, and tiny models of the real classes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from byg_plugin import shipped
from byg_plugin.data.clips import write_clip
from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import read_tuples_file
from byg_plugin.editing import manifest
from byg_plugin.evaluation.frames import Seen
from byg_plugin.evaluation.items import Item
from byg_plugin.lora.card import LoraCard

NOWHERE = Path("nowhere.png")


def noise(seed: int, height: int = 32, width: int = 40, frames: int = 1) -> np.ndarray:
    """(F, H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def seen(source: np.ndarray, edit: np.ndarray, name: str = "a.png", **more: Any) -> Seen:
    texts = {"src_caption": "a red square", "tgt_caption": "a blue circle"} | more.pop("texts", {})
    return Seen(item=Item(id="a", source=NOWHERE, edit=Path(name), **texts), source=source, edit=edit, **more)


def save(path: Path, frames: np.ndarray, fps: float = 8.0) -> Path:
    """An image, or a lossless clip where the name is a clip's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.fromarray(frame) for frame in frames]
    if path.suffix in (".mkv", ".mp4"):
        write_clip(path, images, fps, lossless=path.suffix == ".mkv")
    else:
        images[0].save(path)
    return path


def write_edits(folder: Path, count: int = 3, *, suffix: str = ".png", level: int = 0, **fields: Any) -> Path:
    """A folder of edits with their manifest, and sources beside it; `level` is added to each pixel of an edit."""
    out = folder / f"edits{level}"
    out.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        shown = noise(number, frames={".mkv": 3, ".mp4": 9}.get(suffix, 1)) // 2
        source, made = save(folder / "sources" / f"s{number}{suffix}", shown), shown + np.uint8((level + number) % 128)
        edit = save(out / f"{number:05d}_s{number}{suffix}", made)
        texts = {**{role: f"{role} {number}" for role in ROLES}, "edit_type": ("add", "remove")[number % 2], "id": f"t{number}"}
        manifest.append(
            out,
            manifest.Edit(
                source=source,
                edit=edit,
                side_by_side=out / f"{edit.stem}_side_by_side{suffix}",
                **{**texts, **fields},
                seed=0,
                size=(40, 32),
                frames=3 if suffix == ".mkv" else None,
                fps=8.0 if suffix == ".mkv" else None,
                settings={},
                card=LoraCard(family="flux", guidance=3.5),
            ),
        )
    return out


def edit_tuples(tuples: Path, out: Path) -> Path:
    """The folder of edits that edit.py would make of a file of tuples; each is as its source, a little darker."""
    out.mkdir(parents=True)
    for number, one in enumerate(read_tuples_file(tuples)):
        shown = np.asarray(Image.open(one.source).convert("RGB"))[None]
        edit = save(out / f"{number:05d}_{one.source.stem}.png", shown // 2)
        texts = {name: getattr(one, name) for name in (*ROLES, "edit_type", "id")}
        files = {"source": one.source, "edit": edit, "side_by_side": edit}
        size = (shown.shape[2], shown.shape[1])
        manifest.append(out, manifest.Edit(**files, **texts, seed=0, size=size, settings={}, card=LoraCard(family="flux", guidance=3.5)))
    return out


def write_tuples_of(folder: Path, count: int = 3, **fields: Any) -> Path:
    """Tuples of `write_edits`' sources."""
    path = folder / "tuples.jsonl"
    words = ("a bare field", "a field in snow", "add the snow", "remove the snow")
    texts = dict(zip(ROLES, words, strict=True))
    records = [{"source": f"sources/s{number}.png", "id": f"t{number}", **texts, **fields} for number in range(count)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def tiny_clip(folder: Path) -> Path:
    """A random CLIP of the real classes with CLIP's own tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = layers | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407, "bos_token_id": 49406}
    vision = layers | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    packed = shipped.PACKAGE / "models" / "assets" / "tokenizers" / "clip_tokenizer.json.gz"
    (folder / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}), encoding="utf-8"
    )
    return folder


def tiny_dino(folder: Path, version: int = 1) -> Path:
    """A random DINO of the real classes."""
    from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

    layers = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = (
        ViTModel(ViTConfig(**layers, image_size=32, patch_size=8), add_pooling_layer=False)
        if version == 1
        else Dinov2Model(Dinov2Config(**layers, image_size=28, patch_size=14))
    )
    model.save_pretrained(folder)
    return folder
