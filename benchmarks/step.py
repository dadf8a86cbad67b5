"""What one unpaired step costs over one paired step: seconds, FLOPs and peak memory, phase by phase.

    python -m benchmarks.step --out benchmarks/results/step_cpu.json          on a quiet machine, else --clock process --threads 1
    python -m benchmarks.step --shape demo                                     the demo's own network and batch
    python -m benchmarks.step --shape wan-high --out benchmarks/results/step_wan_high.json    either expert of a two-expert Wan: wan-low
    python -m benchmarks.step --shape flux.1-dev --device cuda --repeats 3 --out benchmarks/results/step_cuda.json
    python -m benchmarks.step --shape flux.1-dev --device meta --out benchmarks/results/step_flux_flops.json    FLOPs alone, no weights
    python -m benchmarks.step --shape wan2.2-t2v-a14b --device meta --out benchmarks/results/step_wan_flops.json
    python -m benchmarks.step --table benchmarks/results/step_cpu.json        the tables, from the results alone
    python -m benchmarks.step --write-docs                                    the documents' tables, from benchmarks/results

Run it from the repository's root. Network, batch and machine are the same for every row; weights are random. The rows of a
repetition are timed one after another, with paired steps between them, and a row's ratio is taken over the paired steps of the
same repetition: a machine that slows down slows both sides. The optimizer's and the EMA's update are timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import provenance
from benchmarks import step_meters as meters
from benchmarks import step_report as report
from benchmarks.provenance import ROOT
from byg_plugin import _cli, timesteps
from byg_plugin.config.loading import load_config, parse_config
from byg_plugin.config.objective import DEFAULT
from byg_plugin.config.sections import SECTIONS_OF_OBJECTIVES, Config
from byg_plugin.data.rules import ROLES
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.models import flux_files, wan, wan_files
from byg_plugin.models.flux import FluxFamily
from byg_plugin.models.wan import WanFamily
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch, Velocity

# --- what is measured ---


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A network and its inputs."""

    transformer: dict[str, Any]
    """Arguments of diffusers' FluxTransformer2DModel or WanTransformer3DModel."""
    side: int
    """Height and width of the latents; noisy tokens, and source tokens, are a quarter of its square a frame."""
    family: str = "flux"
    frames: int = 1
    """Of the latents."""
    t: tuple[float, float] = (0.4, 0.7)
    """What a step's times lie between: of two experts, they choose the one that is trained."""
    text_tokens: int
    rank: int
    batch: int = 1
    targets: str | None = None
    dtype: str = "float32"
    mixed_precision: str = "no"
    rollout_steps: tuple[int, int] = (10, 5)
    """Of the ladder, and of the shorter rollout beside it."""
    checkpointing: tuple[bool, ...] = (False, True)


def shape_named(name: str) -> Shape:
    """A shape of SHAPES.

    `cpu` keeps FLUX.1-dev's proportions at 512 px (double to single blocks, tokens to width, text to image tokens, rank to
    width) at a size where matrix products dominate a CPU's step. `demo` is the tiny world's base under configs/demo.toml. `wan-high`
    and `wan-low` train one or the other of two Wan experts; the rollout runs through both.
    """
    if name == "cpu":
        return Shape(transformer=_flux(2, 4, heads=3, head=128, text=512, pooled=96), side=22, text_tokens=60, rank=8)
    if name == "tiny":
        transformer = _flux(1, 2, heads=2, head=16, text=24, pooled=20) | {"axes_dims_rope": (4, 6, 6)}
        return Shape(transformer=transformer, side=8, text_tokens=6, rank=4, batch=2, rollout_steps=(4, 2))
    if name == "demo":
        paths = [f"{key}=unused" for key in ("dataset.tuples", "dataset.cache_dir", "output.dir", "model.path")]
        demo = load_config(ROOT / "configs/demo.toml", paths)
        folder = ROOT / "byg_plugin/demo/base"
        base = json.loads((folder / "transformer/config.json").read_text(encoding="utf-8"))
        return Shape(
            transformer=_arguments(base),
            side=demo.dataset.resolution // flux_files.vae_downsampling(folder / "vae"),
            text_tokens=demo.conditioning.max_text_tokens,
            rank=demo.lora.rank,
            batch=demo.train.batch_size,
            targets=demo.lora.targets,
            checkpointing=(False,),
        )
    if name in ("wan-high", "wan-low"):
        return Shape(
            transformer=_wan(4, heads=3, head=128, ffn=1024, text=128), side=16, frames=3, text_tokens=64, rank=8, **WAN_SIDES[name[4:]]
        )
    if name == "wan-tiny":
        transformer = _wan(2, heads=2, head=12, ffn=32, text=24)
        return Shape(transformer=transformer, side=4, frames=2, text_tokens=6, rank=4, batch=2, rollout_steps=(4, 2), **WAN_SIDES["low"])
    if name == "wan2.2-t2v-a14b":
        return Shape(
            transformer=_arguments(wan_files.shipped_config("transformer")),
            side=64,
            frames=9,
            text_tokens=512,
            rank=64,
            dtype="bfloat16",
            mixed_precision="bf16",
            checkpointing=(True,),
            **WAN_SIDES["low"],
        )
    assert name == "flux.1-dev", name
    return Shape(
        transformer=_arguments(flux_files.shipped_config("transformer")),
        side=64,
        text_tokens=512,
        rank=64,
        dtype="bfloat16",
        mixed_precision="bf16",
        checkpointing=(True,),
    )


