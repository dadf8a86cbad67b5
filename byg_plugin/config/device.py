"""Where networks live."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> a device.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    import torch  # not above: edit.py's arguments are checked without it

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        built = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise ValueError(f'model.device = "cuda": {built}; install a CUDA build of torch, or set model.device = "cpu"')
    return torch.device("cuda" if name == "cuda" or (name == "auto" and available) else "cpu")
