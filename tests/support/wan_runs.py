"""Runs of the trainer on the tiny Wan's workspace."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from byg_plugin.config.sections import Config
from byg_plugin.data import cache, clips
from byg_plugin.data.tuples import read_tuples
from byg_plugin.models import make_family
from tests.support.data_fakes import CPU, picture, write_tuples
from tests.support.tiny_wan import A14B, wan_config


@lru_cache(maxsize=1)
def workspace() -> Path:
    """A folder with two clips, an image and their caches; outputs go elsewhere."""
    root = Path(tempfile.mkdtemp(prefix="byg-wan-work-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for index in range(2):
        frames = [Image.new("RGB", (48, 32), (40 * index + 9 * k, 90, 200 - 9 * k)) for k in range(9)]
        clips.write_clip(root / f"clip{index}.mp4", frames, 16)
    picture(root / "still.png", (48, 32))
    lines = [
        {
            "source": name,
            "src_caption": "photo of a dog",
            "tgt_caption": f"photo of a {word}",
            "instruction": f"make the dog {word}",
            "reverse_instruction": f"make the {word} dog",
        }
        for name, word in (("clip0.mp4", "blue"), ("clip1.mp4", "red"), ("still.png", "blue"))
    ]
    write_tuples(root / "tuples.jsonl", lines)
    config = wan_config(root, dataset={"resolution": 40, "bucket_step": 16}, sample={"every": 1})
    family, tuples = make_family(config), read_tuples(config.dataset)
    cache.cache_latents(config, family, tuples, CPU)
    cache.cache_texts(config, family, tuples, CPU)
    return root


def run_config(out: Path, family: str = A14B, **sections: dict[str, Any]) -> Config:
    defaults: dict[str, dict[str, Any]] = {
        "dataset": {"resolution": 40, "bucket_step": 16},
        "train": {"steps": 4, "save_every": 2, "keep_last": 0, "global_batch_size": 2},
        "output": {"dir": str(out)},
    }
    for name, values in sections.items():
        defaults.setdefault(name, {}).update(values)
    return wan_config(workspace(), family, **defaults)
