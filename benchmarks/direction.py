"""Where the frozen base says that an edit belongs, by time and type of edit: `python -m benchmarks.direction`.

At noisy states of the source and of the exact edit in the tiny world, the direction v_tgt - v_src of the frozen base (the prior of
section 4.2) is held against what the edit really changes. `strength`: root mean square of the direction over the channels, mean of the 2 %
of latent pixels where it is largest, over that of v_src over the whole latent; median over the edits. `located`: the chance that a latent
pixel which the edit changes has a stronger direction than one which it does not touch (1: exact, 0.5: by chance), mean over the edits.
At the exact edit's states also the cosine of the directional loss (Eq. 2) that a velocity has which leads to that edit, and one which leads
to the same picture blurred: what the loss says of lost detail. Prints two tables and one JSON line last. A minute on one core.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from benchmarks.provenance import commit
from benchmarks.rollout_error import Frozen, config_of
from byg_plugin import flow
from byg_plugin.demo import world
from byg_plugin.models import make_family
from byg_plugin.models.base import Family
from byg_plugin.objectives.base import Text

TIMES = (0.15, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95)
STATES = ("source", "edit")
CHANGED = 8  # of 255: less is rounding
WHOLLY, HARDLY = 0.9, 0.01  # changed is a latent pixel of a larger share, untouched one of a smaller
STRONGEST = 0.02
BLUR = 3.0  # of a Gaussian, in pixels


def cells(change: np.ndarray, side: int) -> np.ndarray:
    """Share of changed pixels (N, S, S) in each latent pixel, (N, side, side)."""
    of = change.shape[-1] // side
    return change.reshape(len(change), side, of, side, of).mean((2, 4))


def changed_share(before: np.ndarray, after: np.ndarray, side: int) -> np.ndarray:
    """uint8 (N, S, S, 3) of source and exact edit -> share of changed pixels in each latent pixel, (N, side, side)."""
    return cells((np.abs(before.astype(int) - after).max(-1) > CHANGED).astype(float), side)


def located(strength: np.ndarray, share: np.ndarray) -> float | None:
    """Chance that a changed latent pixel is stronger than an untouched one (ties count half); None where there is no such pair."""
    inside, outside = strength[share > WHOLLY], strength[share < HARDLY]
    if not inside.size or not outside.size:
        return None
    above = inside[:, None] - outside[None]
    return float((above > 0).mean() + 0.5 * (above == 0).mean())


def strengths(direction: Tensor, v_src: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, 1, H, W) -> the direction's size by latent pixel (B, H, W), and of the strongest ones (B,), in units of v_src."""
    local = direction.square().mean(1).sqrt()[:, 0]
    count = max(1, round(STRONGEST * local[0].numel()))
    return local, local.flatten(1).topk(count, dim=1).values.mean(1) / v_src.square().flatten(1).mean(1).sqrt()


def measure(edits_per_type: int, types: Sequence[str] = tuple(world.EDIT_TYPES)) -> list[dict[str, Any]]:
    """A row for each state, type and time."""
    family, cpu = make_family(config_of("flux")), torch.device("cpu")
    fields, vae, encoders = Frozen(family), family.load_vae(cpu), family.load_text_encoders(cpu)
    rows = []
    for kind in types:
        edits = world.sample_split(edits_per_type, 0, "direction", (kind,))
        before = np.stack([world.render(edit.before) for edit in edits])
        after = np.stack([world.render(edit.after) for edit in edits])
        src = family.encode_texts(encoders, [edit.src_caption for edit in edits])
        tgt = family.encode_texts(encoders, [edit.tgt_caption for edit in edits])
        source, edit, blurry = (_encoded(family, vae, pixels) for pixels in (before, after, blurred(after)))
        share = changed_share(before, after, source.shape[-1])
        ends = {"exact": edit, "blurred": blurry}
        for state, clean in zip(STATES, (source, edit), strict=True):
            for t in TIMES:
                found = _at(fields, clean, t, src, tgt, share, ends if state == "edit" else {})
                rows.append({"state": state, "type": kind, "t": t, **found})
    return rows


def _encoded(family: Family, vae: torch.nn.Module, pixels: np.ndarray) -> Tensor:
    """uint8 (N, S, S, 3) -> latents."""
    return family.encode_pixels(vae, torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1)


def blurred(pixels: np.ndarray) -> np.ndarray:
    """uint8 (N, S, S, 3): colours and places are there, outlines are not."""
    return np.stack([np.asarray(Image.fromarray(one).filter(ImageFilter.GaussianBlur(BLUR))) for one in pixels])


def _at(fields: Frozen, clean: Tensor, t: float, src: Text, tgt: Text, share: np.ndarray, ends: Mapping[str, Tensor]) -> dict[str, float]:
    """Figures at one time; `cosine_NAME`: of the velocity that leads from the noisy state to `ends[NAME]`, mean over the edits."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    times = torch.full((len(clean),), t)
    noisy = flow.interpolate(clean, noise, times)
    v_src, v_tgt = (fields.velocity(noisy, times, text, None) for text in (src, tgt))
    local, strongest = strengths(v_tgt - v_src, v_src)
    found = [located(one.numpy(), cell) for one, cell in zip(local, share, strict=True)]
    cosines = {f"cosine_{name}": flow.cosine((noisy - end) / t - v_src, v_tgt - v_src)[0].mean().item() for name, end in ends.items()}
    placed = float(np.mean([value for value in found if value is not None]))
    return {"strength": strongest.median().item(), "located": placed, **cosines}


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """`strength / located` by time, and the cosine of the exact edit beside that of the blurred one."""
    places = [
        _line(rows, [state, kind], lambda row: f"{row['strength']:.2f} / {row['located']:.2f}", state=state, type=kind)
        for state in STATES
        for kind in _kinds(rows)
    ]
    cosines = [
        _line(rows, [kind], lambda row: f"{row['cosine_exact']:.2f} / {row['cosine_blurred']:.2f}", state="edit", type=kind)
        for kind in _kinds(rows)
    ]
    times = [f"t = {t:g}" for t in TIMES]
    return ["\n".join([*_head("state", "edit", *times), *places]), "\n".join([*_head("edit", *times), *cosines])]


def _kinds(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["type"] for row in rows))


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _line(rows: list[dict[str, Any]], names: list[str], shown: Callable[[dict[str, Any]], str], **of: str) -> str:
    """A line of a table: the rows that have these values."""
    cells = [shown(row) for row in rows if all(row[key] == value for key, value in of.items())]
    return f"| {' | '.join([*names, *cells])} |"


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=32, help="of each type")
    parser.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    options = parser.parse_args()
    made_by, modified = commit("benchmarks/direction.py", "byg_plugin")
    rows = measure(options.edits)
    print(*tables(rows), sep="\n\n")
    record = {"commit": made_by, "modified": modified, "torch": torch.__version__, "edits": options.edits, "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
