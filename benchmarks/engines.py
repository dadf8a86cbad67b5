"""What an engine costs: a step under each, side by side on the same processes: `python -m benchmarks.engines [--processes 2]`.

The network is `benchmarks.step`'s shape `cpu` with random weights, recomputed, float32, a thread a process, over gloo; every process
steps its own sample. Prints a table of medians, ratios to the plain engine and the share of the base held, and one JSON line last. A
CPU's collectives are copies in memory: ratios on cards depend on what joins them. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_host import StepHost, make_batch, make_host, rollout_nodes
from benchmarks.step_rows import ladder
from benchmarks.step_shapes import Shape, shape_named
from byg_plugin.config.sections import TrainConfig
from byg_plugin.hosts.sharding import Sharding, bytes_held
from byg_plugin.objectives import make_objective
from byg_plugin.training.deepspeed_settings import Terms, resolved
from byg_plugin.training.engine import Engine
from byg_plugin.training.engines import make_engine
from byg_plugin.training.launch import Launch

CPU = torch.device("cpu")
DEFAULTS = "frozen 2"


def launches(train: TrainConfig) -> dict[str, Launch]:
    """By name; without DeepSpeed its engines are left out."""
    found = {"plain": Launch()}
    if find_spec("deepspeed"):
        for name, zero in {
            "ZeRO-1": {"stage": 1},
            "ZeRO-2": {"stage": 2},
            "ZeRO-3": {"stage": 3},
            "ZeRO-3, cpu offload": {"stage": 3, "offload_param": {"device": "cpu"}},
        }.items():
            found[name] = Launch.of_deepspeed(resolved({"zero_optimization": {**zero, "overlap_comm": False}}, name, Terms.of(train, 1)))
    found["FSDP2"] = Launch(sharding=Sharding(kind="fsdp2"))
    found["FSDP2, cpu offload"] = Launch(sharding=Sharding(kind="fsdp2", offload="cpu"))
    return found


def seconds_of(host: StepHost, engine: Engine, shape: Shape) -> float:
    """One step of the defaults, updates included."""
    row = next(row for row in ladder(shape.rollout_steps[0]) if row.name == DEFAULTS)
    host.choose(row, checkpointing=True)
    batch = make_batch(shape, row.kind, rollout_nodes(shape, host.config.objective, host.family), CPU)
    torch.distributed.barrier()
    started = time.perf_counter()
    engine.begin([("edit", "transformer")])

    def backward(loss: torch.Tensor, *, last: bool) -> float:
        scale = engine.backward(loss, last=last)
        if host.sharding:
            host.after_backward()
        return scale

    make_objective(host.config.objective).step(host, batch, backward)
    engine.step(1e-5, lambda norms: None)
    host.ema_weights.update(1)
    return time.perf_counter() - started


def worker(rank: int, processes: int, port: int, shape_name: str, repeats: int, out: str) -> None:
    """One process: every engine in turn, `repeats` times."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    shape = shape_named(shape_name)
    train = TrainConfig(steps=1, batch_size=shape.batch, global_batch_size=shape.batch * processes, optimizer="adamw", mixed_precision="no")
    made: dict[str, tuple[StepHost, Engine]] = {}
    for name, launch in launches(train).items():
        host = make_host(shape, CPU, launch.sharding)
        made[name] = host, make_engine(launch, train, {"edit": host.parameters}, 1, CPU)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(repeats + 1):
        for name, (host, engine) in made.items():
            took = seconds_of(host, engine, shape)
            if repeat:  # the first one warms up
                seconds[name].append(took)
    if rank == 0:
        rows = {name: _row(seconds[name], seconds["plain"], made[name][0]) for name in made}
        found = {"processes": processes, "shape": shape_name, "repeats": repeats, "engines": rows}
        Path(out).write_text(json.dumps(found), encoding="utf-8")


def _row(seconds: list[float], plain: list[float], host: StepHost) -> dict[str, Any]:
    held, whole = bytes_held(list(host.networks.values()))
    over = statistics.median(mine / other for mine, other in zip(seconds, plain, strict=True))
    return {"seconds": round(statistics.median(seconds), 3), "over_plain": round(over, 3), "held": round(held / whole, 3)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each engine, by turns")
    parser.add_argument("--shape", default="cpu", choices=("cpu", "tiny"))
    parser.add_argument("--out", type=Path, default=Path("out/engines.json"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (options.processes, port, options.shape, options.repeats, str(options.out))
    torch.multiprocessing.spawn(worker, arguments, nprocs=options.processes)
    results = json.loads(options.out.read_text(encoding="utf-8"))
    print("| engine | seconds a step | over plain | of the base held |\n|---|---|---|---|")
    for name, row in results["engines"].items():
        print(f"| {name} | {row['seconds']:.2f} | {row['over_plain']:.2f} | {row['held']:.2f} |")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
