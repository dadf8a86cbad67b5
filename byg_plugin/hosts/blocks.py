"""Which modules of a network are its transformer blocks: they are recomputed, sharded and quantised; what lies outside is not."""

from __future__ import annotations

import re

from torch import nn

# The lists of diffusers' transformers: `transformer_blocks`, `single_transformer_blocks`, `blocks`; Z-Image's `layers` and refiners.
_LIST = r"(?:.*\.)?(?:\w*blocks|layers|\w+_refiner)"
_BLOCK, _INSIDE = re.compile(rf"{_LIST}\.\d+"), re.compile(rf"{_LIST}\.\d+\..+")


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The transformer blocks, in order."""
    return [module for name, module in network.named_modules() if _BLOCK.fullmatch(name)]


def linears_in_blocks(network: nn.Module) -> list[str]:
    """Names of the linears inside blocks (of nn.Linear itself, not of what is stored in 8 or 4 bits)."""
    return [name for name, module in network.named_modules() if type(module) is nn.Linear and _INSIDE.fullmatch(name)]


def depth_of(network: nn.Module) -> int:
    """How many blocks a token passes one after another: those in lists of the network itself."""
    return sum(
        bool(_BLOCK.fullmatch(f"{name}.0")) * len(child) for name, child in network.named_children() if isinstance(child, nn.ModuleList)
    )
