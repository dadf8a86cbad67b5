"""Whether weights are numbers: every file of weights that is read is asked once, so that a NaN is named where it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. One pass, no copy of the tensor's size (but for fp8).

    Integers and booleans always are.
    """
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():
        return bool(torch.isfinite(tensor).all())
    if tensor.element_size() == 1:
        tensor = tensor.bfloat16()  # no kernels for fp8; bfloat16 holds each of its values, NaN and infinity too
    least, most = torch.aminmax(tensor)  # a NaN is both
    return math.isfinite(least.item()) and math.isfinite(most.item())


def first_not_finite(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str | None:
    """Name of the first tensor with a NaN or an infinity, None where there is none."""
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    return next((name for name, tensor in items if not is_finite(tensor)), None)


def refuse_not_finite(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], where: object, remedy: str) -> None:
    """Refuse weights with a NaN or an infinity.

    Args:
        tensors: names and tensors, as they stand in the file.
        where: the file, with its key before it where one names it.
        remedy: what to do, e.g. "download it again".

    Raises:
        ValueError: names file, tensor and remedy.
    """
    if (name := first_not_finite(tensors)) is not None:
        raise ValueError(f"{where}: tensor {name} holds NaN or infinite values; {remedy}")


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether `is_finite` holds for all of these floating-point tensors of one device. Fused, with one transfer: for every step."""
    if not tensors or bool(torch.stack(torch._foreach_norm(list(tensors))).isfinite().all()):
        return True
    # The squares of finite values may overflow.
    return all(is_finite(tensor) for tensor in tensors)


def not_finite(metrics: Mapping[str, Tensor]) -> list[str]:
    """Names of what is infinite or nan. One transfer for all: a read of each would wait for the device that many times a step."""
    finite = torch.stack([value.float() for value in metrics.values()]).isfinite().tolist()
    return [name for name, good in zip(metrics, finite, strict=True) if not good]