SHAPES = ("cpu", "demo", "flux.1-dev", "tiny", "wan-high", "wan-low", "wan-tiny", "wan2.2-t2v-a14b")
WAN_SIDES: dict[str, dict[str, Any]] = {
    "high": {"family": "wan2.2-t2v-a14b", "t": (0.9, 0.97)},
    "low": {"family": "wan2.2-t2v-a14b", "t": (0.4, 0.7)},
}


def _flux(double: int, single: int, *, heads: int, head: int, text: int, pooled: int) -> dict[str, Any]:
    return {
        "in_channels": 64,
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "pooled_projection_dim": pooled,
        "guidance_embeds": True,
    }


def _wan(layers: int, *, heads: int, head: int, ffn: int, text: int) -> dict[str, Any]:
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head, "ffn_dim": ffn, "text_dim": text}
    return {"in_channels": 16, "out_channels": 16, "freq_dim": 64, **sizes}


def _arguments(saved: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in saved.items() if not key.startswith("_")}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of making a step."""

    name: str
    title: str
    objective: dict[str, Any] = field(default_factory=dict)
    base: str = "bare"
    """The frozen passes: LoRA `scaled` by 0, PEFT's `switch`, or the `bare` linears (the project's way)."""
    inference_mode: bool = True
    """Of the passes without gradient."""


PAIRED = Row(name="paired", title="paired step (Eq. 1)", objective={"name": "paired"})


def ladder(steps: int) -> list[Row]:
    """From Algorithm 1 as one would write it to the cheapest exact step; each row adds to the one before."""
    first = {"graph": "joint", "frozen_batch": 1, "rollout_weights": "swap", "rollout_steps": steps}
    rows = [
        Row(
            name="printed",
            title="Algorithm 1 as printed: one graph, LoRA scaled by 0 in the base",
            base="scaled",
            inference_mode=False,
            objective=first,
        )
    ]

    def add(name: str, title: str, objective: dict[str, Any] | None = None, **changes: Any) -> None:
        rows.append(replace(rows[-1], name=name, title=title, objective=rows[-1].objective | (objective or {}), **changes))

    add("sequential", "one pass's graph at a time", {"graph": "sequential"})
    add("switch", "base with PEFT's switch: no LoRA products", base="switch")
    add("bare", "base on its own linears: no PEFT layers", base="bare")
    add("inference", "passes without gradient in inference mode", inference_mode=True)
    add("frozen 2", "frozen passes two at once (the defaults)", {"frozen_batch": 2})
    add("frozen 4", "frozen passes all four at once", {"frozen_batch": 4})
    add("merged", "rollout on merged weights", {"rollout_weights": "merged"})
    add("beside", "identity beside the reverse pass", {"merge_identity": True})
    return rows


LADDER = tuple(row.name for row in ladder(10))
RECOMPUTED = ("paired", "printed", "frozen 2", "merged", "beside", "default, fewer", "merged, fewer")
"""Rows that are also measured with recomputed activations, where a shape has both."""


def all_rows(shape: Shape) -> list[Row]:
    """The paired step, the ladder, and what stands beside it."""
    steps, fewer = shape.rollout_steps
    rungs = {row.name: row for row in ladder(steps)}

    def beside(name: str, title: str, of: str, objective: dict[str, Any] | None = None, **changes: Any) -> Row:
        return replace(rungs[of], name=name, title=title, objective=rungs[of].objective | (objective or {}), **changes)

    return [
        PAIRED,
        *rungs.values(),
        beside("default, fewer", f"the defaults with {fewer} rollout steps", "frozen 2", {"rollout_steps": fewer}),
        beside("merged, fewer", f"merged with {fewer} rollout steps", "merged", {"rollout_steps": fewer}),
    ]


def plan(shape: Shape) -> list[tuple[Row, bool]]:
    """(row, checkpointing) of everything that is measured, paired first."""
    rows = all_rows(shape)
    return [
        (row, checkpointing)
        for index, checkpointing in enumerate(shape.checkpointing)
        for row in rows
        if index == 0 or row.name in RECOMPUTED
    ]


# --- one step ---


class RandomFlux(FluxFamily):
    """FLUX with random weights, made on the device and in the dtype it runs in."""

    def __init__(self, config: Config, shape: Shape, device: torch.device):
        super().__init__(config)
        self._shape, self._device = shape, device

    def load_transformers(self, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
        from diffusers import FluxTransformer2DModel

        yield "transformer", _random(FluxTransformer2DModel, self._shape.transformer, dtype, self._device)


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
            yield expert, _random(WanTransformer3DModel, self._shape.transformer, dtype, self._device)


def _random(kind: Any, arguments: dict[str, Any], dtype: torch.dtype, device: torch.device) -> nn.Module:
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


def make_host(shape: Shape, device: torch.device) -> StepHost:
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
    host = StepHost(config, family(config, shape, device), device)
    rng = torch.Generator().manual_seed(1)
    for name, parameter in host.parameters.items():
        if ".lora_B." in name:
            parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=rng))
    host.ema_weights.load({name: 0.9 * p.detach() for name, p in host.parameters.items()})
    return host


def make_batch(shape: Shape, steps: int, device: torch.device) -> Batch:
    """Random latents and texts; every t differs."""
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
        t=torch.linspace(*shape.t, shape.batch).to(device),
        nodes=timesteps.uniform_nodes(steps).to(device),
        **texts,
    )


class MarkedFields:
    """The host's fields; a meter's lap ends with the rollout and with the frozen passes."""

    def __init__(self, host: StepHost, meter: meters.Meter):
        self.edit = host.edit
        self._host, self._meter = host, meter

    @contextmanager
    def ema(self) -> Iterator[Velocity]:
        with self._host.ema() as velocity:
            yield velocity
        self._meter.lap("rollout")

    @contextmanager
    def base(self) -> Iterator[Velocity]:
        with self._host.base() as velocity:
            yield velocity
        self._meter.lap("frozen passes")


def differentiated(objective: dict[str, Any]) -> list[str]:
    """Names of the passes that a step differentiates, in its order."""
    if objective.get("name") == "paired":
        return ["paired"]
    if objective["graph"] == "joint":
        return ["identity, reverse, forward"]
    return ["identity + reverse", "forward"] if objective.get("merge_identity") else ["identity", "reverse", "forward"]


def step(host: StepHost, batch: Batch, meter: meters.Meter) -> None:
    """One step of the host's row, without optimizer, marked on the meter; adds to the gradients."""
    passes = iter(differentiated(host.row.objective))

    def backward(loss: Tensor, *, last: bool) -> float:
        loss.backward()
        meter.lap(next(passes))
        return 1.0

    meter.begin()
    make_objective(host.config.objective).step(MarkedFields(host, meter), batch, backward)
    left = list(passes)
    assert not left, f"never differentiated: {left}"


