"""The LoRA files that a run starts from: `lora.init_from` and `lora.other_expert`, checked before a model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor

from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.files import naming, read_lora
from byg_plugin.lora.formats import convert, read_named

if TYPE_CHECKING:
    from byg_plugin.config.sections import ConditioningConfig, Config, LoraConfig

logger = logging.getLogger(__name__)


def check_start(config: Config, layout: Callable[[], Mapping[str, Mapping[str, tuple[int, ...]]]] | None) -> None:
    """Read what `[lora]` names and drop it: loading the models takes minutes, and only then is it read to be used.

    Args:
        config: the whole configuration.
        layout: names and shapes of each adapter's parameters, e.g. of `hosts.adapter_shapes`, which is asked where they may be wrong;
            None: a resumed run, which needs no `lora.init_from`, and whose checkpoint has told.

    Raises:
        ValueError: see `read_init`, `read_other_expert`, `refuse_misfit` and `layout`.
    """
    if layout is not None and (config.lora.targets or config.lora.init_from):
        for shapes in layout().values():
            if config.lora.init_from:
                tensors = own_part(config.lora, read_init(config, tell=False), shapes)
                with fitting(config.lora, "init_from"):
                    refuse_misfit(tensors, shapes)
    if config.lora.other_expert:
        read_other_expert(config, tell=False)


def refuse_misfit(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Tensors of a LoRA must be a network's parameters, by our names.

    Raises:
        ValueError: some are missing, unknown or of another shape.
    """
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unknown:
        raise ValueError(
            f"this LoRA does not fit the model and lora.targets: {len(missing)} modules' tensors are missing (e.g. "
            f"{missing[:2]}), {len(unknown)} are unknown (e.g. {unknown[:2]}); set lora.targets to what it was trained with"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise ValueError(
                f"{name} has shape {tuple(tensors[name].shape)} in the LoRA and {tuple(shape)} here: "
                f"set lora.rank to the LoRA's rank, or use the model it was trained on"
            )


def read_init(config: Config, *, tell: bool = True) -> dict[str, Tensor]:
    """Tensors of `lora.init_from` by our names; `tell`: warn of another guidance.

    Raises:
        ValueError: it is unreadable, or was trained for another family or position.
    """
    assert config.lora.init_from is not None
    tensors, card = read_named(config.lora.init_from, config.model.family, "lora.init_from = ", alone=config.lora.experts)
    _check_trained_alike(config, "init_from", card)
    if tell:
        _report_other_guidance(config.conditioning, "init_from", card)
    return tensors


def own_part(lora: LoraConfig, tensors: Mapping[str, Tensor], names: Container[str]) -> dict[str, Tensor]:
    """Of a pair, an expert that is trained alone takes its own tensors, which `names` has."""
    return {name: tensor for name, tensor in tensors.items() if name in names or not lora.other_expert}


def read_other_expert(config: Config, *, tell: bool = True) -> dict[str, Tensor]:
    """Tensors of `lora.other_expert`, `transformer.<layer>.lora_A.weight`, whichever expert it is; `tell` as in `read_init`.

    Raises:
        ValueError: it is unreadable, was trained for another family or position, or is for the expert that is trained.
    """
    path = config.lora.other_expert
    assert path is not None
    with naming(path, "lora.other_expert = "):
        tensors, metadata = read_lora(path)
        card = LoraCard.from_metadata(metadata)
        _check_trained_alike(config, "other_expert", card)
        if tell:
            _report_other_guidance(config.conditioning, "other_expert", card)
        if card.expert == config.lora.experts:
            raise ValueError(f"{path} is for the {config.lora.experts} expert, which is the one that is trained")
        return convert(tensors, "diffusers", family=config.model.family)


@contextmanager
def fitting(lora: LoraConfig, key: str) -> Iterator[None]:
    """What does not fit the network says whose tensors they are: those of `lora.init_from` or `lora.other_expert`."""
    with naming(getattr(lora, key), f"lora.{key} = "):
        yield


def _check_trained_alike(config: Config, key: str, card: LoraCard) -> None:
    """Family and position must be this run's."""
    path = getattr(config.lora, key)
    if card.family not in (None, config.model.family):
        raise ValueError(f"lora.{key} = {path} was trained for {card.family!r}, model.family is {config.model.family!r}")
    if card.position not in (None, config.conditioning.position):
        raise ValueError(
            f"lora.{key} = {path} was trained with conditioning.position = {card.position!r}, here it is "
            f"{config.conditioning.position!r}: set it to {card.position!r}"
        )


def _report_other_guidance(conditioning: ConditioningConfig, key: str, card: LoraCard) -> None:
    here = conditioning.guidance
    if card.guidance not in (None, here):
        logger.warning("lora.%s was trained with conditioning.guidance = %s, here it is %s", key, float(card.guidance), here)
