"""Clips whose containers say what their frames do not."""

from __future__ import annotations

from pathlib import Path

from tests.support.clip_files import encode, shades

B_FRAMES = {"bf": "3", "b-adapt": "0", "g": "10"}


def b_frames(path: Path, count: int = 28) -> Path:
    return encode(path, shades(count), options=B_FRAMES)