# --- measuring ---


class Bench:
    """Everything that the rows share."""

    def __init__(self, shape: Shape, device: torch.device, clock: str = "wall"):
        self.shape, self.device, self.clock = shape, device, clock
        self.host = make_host(shape, device)
        self.optimizer = torch.optim.AdamW(self.host.parameters.values(), lr=1e-5)
        self.plan = plan(shape)

    def _choose(self, row: Row, checkpointing: bool) -> Batch:
        self.host.choose(row, checkpointing)
        return make_batch(self.shape, row.objective.get("rollout_steps", self.shape.rollout_steps[0]), self.device)

    def seconds(self, row: Row, checkpointing: bool) -> dict[str, float]:
        """Of one step by phase, and of the updates after it."""
        batch, clock = self._choose(row, checkpointing), meters.clock(self.device, self.clock)
        step(self.host, batch, clock)
        self.optimizer.step()
        self.host.ema_weights.update(1)
        clock.lap(report.UPDATE)
        # The gradients stay allocated: a step's peak is of what comes and goes.
        self.optimizer.zero_grad(set_to_none=False)
        return clock.phases

    def flops(self, row: Row, checkpointing: bool) -> dict[str, float]:
        batch = self._choose(row, checkpointing)
        with meters.flop_counter() as counter:
            meter = meters.Rises(counter.get_total_flops)
            step(self.host, batch, meter)
        return meter.phases

    def peaks(self, row: Row, checkpointing: bool) -> dict[str, dict[str, float]]:
        """Bytes by kind and phase: on a GPU the allocator's, elsewhere what graphs save and what tensors are alive.

        With two rollout steps: none keeps anything for the next.
        """
        short = row if row is PAIRED else replace(row, objective=row.objective | {"rollout_steps": 2})
        batch = self._choose(short, checkpointing)
        if self.device.type == "cuda":
            return {"allocator": self._allocator_peak(batch)}
        resident = self._resident(batch)
        with meters.SavedBytes(resident) as saved, meters.AliveBytes(resident) as alive:
            kinds = {"saved": meters.Peaks(lambda: saved.peak, saved.reset), "alive": meters.Peaks(lambda: alive.peak, alive.reset)}
            step(self.host, batch, meters.Several(list(kinds.values())))
        return {kind: meter.phases for kind, meter in kinds.items()}

    def _resident(self, batch: Batch) -> list[Tensor]:
        """Tensors that live whether a step runs or not."""
        host = self.host
        tensors = [t for network in host.networks.values() for t in (*network.parameters(), *network.buffers())]
        tensors += [linear.weight for linear in host._merged] + list(host.ema_weights.state().values())
        tensors += [p.grad for p in host.parameters.values() if p.grad is not None]
        tensors += [value for role in ROLES for value in getattr(batch, role).values()]
        return [*tensors, batch.source, batch.noise, batch.t, batch.nodes, *([] if batch.target is None else [batch.target])]

    def _allocator_peak(self, batch: Batch) -> dict[str, float]:
        torch.cuda.synchronize(self.device)
        rest = torch.cuda.memory_allocated(self.device)

        def read() -> float:
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - rest

        meter = meters.Peaks(read, lambda: torch.cuda.reset_peak_memory_stats(self.device))
        step(self.host, batch, meter)
        return meter.phases

    def resident_bytes(self) -> dict[str, int]:
        """What lives anyway, by part."""
        host = self.host

        def size(tensors: Any) -> int:
            return sum(tensor.nbytes for tensor in tensors)

        lora = list(host.parameters.values())
        frozen = [p for network in host.networks.values() for p in network.parameters() if not p.requires_grad]
        return {"frozen weights": size(frozen), "LoRA": size(lora), "merged weights": size(linear.weight for linear in host._merged)}

    def matmul_share(self) -> float | None:
        """Share of matrix products and attention in the CPU time of one default step."""
        if self.device.type != "cpu":
            return None
        default = next(row for row in ladder(self.shape.rollout_steps[0]) if row.name == "frozen 2")
        batch = self._choose(default, False)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step(self.host, batch, meters.Meter())
        spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
        return sum(v for k, v in spent.items() if k in products or "flash_attention" in k) / sum(spent.values())

    def measure(self, repeats: int) -> list[dict[str, Any]]:
        """All rows; each repetition times every row once, right after three paired steps."""
        records = []
        for row, checkpointing in self.plan:
            record = _described(row, checkpointing)
            record |= {
                "flops": self.flops(row, checkpointing),
                "bytes": self.peaks(row, checkpointing),
                "seconds": [],
                "paired_seconds": [],
            }
            records.append(record)
            self.optimizer.zero_grad(set_to_none=False)
        for repetition in range(repeats):
            for (row, checkpointing), record in zip(self.plan, records, strict=True):
                record["paired_seconds"].append(statistics.median(self.seconds(PAIRED, checkpointing)["paired"] for _ in range(3)))
                record["seconds"].append(self.seconds(row, checkpointing))
            print(f"repetition {repetition + 1} of {repeats}", file=sys.stderr, flush=True)
        return records


