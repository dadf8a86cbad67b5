"""Metrics by name, a file each. A file is imported where its metric is asked for: torch takes seconds."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from byg_plugin.evaluation.metrics.base import Options as Options

METRICS = {
    "clip": "Clip",
    "dino": "Dino",
    "ssim": "Ssim",
    "psnr": "Psnr",
    "error": "Error",
    "lpips": "Lpips",
    "flicker": "Flicker",
    "dynamic": "Dynamic",
    "aesthetic": "Aesthetic",
    "motion": "Motion",
    "viescore": "VieScore",
    "imgedit": "ImgEdit",
}
"""Name of the file and of the class in it."""

READ_BY = {
    "masks": ("error", "psnr", "ssim", "lpips"),
    "clip": ("clip", "aesthetic"),
    "dino": ("dino",),
    "lpips_net": ("lpips",),
    "aesthetic": ("aesthetic",),
    "cotracker": ("motion",),
    "judged": ("viescore", "imgedit"),
    "vie_reading": ("viescore",),
    "device": ("clip", "dino", "lpips", "dynamic", "aesthetic", "motion"),
}
"""Options of evaluate.py that only some metrics read, and which."""


def classes(names: Sequence[str]) -> dict[str, Any]:
    """The class of each metric, a `base.Metric` once it is called with `base.Options`."""
    return {name: getattr(import_module(f"{__name__}.{name}"), METRICS[name]) for name in names}
