"""What a LoRA file is made of: linear layers with two names each, the matrices that adapt them, and how a family names its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from byg_plugin.families import LoraFormat

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """One native linear layer and the diffusers layers whose output rows it stacks.

    Attributes:
        native: module name in the layout of the model's authors; `{}` stands for the block's number.
        parts: diffusers module names, in the order of the stacked rows.
        widths: rows of each part as multiples of one unit; `sum(widths)` units are all rows.
        swap: the halves of the rows are exchanged (native: shift, scale; diffusers: scale, shift).
    """

    native: str
    parts: tuple[str, ...]
    widths: tuple[int, ...] = (1,)
    swap: bool = False

    def at(self, block: int) -> Linear:
        """The same layer of block number `block`."""
        return replace(self, native=self.native.format(block), parts=tuple(part.format(block) for part in self.parts))


@dataclass(frozen=True)
class Module:
    """One adapted layer of a file.

    Attributes:
        name: the key without its suffix, as it stands in the file.
        prefix: of the name, one that `formats.parse` knows.
        suffix: of the `down` tensor.
        linear: the fused native layer, or the one this layer is a part of.
        part: index among `linear.parts`; None when the file has the native layer.
        down: (rank, inputs).
        up: (outputs, rank).
        alpha: None where the file has none, which means the rank.
    """

    name: str
    prefix: str
    suffix: str
    linear: Linear
    part: int | None
    down: Tensor
    up: Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def parts(self) -> tuple[str, ...]:
        """The diffusers layers that it adapts."""
        return self.linear.parts if self.part is None else (self.linear.parts[self.part],)

    def rows_of_parts(self) -> dict[str, int]:
        """Rows of `up` by diffusers layer.

        Raises:
            ValueError: they do not divide among the parts of a fused layer.
        """
        widths, rows = self.linear.widths, self.up.shape[0]
        if self.part is not None:
            return {self.linear.parts[self.part]: rows}
        if rows % sum(widths):
            raise ValueError(f"{self.name} has {rows} rows, which do not divide among {len(widths)} layers")
        return {part: rows // sum(widths) * width for part, width in zip(self.linear.parts, widths, strict=True)}


@dataclass(frozen=True)
class Network:
    """The sizes that a family's authors publish.

    Attributes:
        name: for messages.
        blocks: how many there are, by the start of their layers' native names.
        shapes: (inputs, outputs) of the linears inside blocks, by the end of the native name.
    """

    name: str
    blocks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]

    def misfit(self, module: Module) -> str | None:
        """Why a file's layer is none of this network; None when it is, or lies outside the blocks."""
        native = module.linear.native
        start = next((start for start in self.blocks if native.startswith(start)), None)
        if start is None:
            return None
        if (block := int(native.split(".")[1])) >= self.blocks[start]:
            return f"{module.name} is in block {block}, and {self.name} has {self.blocks[start]} of these"
        inputs, outputs = next(shape for end, shape in self.shapes.items() if native.endswith(end))
        if module.part is not None:
            outputs = outputs // sum(module.linear.widths) * module.linear.widths[module.part]
        found = module.down.shape[1], module.up.shape[0]
        return None if found == (inputs, outputs) else f"{module.name} is {found[0]} -> {found[1]}, in {self.name} {inputs} -> {outputs}"

    def filled_by(self, modules: Sequence[Module]) -> bool:
        """Whether the last block of each kind of which the file has layers is the network's last."""
        for start, count in self.blocks.items():
            numbers = [int(module.linear.native.split(".")[1]) for module in modules if module.linear.native.startswith(start)]
            if numbers and max(numbers) + 1 != count:
                return False
        return True


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the layers of a LoRA are named, and what the tools make of these names; a new one is a line in `layouts`.

    Attributes:
        name: a value of `FamilySpec.lora_layout`.
        find_native: the fused layer with a native name, dotted or flattened with `_`; None for a foreign name.
        find_part: (fused layer, index of the part) of a diffusers name, likewise.
        linears: every linear of the largest network.
        networks: the published ones.
        blocks: name starts of the native layers inside blocks, the only ones musubi's networks cover.
        pattern: found in a file's keys, it tells this layout from every other; None: taken where no other is found.
        native_prefixes: starts of keys under which native names stand where others have diffusers' names alone.
        peft: the formats that are written as A and B without alpha; the rest as down, up and alpha.
        written: the format of the files that training writes.
        pairs: whether two files can be the LoRA of two experts.
        in_diffusers: (a layer, every layer of the file) -> why diffusers would not load it; None when it would.
        part_prefixes: starts of keys under which diffusers' names stand where others have native names alone; with `lora_unet_`,
            musubi-tuner's network has diffusers' layers, not the fused ones.
        parts_in_comfyui: why ComfyUI does not read the diffusers names; None: it does.
        loader: diffusers' loader, a class of `diffusers.loaders`.
        runtime: whether a tool runs edits as it ships, by `conditioning.position` and tool.
    """

    name: str
    find_native: Callable[[str], Linear | None]
    find_part: Callable[[str], tuple[Linear, int] | None]
    linears: Callable[[], Iterable[Linear]]
    networks: tuple[Network, ...]
    blocks: tuple[str, ...]
    pattern: re.Pattern[str] | None = None
    native_prefixes: tuple[str, ...] = ()
    peft: tuple[LoraFormat, ...] = ("diffusers",)
    written: LoraFormat = "diffusers"
    pairs: bool = False
    in_diffusers: Callable[[Module, Sequence[Module]], str | None]
    part_prefixes: tuple[str, ...] = ()
    parts_in_comfyui: str | None = None
    loader: str
    runtime: Mapping[tuple[str, LoraFormat], str]
