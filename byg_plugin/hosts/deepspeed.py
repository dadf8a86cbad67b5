"""DeepSpeed, started once."""

from __future__ import annotations

import os
from typing import Any

import torch


def start_deepspeed() -> Any:
    """The module `deepspeed` over the process group that there is."""
    assert torch.distributed.is_initialized(), "accelerate has made the process group"
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would warn that it found this out itself
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        # It would compile a shared-memory collective (40 s), of which nothing here has need.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
    return deepspeed
