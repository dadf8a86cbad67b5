"""Runs of NP-Edit on the tiny FLUX, with a critic that is a fixed small network."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from byg_plugin.config.sections import Config
from byg_plugin.data import cache
from byg_plugin.data.tuples import read_tuples
from byg_plugin.models import make_family
from byg_plugin.objectives.base import Batch, Metrics
from byg_plugin.training.loop import Trainer
from tests.support.tiny import kept, run_config, workspace

NP_EDIT: dict[str, Any] = {"name": "np_edit", "fake_updates": 2, "identity_warmup_steps": 1, "identity_probability": 0.5, "lambda_vlm": 0.5}


class LatentCritic:
    """Looks at the edit beside its source; a sample's loss hangs on its own words and on nothing random."""

    def __init__(self, channels: int = 16) -> None:
        rng = torch.Generator().manual_seed(11)
        self.weights = torch.randn(8, 2 * channels, generator=rng) * 0.3
        self.updates: list[int | None] = []
        self.words: list[str] = []

    def __call__(self, x0: Tensor, batch: Batch, *, identity_question: bool) -> tuple[Tensor, Metrics]:
        assert len(batch.words) == len(x0) == len(batch.source)
        self.updates.append(batch.updates)
        self.words += [words.instruction for words in batch.words]
        both = torch.cat([x0, batch.source], dim=1).flatten(2).transpose(1, 2)
        scores = torch.tanh(both @ self.weights.T).mean(dim=(1, 2))
        wanted = torch.tensor([1.0 if "add" in words.instruction else -1.0 for words in batch.words])
        loss = torch.nn.functional.softplus(-wanted * scores)
        if identity_question:
            loss = loss + (x0 - batch.source).abs().mean(dim=(1, 2, 3, 4))
        return loss.mean(), {"yes": torch.exp(-loss.detach()).mean()}


@lru_cache(maxsize=1)
def np_workspace() -> Path:
    """The shared workspace with the texts that NP-Edit needs beside the tuples'."""

    def write(folder: Path) -> Path:
        shutil.copytree(workspace(), folder)
        config = np_config(folder / "unused", folder=folder)
        cache.cache_texts(config, make_family(config), read_tuples(config.dataset), torch.device("cpu"))
        return folder

    return kept("np-edit", write)


def np_config(out: Path, folder: Path | None = None, **sections: dict[str, Any]) -> Config:
    """Nine steps: one of copying, then two of the fake score and one of the editor by turns."""
    folder = folder or np_workspace()
    defaults: dict[str, dict[str, Any]] = {
        "objective": NP_EDIT,
        "dataset": {"tuples": str(folder / "tuples.jsonl"), "cache_dir": str(folder / "cache")},
        "train": {"steps": 10, "save_every": 2, "lr": 1e-2, "weight_decay": 0.1, "betas": [0.0, 0.9]},
    }
    for name, values in sections.items():
        defaults[name] = defaults.get(name, {}) | values
    return run_config(out, **defaults)


def np_trainer(config: Config, resume: str | None = None, critic: LatentCritic | None = None) -> Trainer:
    return Trainer(config, make_family(config), Accelerator(cpu=True), resume, critique=critic or LatentCritic())
