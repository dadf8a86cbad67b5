"""DeepSpeed, started once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from typing import Any

import torch


def start_deepspeed() -> Any:
    """The module `deepspeed` over the process group that there is."""
    assert torch.distributed.is_initialized(), "accelerate has made the process group"
    _name_the_device()
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        # It would compile a shared-memory collective (40 s), of which nothing here has need.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return deepspeed


def check_zero(settings: Mapping[str, Any], origin: str) -> None:
    """By DeepSpeed's own rules, before anything is loaded.

    Args:
        settings: DeepSpeed's configuration, without "auto".
        origin: its file, for the message.

    Raises:
        ValueError: names the key and what DeepSpeed says of it.
    """
    _name_the_device()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**settings["zero_optimization"])
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise ValueError(f"{origin}: {key} = {first.get('input')!r}: {first['msg']}; mend it, or leave it out") from None


def can_use_nvme() -> bool:
    """Whether the machine has what DeepSpeed's file reader is compiled with at its first use."""
    _name_the_device()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(AsyncIOBuilder().is_compatible(verbose=False)) and all(map(shutil.which, ("ninja", "c++")))


def _name_the_device() -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would warn that it found this out itself
