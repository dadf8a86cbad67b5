"""Weights under their authors' names, read piece by piece under diffusers' names: a fused tensor is never whole in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from byg_plugin.lora.layout import Linear
from byg_plugin.models import files


def read_native(
    weights: files.Weights,
    linears: Iterable[Linear],
    others: Iterable[tuple[str, str]],
    dtype: torch.dtype,
    *,
    kinds: Iterable[str],
    beside: Iterable[str] = (),
) -> dict[str, Tensor]:
    """diffusers' state dict of a file with native names.

    Args:
        weights: the file.
        linears: every linear of the network.
        others: (native, diffusers) names of every other tensor.
        dtype: of the result.
        kinds: of tensors that every linear has: weight, bias.
        beside: ends of the names of tensors that are of no use.

    Raises:
        ValueError: a tensor is missing, or one is there that the network does not have.
    """
    state: dict[str, Tensor] = {}
    used = set()
    for linear in linears:
        for kind in kinds:
            name = f"{linear.native}.{kind}"
            used.add(name)
            state |= _split(weights, name, linear, kind, dtype)
    for native, ours in others:
        name = saved_name(weights, native)
        used.add(name)
        state[ours] = weights.read(name, dtype)
    unknown = sorted(name for name in weights.names - used if not files.is_beside(name, (*files.BESIDE, *beside)))
    if unknown:
        network = files.PARTS[weights.part].label.removesuffix("'s transformer")
        raise weights.error(f"has {len(unknown)} tensors that {network} does not have, such as {', '.join(unknown[:3])}")
    return state


def saved_name(weights: files.Weights, name: str) -> str:
    """A tensor's name in this file: ComfyUI loads a norm's `scale` as its `weight`, and saves it so (0.33)."""
    saved = name.removesuffix(".scale") + ".weight"
    return saved if name.endswith(".scale") and saved in weights.names else name


def to_native(state: Mapping[str, Tensor], linears: Iterable[Linear], others: Iterable[tuple[str, str]]) -> dict[str, Tensor]:
    """The inverse: a diffusers state dict under native names."""
    native: dict[str, Tensor] = {}
    for linear in linears:
        for kind in ("weight", "bias"):
            if f"{linear.parts[0]}.{kind}" in state:
                rows = torch.cat([state[f"{part}.{kind}"] for part in linear.parts])
                native[f"{linear.native}.{kind}"] = _swap_halves(rows) if linear.swap else rows
    return native | {name: state[ours] for name, ours in others}


def _split(weights: files.Weights, name: str, linear: Linear, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    total = weights.shape(name)[0]
    if len(linear.parts) == 1:
        whole = weights.read(name, dtype)
        return {f"{linear.parts[0]}.{kind}": _swap_halves(whole) if linear.swap else whole}
    unit, remainder = divmod(total, sum(linear.widths))
    if remainder:
        network = files.PARTS[weights.part].label.removesuffix("'s transformer")
        raise ValueError(f"{weights.path}: {name} has {total} rows, which do not divide into {len(linear.parts)} parts of {network}")
    parts, start = {}, 0
    for part, width in zip(linear.parts, linear.widths, strict=True):
        parts[f"{part}.{kind}"] = weights.read(name, dtype, slice(start, start + width * unit))
        start += width * unit
    return parts


def _swap_halves(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])
