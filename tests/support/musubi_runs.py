"""Work folders, steps and runs inside the real musubi-tuner."""

from __future__ import annotations

import json
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from byg_plugin import families
from byg_plugin.data.rules import ROLES
from byg_plugin.musubi import cache as musubi_cache
from byg_plugin.musubi import host as musubi
from byg_plugin.musubi.family import musubi_family
from byg_plugin.objectives.base import Batch
from byg_plugin.texts import MASK, text_at
from byg_plugin.timesteps import uniform_nodes
from tests.support import ROOT
from tests.support.musubi_host import (
    A14B,
    CHECKOUT,
    SITE,
    T2V,
    TEXT_TOKENS,
    Rig,
    host_config,
    latents,
    open_tiny,
    reset_accelerate,
    texts,
    write_weights,
)
from tests.support.musubi_images import IMAGES

FAMILIES = [T2V, A14B, "flux", *IMAGES]


@lru_cache(maxsize=8)
def rig(family: str, **_: Any) -> Rig:
    """One a family; tests leave it as they found it."""
    import tempfile

    made = Rig(Path(tempfile.mkdtemp(prefix="byg-musubi-")), family)
    made.wake()
    return made


def one_batch(family: str) -> Batch:
    t = (0.55, 0.3) if family == A14B else (0.7, 0.3)
    return Batch(
        source=latents(family, 2, 1),
        noise=latents(family, 2, 2),
        t=torch.tensor(t),
        nodes=uniform_nodes(4),
        **{role: texts(family, 2, 10 + index) for index, role in enumerate(ROLES)},
    )


def child_env(**more: str) -> dict[str, str]:
    path = [str(SITE), str(ROOT), str(Path(CHECKOUT) / "src")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **more}


def write_work(folder: Path, family: str, items: int = 3) -> None:
    """Weights, the host's latent caches, tuples, and our roles in the text caches."""
    write_weights(folder, family)
    name = musubi_family(family).architecture[0]
    is_image = not families.named(family).takes_clips
    cache = folder / "cache"
    cache.mkdir()
    lines = []
    for index in range(items):
        source = folder / f"photo{index}.png"
        Image.new("RGB", (48, 32), (60 * index, 90, 120)).save(source)
        latent = latents(family, 1, index)[0].bfloat16()
        sides = IMAGES[family].stored if family in IMAGES else (1, 4, 6) if family == "flux" else (2, 4, 6)
        shape = "x".join(map(str, sides))
        stored = latent[:, 0] if family == "flux" else latent.reshape(len(latent), *sides)
        position = "" if is_image else "_00000-005"
        save_file({f"latents_{shape}_bfloat16": stored.contiguous()}, cache / f"photo{index}{position}_0048x0032_{name}.safetensors")
        record = {"source": source.name, **{role: f"{role} {index}" for role in ROLES}}
        lines.append(json.dumps(record))
    (folder / "tuples.jsonl").write_text("\n".join(lines), encoding="utf-8")
    kind = "image" if is_image else "video"
    frames = "" if is_image else "target_frames = [5]\n"
    toml = (
        f'[general]\nresolution = [48, 32]\nbatch_size = 1\nenable_bucket = false\n[[datasets]]\n{kind}_directory = "{folder.as_posix()}"\n'
    )
    (folder / "dataset.toml").write_text(f'{toml}cache_directory = "{cache.as_posix()}"\n{frames}', encoding="utf-8")
    write_roles(folder, family, encoder_of(family))


def write_roles(folder: Path, family: str, encoder: str) -> None:
    """Our roles in the host's text caches, said to be by an encoder."""
    from byg_plugin.data.tuples import read_tuples_file

    tuples = read_tuples_file(folder / "tuples.jsonl")
    hosts = musubi_family(family)
    for item, some in musubi_cache.matched(musubi_cache.cached_items(folder / "dataset.toml", hosts), tuples):
        musubi_cache.write_roles(item, some, lambda text: encoded(family, text), hosts, encoder)


def encoder_of(family: str) -> str:
    """What the encodings of these tests are said to be by: files that are not there, of any name."""
    parts = musubi._encoder_parts(host_config(Path("."), family))
    return musubi_cache.ENCODER_PARTS.join("none" if part is None else part for part in parts)


def encoded(family: str, text: str) -> dict[str, Tensor]:
    seed = sum(map(ord, text))
    found = {name: value[0] for name, value in texts(family, 1, seed).items()}
    if family in IMAGES:
        return {name: value for name, value in text_at(texts(family, 1, seed), 0).items() if name != MASK}
    return {"t5": found["t5"], "pooled": found["pooled"][None]} if family == "flux" else {"umt5": found["umt5"][:5]}


def write_config(folder: Path, family: str, out: str = "out", **options: Any) -> Path:
    """A TOML file of the run."""
    precision = {"mixed_precision": "bf16"} if family in IMAGES else {}
    config = host_config(folder, family, musubi={"output_dir": str(folder / out), "seed": 3, **precision, **options})
    lines = ["[model]", f'family = "{family}"', 'host = "musubi"', f'host_path = "{CHECKOUT}"', 'device = "cpu"', "[dataset]"]
    lines += [f'tuples = "{folder / "tuples.jsonl"}"', "[conditioning]", f"max_text_tokens = {TEXT_TOKENS}", "[objective]"]
    lines += ["rollout_steps = 2", "identity_warmup_steps = 1", "ema_decay = 0.9", "[musubi]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in config.musubi.items()]
    path = folder / f"{out}.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def run_here(config_path: Path, resume: str | None = None) -> Path:
    """Train in this process, by the host's own loop."""
    from byg_plugin.config.loading import load_config

    config = load_config(config_path)
    open_tiny(config.model.family)
    reset_accelerate()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return musubi.train(config, resume)
