"""Look-ups by either name of a network's linears: that of the model's authors ("native") and diffusers'. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from byg_plugin.lora.layout import Linear


class Names:
    """The linears of a network.

    Args:
        inside: those of blocks, with `{}` for the block's number.
        outside: the others.
    """

    def __init__(self, inside: Iterable[Linear], outside: Iterable[Linear]):
        self.inside, self.outside = tuple(inside), tuple(outside)
        every = (*self.inside, *self.outside)
        self._by_native = {name: linear for linear in every for name in (linear.native, linear.native.replace(".", "_"))}
        self._by_part = {
            name: (linear, index) for linear in every for index, part in enumerate(linear.parts) for name in (part, part.replace(".", "_"))
        }
        starts = {name.partition("{}")[0] for linear in self.inside for name in (linear.native, *linear.parts)}
        # The longest first: one may begin like another.
        either = "|".join(re.escape(start).replace(r"\.", "[._]") for start in sorted(starts, key=len, reverse=True))
        self._number = re.compile(rf"^({either})(\d+)(?=[._])")

    def _template(self, name: str) -> tuple[str, int]:
        """`double_blocks.7.img_mod.lin` -> (`double_blocks.{}.img_mod.lin`, 7); block 0 for names without a number."""
        match = self._number.match(name)
        return (f"{match[1]}{{}}{name[match.end() :]}", int(match[2])) if match else (name, 0)

    def find_native(self, name: str) -> Linear | None:
        """The linear with this native module name, dotted or with `_` for every dot; None for other names."""
        template, block = self._template(name)
        linear = self._by_native.get(template)
        return linear.at(block) if linear else None

    def find_part(self, name: str) -> tuple[Linear, int] | None:
        """(linear, index among its parts) of a diffusers module name, dotted or with `_` for dots; None for other names."""
        template, block = self._template(name)
        found = self._by_part.get(template)
        return (found[0].at(block), found[1]) if found else None

    def linears(self, blocks: Mapping[str, int]) -> Iterator[Linear]:
        """Every linear of a network with so many blocks, by the start of their native names."""
        yield from self.outside
        for start, count in blocks.items():
            for block in range(count):
                yield from (linear.at(block) for linear in self.inside if linear.native.startswith(start))
