"""Rows of a shape measured side by side."""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import step_meters as meters
from benchmarks.step_figures import FAST, UPDATE
from benchmarks.step_host import inputs, make_batch, make_host, rollout_nodes, rollout_share, step
from benchmarks.step_rows import LADDER, PAIRED, Row, ladder, plan
from benchmarks.step_shapes import Shape
from byg_plugin.objectives.base import Batch


class Bench:
    """Everything that the rows share."""

    def __init__(self, shape: Shape, device: torch.device, clock: str = "wall"):
        self.shape, self.device, self.clock = shape, device, clock
        self.host = make_host(shape, device)
        self.optimizer = torch.optim.AdamW(self.host.parameters.values(), lr=1e-5)
        self.plan = plan(shape)

    def _choose(self, row: Row, checkpointing: bool) -> Batch:
        self.host.choose(row, checkpointing)
        nodes = rollout_nodes(self.shape, self.host.config.objective, self.host.family)
        return make_batch(self.shape, row.kind, nodes, self.device, self.host.family.boundary)

    def seconds(self, row: Row, checkpointing: bool) -> dict[str, float]:
        """Of one step by phase, and of the updates after it."""
        batch, clock = self._choose(row, checkpointing), meters.clock(self.device, self.clock)
        step(self.host, batch, clock)
        self.optimizer.step()
        self.host.ema_weights.update(1)
        clock.lap(UPDATE)
        # The gradients stay allocated: a step's peak is of what comes and goes.
        self.optimizer.zero_grad(set_to_none=False)
        return clock.phases

    def flops(self, row: Row, checkpointing: bool) -> dict[str, float]:
        return self._counted(row, checkpointing)[0]

    def _counted(self, row: Row, checkpointing: bool) -> tuple[dict[str, float], int]:
        """FLOPs by phase, and the calls of the rollout."""
        batch = self._choose(row, checkpointing)
        with meters.flop_counter() as counter:
            meter = meters.Rises(counter.get_total_flops)
            calls = step(self.host, batch, meter)
        return meter.phases, calls

    def counted(self, row: Row, checkpointing: bool) -> dict[str, Any]:
        """A row's record with its FLOPs."""
        flops, calls = self._counted(row, checkpointing)
        return self._described(row, checkpointing, calls) | {"flops": flops}

    def _described(self, row: Row, checkpointing: bool, calls: int) -> dict[str, Any]:
        """What a row is, and of the preset's what it counts in the mean step. `calls`: of the rollout, with this row chosen."""
        record = {
            "name": row.name,
            "title": row.title,
            "checkpointing": checkpointing,
            "rollout_steps": None if row is PAIRED else row.objective["rollout_steps"],
            "in_ladder": row.name in LADDER,
        }
        if row.name == FAST:
            share = rollout_share(self.shape, self.host.config.objective, self.host.family, calls)
            record |= {"kind": row.kind, "probability": row.probability, "rollout_share": share}
        return record

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
        tensors += [linear.weight for linear in host.merged.linears] + list(host.ema_weights.state().values())
        tensors += [p.grad for p in host.parameters.values() if p.grad is not None]
        return tensors + inputs(batch)

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
        return {"frozen weights": size(frozen), "LoRA": size(lora), "merged weights": size(linear.weight for linear in host.merged.linears)}

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
            records.append(self.counted(row, checkpointing) | {"bytes": self.peaks(row, checkpointing)})
            self.optimizer.zero_grad(set_to_none=False)
        for repetition in range(repeats):
            self.time_once(records)
            print(f"repetition {repetition + 1} of {repeats}", file=sys.stderr, flush=True)
        return records

    def started(self) -> list[dict[str, Any]]:
        """Records of the plan to be timed, after one step of each row that nobody times: it makes what stays allocated."""
        return [self._described(row, setting, step(self.host, self._choose(row, setting), meters.Meter())) for row, setting in self.plan]

    def time_once(self, records: list[dict[str, Any]]) -> None:
        """One repetition of the plan, added to its records."""
        for (row, checkpointing), record in zip(self.plan, records, strict=True):
            paired = statistics.median(self.seconds(PAIRED, checkpointing)["paired"] for _ in range(3))
            record.setdefault("paired_seconds", []).append(paired)
            record.setdefault("seconds", []).append(self.seconds(row, checkpointing))
