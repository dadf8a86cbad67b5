"""The embedded host on a tiny FLUX, as several tests set it up and compare it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byg_plugin import timesteps
from byg_plugin.config.sections import Config
from byg_plugin.data.rules import ROLES
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.models import flux_files
from byg_plugin.models.flux import FluxFamily
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch
from tests.support.tiny import model_folder, tiny_config, tiny_texts


def host_config(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    model = {"path": str(model_folder())} | sections.pop("model", {})
    return tiny_config(tmp_path, model=model, **sections)


def batch_of(size: int = 2, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    shape = (size, 16, 1, 8, 8)
    texts = {role: tiny_texts(size, 10 + i) for i, role in enumerate(ROLES)}
    return Batch(
        source=torch.randn(shape, generator=rng),
        noise=torch.randn(shape, generator=rng),
        t=torch.linspace(0.31, 0.83, size),
        nodes=timesteps.uniform_nodes(3),
        **texts,
    )


def without_lora(batch: Batch) -> Tensor:
    """The velocity of the very network that the host loads, made by code that knows no LoRA."""
    config = tiny_config(Path("unused"), model={"path": str(model_folder())})
    network = flux_files.TRANSFORMER.load(model_folder(), dtype=torch.float32)
    with torch.no_grad():
        return FluxFamily(config).velocity(network, batch.noise, batch.t, batch.src_caption, None)


def base_of(host: DiffusersHost, batch: Batch) -> Tensor:
    with host.base() as velocity:
        return velocity(batch.noise, batch.t, batch.src_caption, None)


def live_of(host: DiffusersHost, batch: Batch) -> Tensor:
    with host.live() as velocity:
        return velocity(batch.noise, batch.t, batch.src_caption, None)


def ema_of(host: DiffusersHost, batch: Batch) -> Tensor:
    with host.ema() as velocity:
        return velocity(batch.noise, batch.t, batch.src_caption, None)


def backward(loss: Tensor, *, last: bool) -> float:
    loss.backward()
    return 1.0


def gradients(host: DiffusersHost) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in host.parameters.items() if p.grad is not None}
    for parameter in host.parameters.values():
        parameter.grad = None
    assert found, "nothing got a gradient"
    return found


def relative_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12)).item() for n in a)


def step_gradients(host: DiffusersHost, objective: dict[str, Any], accumulation: int = 1) -> dict[str, Tensor]:
    config = host.config.objective.model_copy(update=objective)
    for micro in range(accumulation):

        def scaled(loss: Tensor, *, last: bool) -> float:
            (loss / accumulation).backward()
            return 1 / accumulation

        make_objective(config).step(host, batch_of(seed=micro), scaled)
    return gradients(host)
