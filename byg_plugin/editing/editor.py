"""What edit.py asks of a method: the trained editor and the baselines are alike to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from byg_plugin.editing.sources import Source, Sources
from byg_plugin.lora.card import LoraCard

Words = str | tuple[str, ...]
"""What a method reads of an item: one text, or several in the order of `Editor.reads`."""
OnStep = Callable[[], object] | None


class Editor(Protocol):
    """Edits images and clips by the words it reads.

    Attributes:
        reads: fields of a tuple.
        sources: prepares them.
        card: of the LoRA; empty where there is none.
    """

    reads: tuple[str, ...]
    sources: Sources
    card: LoraCard

    @property
    def steps(self) -> int:
        """Calls of `on_step` for an edit, unless `steps` is given."""
        ...

    def settings(self, steps: int, schedule: str | None) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """What an edit was made with, for the file itself and for the manifest."""
        ...

    def encode(self, texts: Iterable[str]) -> None:
        """All texts at once, before the first edit."""
        ...

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
        """(source as the method saw it, edit) of each, of one size."""
        ...

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
        """A clip's frames, their edits, and the frames a second of both."""
        ...


def texts_of(words: Iterable[Words]) -> list[str]:
    """All of them in a row."""
    return [text for each in words for text in ((each,) if isinstance(each, str) else each)]
