"""One step of a row on the embedded host, with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import step_meters as meters
from benchmarks.step_rows import PAIRED, Row
from benchmarks.step_shapes import Shape
from byg_plugin import sampling, timesteps
from byg_plugin.config.loading import parse_config
from byg_plugin.config.objective import DEFAULT, ObjectiveConfig
from byg_plugin.config.sections import SECTIONS_OF_OBJECTIVES, Config
from byg_plugin.data.rules import ROLES
from byg_plugin.families.geometry import Geometry
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.hosts.sharding import Sharding
from byg_plugin.models.flux import FluxFamily
from byg_plugin.models.wan import WanFamily
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch, Text, Velocity
from byg_plugin.objectives.draws import draw_t
from byg_plugin.randomness import generator


class RandomFlux(FluxFamily):
    """FLUX with random weights, made on the device and in the dtype it runs in."""

    def __init__(self, config: Config, shape: Shape, device: torch.device):
        super().__init__(config)
        self._shape, self._device = shape, device

    def load_transformers(self, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
        from diffusers import FluxTransformer2DModel

        yield "transformer", random_network(FluxTransformer2DModel, self._shape.transformer, dtype, self._device)

    def meta_transformers(self) -> dict[str, nn.Module]:
        from diffusers import FluxTransformer2DModel

        return {"transformer": random_network(FluxTransformer2DModel, self._shape.transformer, torch.float32, torch.device("meta"))}


class RandomWan(WanFamily):
    """Both experts of Wan2.2 with random weights, made on the device and in the dtype they run in."""

    def __init__(self, config: Config, shape: Shape, device: torch.device):
        super().__init__(config)
        self._shape, self._device = shape, device
        if device.type == "meta":
            # Which expert serves a t depends on values, which the meta device has not. One costs what the other does.
            self.__dict__["boundary"] = None

    def load_transformers(self, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
        from diffusers import WanTransformer3DModel

        for expert in self.experts:
            yield expert, random_network(WanTransformer3DModel, self._shape.transformer, dtype, self._device)


def random_network(kind: Any, arguments: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A frozen network of the class `kind`; the same weights at every call."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            network: nn.Module = kind(**arguments)
    finally:
        torch.set_default_dtype(before)
    return network.eval().requires_grad_(False)


class StepHost(DiffusersHost):
    """The project's host, whose rows can be chosen between steps; also the frozen passes as others make them."""

    row: Row = PAIRED

    def choose(self, row: Row, checkpointing: bool) -> None:
        """Make the next steps this row's."""
        self.row = row
        section = SECTIONS_OF_OBJECTIVES[row.objective.get("name", DEFAULT)]
        self.config = self.config.model_copy(update={"objective": section(**row.objective)})
        for network in self.networks.values():
            network.enable_gradient_checkpointing() if checkpointing else network.disable_gradient_checkpointing()

    @contextmanager
    def base(self) -> Iterator[Velocity]:
        makers = {"bare": super().base, "switch": self._switched_off, "scaled": self._scaled_to_zero}
        with makers[self.row.base]() as velocity:
            yield velocity

    def _without_gradient(self) -> Any:
        return super()._without_gradient() if self.row.inference_mode else torch.no_grad()

    @contextmanager
    def _switched_off(self) -> Iterator[Velocity]:
        for layer in self._lora_layers:
            layer._disable_adapters = True
        with self._without_gradient():
            yield self._base_velocity
        for layer in self._lora_layers:
            layer._disable_adapters = False

    @contextmanager
    def _scaled_to_zero(self) -> Iterator[Velocity]:
        self.set_strength(0.0)
        with self._without_gradient():
            yield self._base_velocity
        self.set_strength(1.0)


def make_host(shape: Shape, device: torch.device, sharding: Sharding | None = None) -> StepHost:
    """A host of this shape whose LoRA is awake, with EMA weights that differ from the live ones."""
    config = parse_config(
        {
            "model": {"family": shape.family, "dtype": shape.dtype, "gradient_checkpointing": False},
            "dataset": {"tuples": "unused", "cache_dir": "unused"},
            "conditioning": {"max_text_tokens": shape.text_tokens},
            "lora": {"rank": shape.rank, "targets": shape.targets} if shape.targets else {"rank": shape.rank},
            "train": {"steps": 1, "batch_size": shape.batch, "global_batch_size": shape.batch, "mixed_precision": shape.mixed_precision},
            "output": {"dir": "unused"},
        }
    )
    family = RandomWan if shape.family.startswith("wan") else RandomFlux
    host = StepHost(config, family(config, shape, device), device, sharding=sharding)
    rng = torch.Generator().manual_seed(1)
    for name, parameter in host.parameters.items():
        if ".lora_B." in name:
            parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=rng))
    host.ema_weights.load({name: 0.9 * p.detach() for name, p in host.parameters.items()})
    return host


