"""Encoded texts that are kept for their edits: in main memory while they are few, the others in files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES = 4 << 30
"""In main memory: some 1,000 texts of FLUX.1, 340 of FLUX.2 klein 9B."""


class Encodings:
    """A mapping from a text to its encoding (named tensors on the CPU).

    What does not fit into `most` bytes lies in a folder of its own among the temporary files, which goes when the mapping goes. Where
    these are kept in main memory (a tmpfs), TMPDIR has to name a disk.
    """

    def __init__(self, most: int = MOST_BYTES):
        self._most, self._bytes = most, 0
        self._here: dict[str, dict[str, Tensor]] = {}
        self._files: dict[str, Path] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __contains__(self, text: str) -> bool:
        return text in self._here or text in self._files

    def __getitem__(self, text: str) -> dict[str, Tensor]:
        """Raises: KeyError: it was not encoded."""
        if text in self._here:
            return self._here[text]
        from safetensors.torch import load

        # Read as a whole: a mapped file could not be removed on Windows.
        return load(self._files[text].read_bytes())

    def __setitem__(self, text: str, encoding: dict[str, Tensor]) -> None:
        """Keep one.

        Raises:
            ValueError: there is no room for its file; names the folder.
        """
        size = sum(value.nbytes for value in encoding.values())
        if self._bytes + size <= self._most:
            self._bytes += size
            self._here[text] = encoding
        else:
            self._files[text] = self._written(encoding)

    def _written(self, encoding: dict[str, Tensor]) -> Path:
        from safetensors.torch import save

        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="byg-texts-", ignore_cleanup_errors=True)
            path = Path(self._folder.name) / f"{len(self._files):06d}.safetensors"
            path.write_bytes(save({name: value.contiguous() for name, value in encoding.items()}))
        except OSError as error:
            where = self._folder.name if self._folder else "no folder for temporary files"
            raise ValueError(
                f"{where}: {error.strerror or error}, with {len(self._files)} encoded texts in it; set TMPDIR (Windows: TEMP) to a folder "
                "with room, or edit fewer at once"
            ) from error
        return path
