"""FlowEdit (Kulikov et al. 2024, arXiv 2412.08629, Algorithm 1): an edit by two captions, without inversion and without training.

The edit starts at the source and moves by the difference of two velocities: the target caption's at the noised edit and the source
caption's at the noised source, both noised alike. Of T steps the first T - n_max are left out; in the last n_min the edit is sampled by
the target caption alone, as in SDEdit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from byg_plugin import flow

Field = Callable[[Tensor, Tensor], Tensor]
"""(noisy (B, C, F, H, W), t (B,)) -> velocity `noise - data` under one caption and one guidance."""


@torch.no_grad()
def flowedit(
    source_field: Field,
    target_field: Field,
    source: Tensor,
    draw: Callable[[], Tensor],
    nodes: Tensor,
    *,
    n_max: int,
    n_min: int = 0,
    n_avg: int = 1,
    on_step: Callable[[], object] | None = None,
) -> Tensor:
    """The latents of the edit, like `source`.

    Args:
        source_field: the velocity under the source caption.
        target_field: the velocity under the target caption.
        source: (B, C, F, H, W) latents.
        draw: new standard normal noise like `source`, at each call.
        nodes: (T + 1,) falling from 1 to 0.
        n_max: steps that are made, counted from the end; T: all.
        n_min: of these the last ones that sample.
        n_avg: noises that the difference is averaged over.
        on_step: called T times.
    """
    steps = len(nodes) - 1
    assert 0 <= n_min <= n_max <= steps and n_max and n_avg > 0, (n_min, n_max, steps, n_avg)
    edit = source
    for left, s, s_next in zip(range(steps, 0, -1), nodes[:-1].tolist(), nodes[1:].tolist(), strict=True):
        t, t_next = (source.new_full((len(source),), value) for value in (s, s_next))
        if n_min < left <= n_max:
            changes = (_change(source_field, target_field, source, edit, draw(), t) for _ in range(n_avg))
            edit = flow.euler_step(edit, sum(changes, torch.zeros_like(source)) / n_avg, t, t_next)
        elif left <= n_min:
            if left == n_min:
                edit = flow.interpolate(source, draw(), t) + (edit - source)
            edit = flow.euler_step(edit, target_field(edit, t), t, t_next)
        if on_step is not None:
            on_step()
    return edit


def _change(source_field: Field, target_field: Field, source: Tensor, edit: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    noisy = flow.interpolate(source, noise, t)
    # In this order an edit that is the source still has the source's noisy latents to the last bit.
    return target_field(noisy + (edit - source), t) - source_field(noisy, t)
