"""What `accelerate launch` may ask of a host. What a host does not do is refused, not ignored."""

from __future__ import annotations

import os
from typing import Any

_BACKWARDS = "under which this objective's several backward passes go wrong: run plain multi-GPU (accelerate config)"
_REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", _BACKWARDS),
    "ACCELERATE_USE_FSDP": ("FSDP", _BACKWARDS),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron", _BACKWARDS),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo", "inside which the LoRA cannot be taken off: answer NO; on the musubi host set musubi.compile"),
}
_PLAIN = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU")


def check_launch(option: str, precision: str | None) -> None:
    """Before anything is loaded: what the launcher has left in the environment.

    Args:
        option: the name of the option that sets the mixed precision.
        precision: its value; None: it follows the launcher.

    Raises:
        ValueError: the launcher asks for something that is not done here.
    """
    for variable, (name, reason) in _REFUSED.items():
        if os.environ.get(variable, "").upper() not in ("", "0", "NO", "FALSE"):
            raise ValueError(f"accelerate launch asks for {name}, {reason}")
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", precision or asked):
        raise ValueError(
            f'accelerate launch asks for mixed precision "{asked}", {option} is "{precision}": set one of them to the other\'s value'
        )


def check_processes(accelerator: Any) -> None:
    """Once there is an accelerator, which knows more kinds of processes than the environment shows.

    Raises:
        ValueError: they are not plain ones.
    """
    kind = accelerator.distributed_type.value
    if kind not in _PLAIN:
        raise ValueError(f"accelerate launch asks for {kind}, {_BACKWARDS}")
