"""Optional packages: a missing one is an error that names its install line, before any model is loaded."""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.util import find_spec

from byg_plugin import families
from byg_plugin.config.sections import ModelConfig, TrainConfig


def require(package: str, why: str, extra: str, instead: str = "") -> None:
    """Check that a package can be imported.

    Raises:
        ValueError: it cannot; names `why` it is needed, the install line and what to do `instead`.
    """
    if find_spec(package) is None:
        install = f'pip install -e ".[{extra}]"'
        otherwise = f", or {instead}" if instead else ""
        raise ValueError(f"{why} needs {package}, which is not installed: in the folder of byg_plugin, {install}{otherwise}")


def numbers_of(package: str) -> tuple[int, ...]:
    """Of an installed package's version, three at most: of 0.19.8+cu12 (0, 19, 8)."""
    return tuple(int(part) for part in re.findall(r"\d+", version(package))[:3])


def require_model_extras(model: ModelConfig) -> None:
    """What loading and calling the configured model needs."""
    for package in ("diffusers", "transformers", "peft"):
        require(package, f'model.host = "{model.host}"', "diffusers")
    least = families.named(model.family).diffusers
    if numbers_of("diffusers")[:2] < least:
        raise ValueError(
            f"model.family = {model.family!r} on the embedded host needs diffusers {least[0]}.{least[1]} or later, and this is "
            f"{version('diffusers')} (musubi-tuner pins an earlier one): use another environment"
        )
    if model.quantization in ("int8", "nf4"):
        require("bitsandbytes", f'model.quantization = "{model.quantization}"', "bnb", 'set model.quantization = "fp8"')
    if model.attention == "xformers":
        require("xformers", 'model.attention = "xformers"', "xformers", 'set model.attention = "native"')


def require_training_extras(train: TrainConfig) -> None:
    """What training needs beyond the model."""
    if train.optimizer == "adamw8bit":
        require("bitsandbytes", 'train.optimizer = "adamw8bit"', "bnb", 'set train.optimizer = "adamw"')
    if train.tracker != "none":
        extra = {"tensorboard": "diffusers", "wandb": "wandb"}[train.tracker]
        require(train.tracker, f'train.tracker = "{train.tracker}"', extra, 'set train.tracker = "none"')
