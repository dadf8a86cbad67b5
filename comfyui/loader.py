"""A LoRA's tensors and a model's layers: what fits, in plain words. Nothing is half applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .card import SAMPLERS, Card, layer_of
from .families import Family, family_named

_NAMED = 4  # layers that a message names


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Of the layers of a file, by their names there.

    Attributes:
        loaded: those that the model has in their size.
        missing: those that it has not.
        sizes: those that it has in another size, with both sizes (rows, columns): the file's and the model's.
        damaged: those whose two matrices cannot be multiplied, or of which one is not there.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    sizes: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
    damaged: tuple[str, ...] = ()


def fit_of(shapes: Mapping[str, tuple[int, ...]], key_map: Mapping[str, Any], weights: Mapping[str, tuple[int, ...]]) -> Fit:
    """What a model would load of a file.

    Args:
        shapes: of the file's tensors.
        key_map: names that layers have in files -> ComfyUI's key of the weight, or (key, (dimension, start, length), ...) of a part.
        weights: ComfyUI's key -> shape.
    """
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes.items():
        layers.setdefault(layer_of(key), {})[key] = shape
    loaded, missing, sizes = [], [], {}
    damaged = [name for name, tensors in layers.items() if _is_damaged(*_matrices(tensors))]
    for name, tensors in layers.items():
        target = key_map.get(name)
        if target is None:
            missing.append(name)
            continue
        wanted, given = _weight_size(target, weights), _update_size(tensors)
        if given is None or given == wanted:
            loaded.append(name)
        else:
            sizes[name] = (given, wanted)
    return Fit(loaded=tuple(loaded), missing=tuple(missing), sizes=sizes, damaged=tuple(damaged))


def check_fit(fit: Fit, card: Card, file: str) -> None:
    """Refuse a LoRA that does not load whole.

    Raises:
        ValueError: layers are missing or of another size; says how many, and which come first.
    """
    total = len(fit.loaded) + len(fit.missing) + len(fit.sizes)
    if not total:
        raise ValueError(f"{file} has no tensors: download or convert it again")
    if fit.damaged:
        raise ValueError(
            f"{file} is damaged: of {len(fit.damaged)} of its layers one of the two matrices is missing or does not fit the other, e.g. "
            f"{fit.damaged[0]}. Download or convert it again"
        )
    if fit.sizes:
        name, (given, wanted) = next(iter(fit.sizes.items()))
        raise ValueError(
            f"{file} is for a {card.family} of another size: {len(fit.sizes)} of its {total} layers do not fit, e.g. {name} is "
            f"{given[0]} x {given[1]} and the model's {wanted[0]} x {wanted[1]}. Load the base that it was trained on"
            + (f" ({card.base})" if card.base else "")
        )
    if fit.missing:
        named = ", ".join(fit.missing[:_NAMED]) + (", ..." if len(fit.missing) > _NAMED else "")
        raise ValueError(
            f"{file}: {len(fit.missing)} of its {total} layers are not in the connected model and would be left out: {named}. Load the "
            "base that it was trained on, or convert the file with byg_plugin's convert_lora.py --to comfyui"
        )


def check_family(card: Card, architecture: str, file: str) -> Family:
    """The family of a card, if the model is of its kind.

    Raises:
        ValueError: it is not, or the family is unknown.
    """
    family = family_named(card.family)
    if family.architecture != architecture:
        raise ValueError(
            f"{file} was trained for {card.family}, and the connected model is of another kind ({architecture}): connect its base"
        )
    if card.position not in family.positions:
        raise ValueError(
            f"{file}: its card names position {card.position!r}, {card.family} has {', '.join(family.positions)}: update the nodes"
        )
    return family


def check_experts(card: Card, file: str, wanted: str) -> None:
    """Refuse one half of a pair for the other's network.

    Raises:
        ValueError: the file is for the other one.
    """
    if card.expert not in (None, "both", wanted):
        raise ValueError(
            f"{file} is the {_words(card.expert)} half of a pair and is loaded for the {_words(wanted)} network: exchange the two files"
        )


def check_mixture(loaded: Card | None, card: Card, file: str) -> None:
    """Refuse two edit LoRAs in one model that were trained otherwise.

    Args:
        loaded: the card that the model has already.
        card: of the next LoRA.
        file: the next LoRA's.

    Raises:
        ValueError: family, position or sampler differ.
    """
    if loaded is not None and kind(loaded) != kind(card):
        raise ValueError(f"{file} ({words(card)}) does not go with the LoRA that is loaded before it ({words(loaded)}): load one of them")


def kind(card: Card) -> tuple[str, str, str]:
    """What two LoRAs in one edit must have in common."""
    return card.family, card.position, card.sampler


def words(card: Card) -> str:
    """The same in words."""
    return f"{card.family}, {card.position}" + ("" if card.guided else f", {card.sampler} sampler")


def report(card: Card, family: Family, file: str, fit: Fit, strength: float, notes: Iterable[str] = ()) -> str:
    """What was loaded, and what to do with it."""
    base = f", base {card.base}" if card.base else ""
    steps = f" after {card.step} steps" if card.step is not None else ""
    lines = [
        f"{file}: trained for {card.family}{steps}{base}",
        f"{len(fit.loaded)} of {len(fit.loaded)} layers loaded, strength {strength:g}",
        f"position of the source: {card.position}",
    ]
    if card.family == "flux" and card.max_text_tokens is not None:
        lines.append(f"texts were padded to {card.max_text_tokens} tokens: min_length of T5TokenizerOptions")
    if not card.guided:
        lines.append(f"a few-step editor: sampler {SAMPLERS[card.sampler]}, {card.steps or 'a few'} steps, cfg 1")
    if strength == 0:
        lines.append("strength 0: the LoRA is WITHOUT EFFECT, this is the base model")
    if family.boundary is not None and card.expert == "high_noise":
        lines.append("it is the high-noise half of a pair: the low-noise network needs the other half (model_low, lora_low)")
    return "\n".join([*lines, *notes])


def _words(expert: str) -> str:
    return expert.replace("_", "-")


def _weight_size(target: Any, weights: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    key, part = (target, None) if isinstance(target, str) else (target[0], target[1] if len(target) > 1 else None)
    shape = list(weights[key])
    if part is not None:
        dimension, _, length = part
        shape[dimension] = length
    columns = 1
    for side in shape[1:]:
        columns *= side
    return shape[0], columns


def _update_size(tensors: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """(rows, columns) of the update that A and B of a layer make; None: they are not two matrices, and ComfyUI judges."""
    down, up = _matrices(tensors)
    if len(down) != 1 or len(up) != 1 or len(down[0]) != 2 or len(up[0]) != 2:
        return None
    return up[0][0], down[0][1]


def _matrices(tensors: Mapping[str, tuple[int, ...]]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Shapes of a layer's A and of its B; other kinds of layers have neither."""
    down = [shape for key, shape in tensors.items() if "lora_A" in key or "lora_down" in key]
    up = [shape for key, shape in tensors.items() if "lora_B" in key or "lora_up" in key]
    return down, up


def _is_damaged(down: list[tuple[int, ...]], up: list[tuple[int, ...]]) -> bool:
    if len(down) != len(up):
        return True
    return any(len(a) == len(b) == 2 and a[0] != b[1] for a, b in zip(down, up, strict=True))
