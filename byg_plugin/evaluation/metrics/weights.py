"""Models of transformers for metrics, from a folder or from what the hub's cache has. Nothing is downloaded here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from byg_plugin.config.extras import require
from byg_plugin.places import check_path
from byg_plugin.progress import quiet_loading
from byg_plugin.user_files import file_digest

_BATCH = 16  # frames at once


def load(cls: str, path: str, option: str, device: str) -> Any:
    """A pretrained class of transformers by its name, e.g. `CLIPModel`; modules are in float32, frozen.

    Raises:
        ValueError: transformers is missing, or the model is not on this machine; names the line that fetches it.
    """
    require("transformers", f"{option} {path}", "diffusers")
    check_path(path, f"{option} ")
    import transformers

    folder = Path(path).expanduser()
    known = str(folder) if folder.exists() else path
    try:
        with quiet_loading():
            loaded = getattr(transformers, cls).from_pretrained(known, local_files_only=True, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError) as error:  # of what is not in the cache or no model
        remedy = "is not a folder of that model" if folder.exists() else f"is not on this machine; fetch it with: hf download {path}"
        raise ValueError(f"{option} {path}: {remedy} ({str(error).splitlines()[0][:200]})") from error
    return loaded.to(device).float().eval().requires_grad_(False) if isinstance(loaded, torch.nn.Module) else loaded


def digest_of(path: str) -> str:
    """Of the files of a model that `load` has loaded: another model under the same name has another one, a moved one has not."""
    from transformers.utils import cached_file

    folder = Path(path).expanduser()
    config = cached_file(str(folder) if folder.exists() else path, "config.json", local_files_only=True)
    files = sorted(one for one in Path(config).parent.iterdir() if one.suffix in (".safetensors", ".json", ".txt"))
    named = [[one.name, file_digest(one)] for one in files]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def tensors_of(path: Path | None, option: str, source: str, convert: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file that a user has made of a published file of pickles, which is never read here.

    Args:
        path: of the file.
        option: that names it.
        source: where the published file is.
        convert: the line of Python that makes the one of the other.

    Raises:
        ValueError: it is not given, not there, or is none.
    """
    said = f"{source}; then: python -c '{convert}'"
    if path is None:
        raise ValueError(f"give {option} FILE: fetch {said}")
    if not path.is_file():
        raise ValueError(f"{option} {path}: no such file; fetch {said}")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{option} {path}: is no .safetensors file ({error}); of {said}") from error


def batches(
    frames: np.ndarray, size: int, mean: tuple[float, ...], std: tuple[float, ...], device: str, *, crop: bool = False
) -> Iterator[Tensor]:
    """(F, H, W, 3) uint8 as batches (b, 3, size, size), normalised.

    Squashed, not cropped, so that all of the picture counts; bicubic without antialiasing, as InstructPix2Pix' metric has it.

    Args:
        crop: instead, the shorter side becomes `size` and the centre is kept, as VBench has it.
    """
    centre, spread = (torch.tensor(values, device=device)[:, None, None] for values in (mean, std))
    for start in range(0, len(frames), _BATCH):
        pixels = torch.from_numpy(frames[start : start + _BATCH].copy()).to(device).permute(0, 3, 1, 2).float() / 255
        sides = [size * side // min(pixels.shape[2:]) if crop else size for side in pixels.shape[2:]]
        small = torch.nn.functional.interpolate(pixels, size=sides, mode="bicubic", align_corners=False)
        top, left = (round((side - size) / 2) for side in sides)
        yield (small[:, :, top : top + size, left : left + size] - centre) / spread