def rollout_nodes(shape: Shape, objective: ObjectiveConfig, geometry: Geometry) -> Tensor:
    """(n + 1,) of a row's rollout, on the CPU; an objective without rollouts has the shape's, unread."""
    steps, schedule = objective.rollout or (shape.rollout_steps[0], "uniform")
    return sampling.sampling_nodes(geometry, steps, schedule, (shape.batch, 16, shape.frames, shape.side, shape.side))


_DRAWS = 2**15


def expected_calls(shape: Shape, objective: ObjectiveConfig, geometry: Geometry) -> float:
    """Mean calls of a rollout that ends at the last t of its batch, over the recipe's law of t (on the side that the shape trains)."""
    nodes = rollout_nodes(shape, objective, geometry)
    high = None if geometry.boundary is None else shape.t[0] >= geometry.boundary
    t = draw_t(objective, _DRAWS * shape.batch, generator(0, "t of the step benchmark", 0), geometry.boundary, high)
    return timesteps.nodes_through(nodes, t)[1].view(_DRAWS, shape.batch).amax(dim=1).double().mean().item()


def rollout_share(shape: Shape, objective: ObjectiveConfig, geometry: Geometry, calls: int) -> float:
    """What a step pays of a measured rollout of `calls` calls, on average.

    One that ended at the shape's t stands for those that end at every t of the law.
    """
    assert objective.rollout is not None
    whole = calls == objective.rollout[0]
    return 1.0 if whole else expected_calls(shape, objective, geometry) / calls


def times(shape: Shape) -> Tensor:
    """(B,), on the CPU."""
    return torch.linspace(*shape.t, shape.batch)


def make_batch(shape: Shape, kind: str, nodes: Tensor, device: torch.device, boundary: float | None = None) -> Batch:
    """Random latents and texts; every t differs. `nodes` and `boundary` (of experts) are the rollout's."""
    rng = torch.Generator().manual_seed(2)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng).to(device)

    network = shape.transformer

    def text() -> dict[str, Tensor]:
        if shape.family.startswith("wan"):
            return {"umt5": normal(shape.batch, shape.text_tokens, network["text_dim"])}
        widths = network["joint_attention_dim"], network["pooled_projection_dim"]
        return {"t5": normal(shape.batch, shape.text_tokens, widths[0]), "pooled": normal(shape.batch, widths[1])}

    latents = (shape.batch, 16, shape.frames, shape.side, shape.side)
    texts = {role: text() for role in ROLES}
    return Batch(
        source=normal(*latents),
        noise=normal(*latents),
        target=normal(*latents),
        t=times(shape).to(device),
        nodes=nodes.to(device),
        boundary=boundary,
        kind=kind,
        **texts,
    )


def inputs(batch: Batch) -> list[Tensor]:
    """All tensors of a batch."""
    texts = [value for role in ROLES for value in getattr(batch, role).values()]
    latents = [batch.source, batch.noise, batch.target, batch.t, batch.nodes]
    return texts + [tensor for tensor in latents if tensor is not None]


class MarkedFields:
    """The host's fields; a meter's lap ends with the rollout and with the frozen passes."""

    def __init__(self, host: StepHost, meter: meters.Meter):
        self.edit = host.edit
        self.rollout_calls = 0
        self._host, self._meter = host, meter

    @contextmanager
    def ema(self) -> Iterator[Velocity]:
        with self._host.ema() as velocity:

            def counted(noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
                self.rollout_calls += 1
                return velocity(noisy, t, text, source)

            yield counted
        self._meter.lap("rollout")

    @contextmanager
    def base(self) -> Iterator[Velocity]:
        with self._host.base() as velocity:
            yield velocity
        self._meter.lap("frozen passes")


def differentiated(row: Row) -> list[str]:
    """Names of the passes that a step differentiates, in its order."""
    if row.objective.get("name") == "paired":
        return ["paired"]
    left_out = row.kind.split("-")[1:]
    passes = [name for name in ("identity", "reverse", "forward") if name not in left_out]
    if row.objective["graph"] == "joint":
        return [", ".join(passes)]
    if row.objective.get("merge_identity") and not left_out:
        return ["identity + reverse", "forward"]
    return passes


def step(host: StepHost, batch: Batch, meter: meters.Meter) -> int:
    """One step of the host's row, without optimizer, marked on the meter; adds to the gradients. Gives the calls of its rollout."""
    passes = iter(differentiated(host.row))

    def backward(loss: Tensor, *, last: bool) -> float:
        loss.backward()
        meter.lap(next(passes))
        return 1.0

    meter.begin()
    fields = MarkedFields(host, meter)
    make_objective(host.config.objective).step(fields, batch, backward)
    left = list(passes)
    assert not left, f"never differentiated: {left}"
    return fields.rollout_calls