# --- the results file ---


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on; no names, no paths."""
    found = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30) if hasattr(os, "sysconf") else None,
        "torch": torch.__version__,
        "device": device.type,
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def commit() -> dict[str, Any]:
    """The commit, and whether the code that a step runs differed from it."""
    head, changed = provenance.commit("byg_plugin/hosts", "byg_plugin/objectives", "byg_plugin/models", "benchmarks/step*.py")
    return {"hash": head, "modified": changed}


def _described(row: Row, checkpointing: bool) -> dict[str, Any]:
    return {
        "name": row.name,
        "title": row.title,
        "checkpointing": checkpointing,
        "rollout_steps": None if row is PAIRED else row.objective["rollout_steps"],
        "in_ladder": row.name in LADDER,
    }


def _shape_record(name: str, shape: Shape) -> dict[str, Any]:
    return {
        "name": name,
        "transformer": shape.transformer,
        "family": shape.family,
        "t": shape.t,
        "noisy_tokens": shape.frames * (shape.side // 2) ** 2,
        "text_tokens": shape.text_tokens,
        "batch": shape.batch,
        "rank": shape.rank,
        "dtype": shape.dtype,
        "mixed_precision": shape.mixed_precision,
    }


def measure(name: str, device: torch.device, repeats: int, clock: str) -> dict[str, Any]:
    """The whole results file of a shape."""
    made_by = commit()
    bench = Bench(shape_named(name), device, clock)
    rows = bench.measure(repeats)
    shape = bench.shape
    return {
        "machine": machine(device),
        "commit": made_by,
        "shape": _shape_record(name, shape),
        "matmul_share": bench.matmul_share(),
        "resident_bytes": bench.resident_bytes(),
        "repeats": repeats,
        "clock": clock,
        "rows": rows,
    }


COUNTED = ("paired", "printed", "frozen 2", "merged", "default, fewer", "merged, fewer")


def count(name: str) -> dict[str, Any]:
    """FLOPs of a shape's steps on the meta device: the same code, no weights and no arithmetic. Activations kept and recomputed."""
    made_by = commit()
    # Neither 16-bit weights nor autocast change what is multiplied, and the meta device knows neither.
    shape = replace(shape_named(name), checkpointing=(False, True), dtype="float32", mixed_precision="no")
    with _meta_without_autocast():
        bench = Bench(shape, torch.device("meta"))
        bench.host.device = torch.device("cpu")  # what autocast asks for
        rows = [_described(row, setting) | {"flops": bench.flops(row, setting)} for row, setting in bench.plan if row.name in COUNTED]
    return {
        "machine": {"torch": torch.__version__, "device": "meta"},
        "commit": made_by,
        "shape": _shape_record(name, shape),
        "rows": rows,
    }


