"""A micro-batch with its randomness, the same on every host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from byg_plugin import sampling
from byg_plugin.data.rules import ROLES
from byg_plugin.families.geometry import Geometry
from byg_plugin.objectives.base import Batch, Text, Words
from byg_plugin.objectives.draws import draw_t

if TYPE_CHECKING:
    from byg_plugin.config.objective import ObjectiveConfig


def draw_batch(
    objective: ObjectiveConfig,
    geometry: Geometry,
    source: Tensor,
    texts: Mapping[str, Text],
    rng: torch.Generator,
    device: torch.device,
    *,
    kind: str,
    high: bool | None = None,
    t: Tensor | None = None,
    target: Tensor | None = None,
    words: Sequence[Words] = (),
    beside: Mapping[str, Text] | None = None,
    updates: int | None = 0,
) -> Batch:
    """Noise, then t, then more noise, drawn on the CPU, which gives the same numbers for every device; everything on the device.

    Args:
        objective: the law of t, the rollout's nodes, and how many noises a step needs.
        geometry: the family's boundary and shift.
        source: latents (B, C, F, H, W).
        texts: the four roles, B of each.
        rng: of this micro-batch.
        device: where the networks are.
        kind: of the optimizer step, as the objective has planned it.
        high: the side of the experts' boundary on which t is drawn; None: both, or no experts.
        t: (B,) instead of a draw.
        target: the edited latents, where the objective takes them.
        words: the texts as they are written, of each sample.
        beside: one encoding, without batch, of each text that no tuple has.
        updates: as of `Batch`.
    """
    noise = torch.randn(source.shape, generator=rng)
    if t is None:
        t = draw_t(objective, len(source), rng, geometry.boundary, high)
    fresh = tuple(torch.randn(source.shape, generator=rng).to(device) for _ in range(objective.fresh_noises))
    nodes = None
    if objective.rollout is not None:
        nodes = sampling.sampling_nodes(geometry, *objective.rollout, tuple(source.shape)).to(device)
    return Batch(
        source=source.to(device),
        noise=noise.to(device),
        t=t.to(device),
        nodes=nodes,
        boundary=geometry.boundary,
        kind=kind,
        target=None if target is None else target.to(device),
        fresh=fresh,
        words=tuple(words),
        beside={name: _repeated(text, len(source), device) for name, text in (beside or {}).items()},
        updates=updates,
        **{role: {name: value.to(device) for name, value in texts[role].items()} for role in ROLES},
    )


def _repeated(text: Text, count: int, device: torch.device) -> Text:
    return {name: value.to(device).expand(count, *value.shape) for name, value in text.items()}
