"""What diffusers itself makes of a LoRA file: its own loader, run on a network that has the family's layers and no weights.

The loader's rules are many and differ between releases (converters, alphas by the most common one, PEFT's configuration in the
header), so it is asked instead of described. Imports diffusers and PEFT only here.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

Applied = tuple[Tensor, Tensor, float]
"""B (outputs, rank), A (rank, inputs) and what diffusers multiplies their product with."""


class Refused(Exception):
    """diffusers does not load the file; why."""


def missing() -> str | None:
    """What has to be installed before diffusers can be asked; None: nothing."""
    lacking = [name for name in ("diffusers", "peft") if importlib.util.find_spec(name) is None]
    are = "are" if len(lacking) > 1 else "is"
    return f"{' and '.join(lacking)} {are} not installed: pip install 'byg-plugin[diffusers]'" if lacking else None


def load(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, int]], loader: str
) -> dict[str, Applied]:
    """What `load_lora_weights` puts on each layer.

    Args:
        tensors: of the file, as stored.
        header: the `lora_adapter_metadata` of the file.
        shapes: (inputs, outputs) of every linear of the network, by diffusers' names.
        loader: the class of `diffusers.loaders` that loads it.

    Raises:
        Refused: the loader raises, or leaves a layer that cannot run.
    """
    from diffusers import loaders
    from peft.tuners.lora import LoraLayer

    network = _network(shapes)

    class Loader(getattr(loaders, loader)):  # type: ignore[misc]
        transformer = network
        text_encoder = None
        hf_device_map = None
        components: dict[str, Any] = {}

        @classmethod
        def lora_state_dict(cls, *args: Any, **options: Any) -> Any:
            # Of tensors in memory the loader knows no header; read from the file, it is the last of what it returns.
            return (*super().lora_state_dict(*args, **options)[:-1], None if header is None else dict(header))

        @classmethod
        def load_lora_into_text_encoder(cls, *args: Any, **options: Any) -> None:
            pass

    # Clones: a converter multiplies in place.
    with _silent("diffusers", "peft"), torch.no_grad():
        try:
            Loader().load_lora_weights({name: tensor.clone() for name, tensor in tensors.items()})
        except Exception as error:  # whatever it raises is the answer
            raise Refused(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    found: dict[str, Applied] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            (adapter,) = layer.lora_A
            up, down = (cast(Tensor, matrices[adapter].weight.data) for matrices in (layer.lora_B, layer.lora_A))
            if up.is_meta or down.is_meta:
                raise Refused(f"it finds no values for a matrix of {name}, and would fail when the network runs")
            found[name] = up, down, float(layer.scaling[adapter])
    return found


def _network(shapes: Mapping[str, tuple[int, int]]) -> Any:
    """A network of these linears that takes no memory."""
    from diffusers.configuration_utils import FrozenDict
    from diffusers.loaders.peft import PeftAdapterMixin

    class Network(nn.Module, PeftAdapterMixin):
        config = FrozenDict(image_dim=None)

    network = Network()
    for name, (inputs, outputs) in shapes.items():
        parent: nn.Module = network
        path = name.split(".")
        for child, following in pairwise(path):
            if child not in parent._modules:
                _add(parent, child, nn.ModuleList() if following.isdecimal() else nn.Module())
            parent = parent._modules[child]  # type: ignore[assignment]
        linear = nn.Linear(inputs, outputs, bias=False, device="meta")
        # One stored number: PEFT moves what it loads to the weight's device, and on meta nothing would be left of it.
        linear.weight = nn.Parameter(torch.zeros(1, 1).expand(outputs, inputs), requires_grad=False)
        _add(parent, path[-1], linear)
    return network


def _add(parent: nn.Module, name: str, child: nn.Module) -> None:
    """Numbers that no linear has (an activation's) are filled: PEFT takes what lies in a list by its index."""
    while isinstance(parent, nn.ModuleList) and len(parent) < int(name):
        parent.append(nn.Identity())
    parent.add_module(name, child)


@contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Without the loggers' own lines: what goes wrong is told in the report."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
