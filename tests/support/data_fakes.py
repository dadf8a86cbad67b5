"""A tiny deterministic family that counts its calls, and small data sets; run as a program it is the caching command with it.

PYTHONPATH=. python tests/support/data_fakes.py latents|texts SECONDS_A_BATCH CONFIG.toml [--prune]
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from byg_plugin.config.sections import Config
from byg_plugin.data.rules import ROLES
from tests.support.tiny import tiny_config

CPU = torch.device("cpu")


class FakeFamily:
    """Latents are means over 8 x 8 pixels: what was cropped can be read off them. Encodings are a hash of the text."""

    name = "fake"

    def __init__(self, config: Config | None = None, vae: str = "vae-1", text: str = "text-1", multiple: int = 16):
        self.weights = {"vae": vae, "text": text}
        self.multiple = multiple
        self.images = 0
        self.texts: list[str] = []
        self.loaded: list[str] = []
        self.delay = 0.0

    def fingerprint(self, part: str) -> str:
        return self.weights[part]

    def pixel_multiple(self) -> int:
        return self.multiple

    def clip_frames(self, frames: int) -> int:
        return 1

    def load_vae(self, device: torch.device) -> nn.Module:
        self.loaded.append("vae")
        return nn.Identity()

    def load_text_encoders(self, device: torch.device) -> Any:
        self.loaded.append("text")
        return object()

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        assert pixels.dtype == torch.float32 and pixels.shape[1:3] == (3, 1), pixels.shape
        assert not [side for side in pixels.shape[3:] if side % self.multiple]
        time.sleep(self.delay)
        self.images += len(pixels)
        return nn.functional.avg_pool3d(pixels, (1, 8, 8))

    def encode_texts(self, encoders: Any, texts: Sequence[str]) -> dict[str, Tensor]:
        time.sleep(self.delay)
        self.texts += texts
        return {"t5": torch.stack([hashed(text) for text in texts]).unsqueeze(1).to(torch.bfloat16)}

    def longer_than_limit(self, encoders: Any, texts: Sequence[str]) -> list[bool]:
        return [text.startswith("long") for text in texts]


def hashed(text: str) -> Tensor:
    """8 numbers of a text, exact in bfloat16."""
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()[:8]), dtype=torch.float32)


def picture(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0) -> Path:
    """A smooth random RGB image; the format is the suffix's."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    small.resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def record(source: str, number: int = 0, /, **changes: Any) -> dict[str, Any]:
    """A whole tuple; `changes` replace fields, None removes one."""
    whole = {"source": source, **{role: f"{role} {number} of {source}" for role in ROLES}, **changes}
    return {name: value for name, value in whole.items() if value is not None}


def write_tuples(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(item) + "\n" for item in records), encoding="utf-8")
    return path


def data_set(folder: Path, images: int = 3, tuples_each: int = 1, size: tuple[int, int] = (64, 64), **record_changes: Any) -> Config:
    """`images` pictures with tuples, and the configuration that reads them at 64 pixels."""
    names = [f"{index}.png" for index in range(images)]
    for index, name in enumerate(names):
        picture(folder / name, size, seed=index)
    (folder / "model").mkdir(parents=True, exist_ok=True)  # FakeFamily reads nothing of it
    write_tuples(folder / "tuples.jsonl", [record(name, k, **record_changes) for name in names for k in range(tuples_each)])
    return tiny_config(folder)


def entries(config: Config) -> dict[str, bytes]:
    """Everything under the cache folder but the memory of file hashes: relative name -> contents."""
    folder = Path(config.dataset.cache_dir)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "files.json"}


if __name__ == "__main__":
    import signal

    # A test run started in the background of a shell ignores Ctrl-C, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import byg_plugin.models
    from byg_plugin import _cli
    from byg_plugin import caching as run_cache

    def slow_family(config: Config) -> FakeFamily:
        family = FakeFamily(config)
        family.delay = float(sys.argv[2])
        return family

    byg_plugin.models.make_family = slow_family
    _cli.run(lambda: run_cache.run(sys.argv[1], sys.argv[3], [], prune="--prune" in sys.argv))