@contextmanager
def _meta_without_autocast() -> Iterator[None]:
    """torch.is_autocast_enabled and torch.autocast raise for the meta device, which has none."""
    original, exact_time = torch.is_autocast_enabled, wan.exact_time
    torch.is_autocast_enabled = lambda *device: False if device == ("meta",) else original(*device)  # type: ignore[assignment]
    wan.exact_time = lambda network: nullcontext()
    try:
        yield
    finally:
        torch.is_autocast_enabled, wan.exact_time = original, exact_time


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--device", choices=("cpu", "cuda", "meta"), default="cpu", help="meta counts FLOPs and measures nothing")
    parser.add_argument("--repeats", type=int, default=7, help="times each row is timed")
    parser.add_argument(
        "--clock", choices=("wall", "process"), default="wall", help="process = CPU time, for a machine with other work; with --threads 1"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own")
    parser.add_argument("--out", type=Path, help="results file to write")
    parser.add_argument("--table", type=Path, help="print the tables of a results file and measure nothing")
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="put the tables of the committed results into docs/step_cost.md and measure nothing",
    )
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message where options cannot be honoured, before anything is measured."""
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads {options.threads}: at least 1, or leave it out for PyTorch's own choice")
    if options.clock == "process" and (options.device != "cpu" or options.threads != 1):
        parser.error("--clock process counts the time in which threads wait for each other: give --device cpu and --threads 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here; leave --device out")
    if options.out and options.out.is_dir():
        parser.error(f"--out {options.out}: a folder; name the file, e.g. {options.out / 'step.json'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(parser, options)
    try:
        if options.write_docs:
            report.write_documents(ROOT, ROOT / "benchmarks/results")
            return
        if options.table:
            print(report.tables(report.read(options.table)))
            return
    except ValueError as error:
        parser.error(f"{'--write-docs' if options.write_docs else '--table'}: {error}")
    _measure_as_asked(options)


def _measure_as_asked(options: argparse.Namespace) -> None:
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "meta":
        results = count(options.shape)
    else:
        results = measure(options.shape, torch.device(options.device), options.repeats, options.clock)
    if options.out:
        options.out.write_text(report.as_json(results), encoding="utf-8")
    print(report.tables(results))


if __name__ == "__main__":
    _cli.run(main)
