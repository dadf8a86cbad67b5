"""Texts that a text encoder would cut, counted with the tokenizers that ship with the package."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import byg_plugin
from byg_plugin.data import clips
from byg_plugin.data.rules import ROLES, Finding
from byg_plugin.data.tuples import EditTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Tokens that the encoders take; a longer text is cut. FLUX takes only a pooled vector from CLIP.
LIMITS = {"images": {"t5": 512, "clip": 77}, "clips": {"umt5": 512}}
_FOLDER = Path(byg_plugin.__file__).parent / "models" / "assets" / "tokenizers"


class TooLong:
    """Compares texts with the limits.

    Args:
        max_tokens: conditioning.max_text_tokens, of T5 and UMT5.

    Attributes:
        notes: why nothing is compared, if nothing is.
    """

    def __init__(self, max_tokens: int):
        self.notes: list[str] = []
        self._max_tokens = max_tokens
        self._loaded: dict[str, Tokenizer] = {}
        self._can_count = find_spec("tokenizers") is not None
        if not self._can_count:
            self.notes.append('note: lengths were not checked, that needs tokenizers: pip install -e ".[diffusers]"')

    def findings(self, item: EditTuple) -> Iterator[Finding]:
        """One finding a text and encoder that cuts it."""
        for encoder, most in LIMITS["clips" if clips.is_clip(item.source) else "images"].items() if self._can_count else ():
            limit = most if encoder == "clip" else min(most, self._max_tokens)
            for role in ROLES:
                text = getattr(item, role)
                # No tokenizer of these makes more than one token a byte, and two for begin and end.
                if len(text.encode()) + 2 > limit and (tokens := self._count(encoder, text)) > limit:
                    yield Finding(reason=f"too_long_{encoder}", message=f"{role} has {tokens} tokens, {limit} are taken", hard=False)

    def _count(self, name: str, text: str) -> int:
        from tokenizers import Tokenizer

        if name not in self._loaded:
            tokenizer = Tokenizer.from_str(gzip.decompress((_FOLDER / f"{name}_tokenizer.json.gz").read_bytes()).decode())
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self._loaded[name] = tokenizer
        return len(self._loaded[name].encode(text).ids)
