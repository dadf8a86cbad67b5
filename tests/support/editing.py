"""What tests of editing share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from byg_plugin import EditPipeline, edit
from tests.support.tiny import model_folder, workspace

CPU = torch.device("cpu")


def pipeline(lora: Path, **options: Any) -> EditPipeline:
    return EditPipeline.from_lora(lora, model=str(model_folder()), **({"dtype": "float32", "device": "cpu"} | options))


def photo(index: int = 0) -> Path:
    return workspace() / f"photo{index}.png"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(pixels(a) - pixels(b)).max())


def command(monkeypatch: pytest.MonkeyPatch, lora: Path | None, *arguments: Any, model: bool = True) -> None:
    fixed = ["--lora", str(lora)] + (["--model", str(model_folder()), "--dtype", "float32", "--device", "cpu"] if model else [])
    monkeypatch.setattr(sys, "argv", ["edit.py", *fixed, *map(str, arguments)])
    edit.main()
