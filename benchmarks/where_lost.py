"""Where an editor of the tiny world loses its source: `python -m benchmarks.where_lost NAME=LORA.safetensors [NAME=LORA ...]`.

Held-out recoloured backgrounds, of which an editor must keep the objects. Its final latents are taken apart by what the exact edit does to
the pixels below each latent pixel: `kept` (nothing changes), `background` (everything does), `edges` (some). One part at a time is replaced
by the exact edit's latents, and the share of preserved sources is read again: the part that helps most is where it was lost. `copied`:
without any editor, the exact edit with the source's own latents in the kept part, which is what copying source tokens would give.

The exact edit's latents of kept objects are not the source's: the autoencoder's normalisation looks at the whole picture, so that another
background moves them all. `moved` is by how much, root mean square over the channels, median over latent pixels. A minute on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import tiny_world_run as runs
from benchmarks.direction import HARDLY, WHOLLY, changed_share
from benchmarks.editors import Editors, named_loras
from benchmarks.provenance import commit
from byg_plugin.demo import metrics, world

KIND = "recolour_background"
# What is exact in the editor's latents, in the order of the table.
EXACT: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "kept": ("kept",),
    "background": ("background",),
    "edges": ("edges",),
    "all but kept": ("background", "edges"),
}


def parts_of(before: np.ndarray, after: np.ndarray, side: int) -> dict[str, Tensor]:
    """uint8 (N, S, S, 3) of source and exact edit -> masks (N, 1, 1, side, side) of latent pixels; each lies in one part."""
    share = torch.from_numpy(changed_share(before, after, side))[:, None, None]
    kept, background = share < HARDLY, share > WHOLLY
    return {"kept": kept, "background": background, "edges": ~(kept | background)}


def replaced(latents: Tensor, exact: Tensor, parts: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Latents (N, C, 1, H, W) with those of `exact` in the named parts."""
    for name in names:
        latents = torch.where(parts[name], exact, latents)
    return latents


class Backgrounds:
    """Held-out edits of backgrounds, their latents and their parts."""

    def __init__(self, count: int):
        self.edits = [edit for edit in runs.eval_edits(2 * count, 2, "report", world.DEFAULT_TYPES) if edit.edit_type == KIND]
        before, after = (np.stack([world.render(getattr(edit, side)) for edit in self.edits]) for side in ("before", "after"))
        self.editors = Editors(self.edits)
        self.evaluator = self.editors.evaluator
        self.source, self.exact = self.evaluator.sources, self.evaluator.encoded(list(after))
        self.parts = parts_of(before, after, self.exact.shape[-1])

    def preserved(self, latents: Tensor) -> float:
        """Share of edits that keep their source, once decoded."""
        images = self.evaluator.decoded(latents)
        return float(np.mean([metrics.score(images[edit.id], edit).preserved for edit in self.edits]))

    def moved(self) -> dict[str, float]:
        """See the module."""
        distance = (self.exact - self.source).square().mean(1, keepdim=True).sqrt()
        return {name: distance[mask].median().item() for name, mask in self.parts.items()}

    def copied(self) -> float:
        """See the module."""
        return self.preserved(replaced(self.exact, self.source, self.parts, ("kept",)))

    def of_editor(self, lora: Path) -> dict[str, float]:
        """Share of preserved sources by what is exact."""
        latents = self.editors.latents(lora)
        return {name: self.preserved(replaced(latents, self.exact, self.parts, exact)) for name, exact in EXACT.items()}


def table(record: Mapping[str, Any]) -> str:
    """Percentages, a line an editor."""
    lines = ["| exact in the editor's latents: | " + " | ".join(EXACT) + " |", "|---" * (1 + len(EXACT)) + "|"]
    lines += [f"| {name} | {' | '.join(f'{100 * row[one]:.0f}' for one in EXACT)} |" for name, row in record["editors"].items()]
    return "\n".join(lines)


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loras", nargs="*", metavar="NAME=FILE", help="editors of the tiny world; none: what needs no editor")
    parser.add_argument("--edits", type=int, default=96, help="of backgrounds")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args()
    loras = named_loras(parser, options.loras)
    made_by, modified = commit("benchmarks/where_lost.py", "byg_plugin")
    backgrounds = Backgrounds(options.edits)
    editors = {name: backgrounds.of_editor(file) for name, file in loras.items()}
    record = {
        "commit": made_by,
        "modified": modified,
        "torch": torch.__version__,
        "edits": len(backgrounds.edits),
        "moved": backgrounds.moved(),
        "copied": backgrounds.copied(),
        "editors": editors,
    }
    print(table(record), end="\n\n")
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
