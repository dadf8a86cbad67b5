"""How far a rollout's states are from the path they stand for, by solver, schedule and steps: `python -m benchmarks.rollout_error`.

The frozen tiny bases make pictures and clips of their captions, through the objective's own rollout (the network has no LoRA and no
source tokens). Error: ||state - reference|| / ||reference||, mean over the samples, of y_t at each sample's own t and of y_0. The
reference is Euler in many uniform steps. Prints a table and one JSON line last. Some minutes on one core.
"""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import ROOT
from byg_plugin import sampling
from byg_plugin.config.loading import load_config
from byg_plugin.config.sections import Config
from byg_plugin.data.rules import ROLES
from byg_plugin.demo import video_world, world
from byg_plugin.hosts.experts import by_expert
from byg_plugin.models import make_family
from byg_plugin.models.base import Family
from byg_plugin.objectives.base import Batch, Text
from byg_plugin.objectives.unpaired_cycle import UnpairedCycle
from byg_plugin.objectives.unpaired_cycle_config import UnpairedCycleConfig

BASES: dict[str, tuple[str, str, Any]] = {
    "flux": ("configs/demo.toml", "byg_plugin/demo/base", world.sample_split),
    "wan": ("configs/demo_video.toml", "byg_plugin/demo/video_base", video_world.sample_split),
}
STEPS = (5, 10, 20)


class Frozen:
    """The base as the field of a rollout: `velocity` takes a source and looks at none."""

    def __init__(self, family: Family):
        self.family, self.networks = family, dict(family.load_transformers(torch.float32))
        self.calls = 0

    @torch.inference_mode()
    def velocity(self, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        self.calls += 1
        experts, boundary = self.family.experts, self.family.boundary

        def call(high: bool, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
            return self.family.velocity(self.networks[experts[not high]], noisy, t, text, None)

        if boundary is None:
            return call(True, noisy, t, text, None)
        return by_expert(call, boundary, lambda: True, noisy, t, text, None)

    def ema(self) -> Any:
        return nullcontext(self.velocity)


def rolled(fields: Frozen, batch: Batch, steps: int, schedule: str, solver: str) -> tuple[Tensor, Tensor]:
    """(y_t, y_0) of the objective's own rollout."""
    nodes = sampling.sampling_nodes(fields.family, steps, schedule, tuple(batch.source.shape))
    objective = UnpairedCycle(UnpairedCycleConfig(rollout_steps=steps, rollout_solver=solver))  # type: ignore[arg-type]
    full = Batch(**{name: getattr(batch, name) for name in Batch.__slots__ if name != "nodes"}, nodes=nodes)
    y_t, y_0 = objective._rollout(fields, full, reverse=True)  # type: ignore[arg-type]
    assert y_0 is not None
    return y_t, y_0


def config_of(name: str) -> Config:
    """The recipe of a tiny base, without data."""
    toml, base, _ = BASES[name]
    paths = [f'{key}="x"' for key in ("dataset.tuples", "dataset.cache_dir", "output.dir")]
    return load_config(ROOT / toml, [f'model.path="{(ROOT / base).as_posix()}"', *paths])


def error(found: Tensor, reference: Tensor) -> float:
    difference, norm = ((x.flatten(1).norm(dim=1)) for x in (found - reference, reference))
    return (difference / norm).mean().item()


def measure(name: str, samples: int, reference_steps: int) -> list[dict[str, Any]]:
    """A row for each schedule, number of steps and solver."""
    split, config = BASES[name][2], config_of(name)
    family = make_family(config)
    captions = [edit.tgt_caption for edit in split(samples, 0, "rollout error")]
    text = family.encode_texts(family.load_text_encoders(torch.device("cpu")), captions)
    pixels = torch.zeros(1, 3, config.dataset.frames, config.dataset.resolution, config.dataset.resolution)
    shape = (samples, *family.encode_pixels(family.load_vae(torch.device("cpu")), pixels).shape[1:])
    rng = torch.Generator().manual_seed(0)
    noise, t = torch.randn(shape, generator=rng), torch.rand(samples, generator=rng)
    roles = dict.fromkeys(ROLES, text)
    batch = Batch(source=torch.zeros(shape), noise=noise, t=t, boundary=family.boundary, **roles)
    fields = Frozen(family)
    reference = rolled(fields, batch, reference_steps, "uniform", "euler")
    rows = []
    for schedule in ("uniform", "shifted"):
        for steps in STEPS:
            for solver in ("euler", "ab2"):
                fields.calls = 0
                found = rolled(fields, batch, steps, schedule, solver)
                assert fields.calls == steps, "a second-order step must cost no call more"
                y_t, y_0 = (error(a, b) for a, b in zip(found, reference, strict=True))
                rows.append({"base": name, "schedule": schedule, "steps": steps, "solver": solver, "y_t": y_t, "y_0": y_0})
    return rows


def main() -> None:
    """The command; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--reference-steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    options = parser.parse_args()
    rows = [row for name in BASES for row in measure(name, options.samples, options.reference_steps)]
    print("| base | schedule | steps | solver | y_t | y_0 |\n|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row['base']} | {row['schedule']} | {row['steps']} | {row['solver']} | {row['y_t']:.3f} | {row['y_0']:.3f} |")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
