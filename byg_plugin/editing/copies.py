"""The baseline that edits nothing: the source itself, as the other methods see it. No weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from byg_plugin.editing.editor import OnStep, Words
from byg_plugin.editing.sources import Source, Sources
from byg_plugin.lora.card import LoraCard
from byg_plugin.version import __version__


class Copies:
    """Implements `editor.Editor` over sources at the sizes of a model."""

    reads: tuple[str, ...] = ()
    card = LoraCard()
    steps = 1

    def __init__(self, sources: Sources):
        self.sources = sources

    def settings(self, steps: int, schedule: str | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Nothing but the method."""
        return {"method": "copy"}, {"method": "copy", "version": __version__}

    def encode(self, texts: Iterable[str]) -> None:
        """Nothing is read."""

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
        """Each source twice."""
        pictures = [self.sources.image(source) for source in sources]
        if on_step is not None:
            on_step()
        return [(picture, picture) for picture in pictures]

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
        on_step: OnStep = None,
    ) -> tuple[list[Image.Image], list[Image.Image], float]:
        """A clip's frames twice, and its frames a second."""
        pictures, fps = self.sources.clip(Path(source), frames)
        if on_step is not None:
            on_step()
        return pictures, pictures, fps
