"""Caching of the fake family, and changes to its tuples."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from byg_plugin.config.sections import Config
from byg_plugin.data.cache import Summary, cache_latents, cache_texts
from byg_plugin.data.tuples import read_tuples
from tests.support.data_fakes import CPU, FakeFamily, write_tuples


def run(config: Config, family: FakeFamily | None = None, **options: Any) -> tuple[FakeFamily, Summary, Summary]:
    """Both commands on a fresh reading of the tuples; the family counts what was encoded."""
    family = family or FakeFamily()
    family.images, family.texts = 0, []
    tuples = read_tuples(config.dataset)
    latents = cache_latents(config, family, tuples, CPU, **options)
    texts = cache_texts(config, family, tuples, CPU, **options)
    assert (latents.encoded, texts.encoded) == (family.images, len(family.texts))
    return family, latents, texts


def with_dataset(config: Config, **keys: Any) -> Config:
    return config.model_copy(update={"dataset": config.dataset.model_copy(update=keys)})


def edit_tuples(config: Config, change: Callable[[list[dict[str, Any]]], None]) -> None:
    path = Path(config.dataset.tuples)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    change(records)
    write_tuples(path, records)
