"""Runs of the trainer on several gloo processes, many in one launch: `python -m tests.support.engine_runs CASES.json`, once a process.

A case is a run, as `case` makes it. What each process measured lies in `output.dir`, rank-R.json.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from byg_plugin.config.loading import parse_config
from byg_plugin.config.sections import Config
from tests.support import ROOT

ZERO = {"overlap_comm": False, "reduce_bucket_size": 500_000, "allgather_bucket_size": 500_000}


def case(config: Config, engine: str, *, sgd: bool = False, resume: str | None = None) -> dict[str, Any]:
    """One run; `engine`: plain, zero1, zero2, zero3 or fsdp2, with `-cpu` for what can be offloaded."""
    return {"config": config.model_dump(mode="json"), "engine": engine, "sgd": sgd, "resume": resume}


def run_all(cases: Sequence[dict[str, Any]], processes: int, folder: Path, timeout: float = 240.0) -> None:
    """Run them, all in one launch of so many processes.

    Raises:
        AssertionError: a process failed; with the ends of all outputs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    listed = folder / f"cases-{time.monotonic_ns()}.json"
    listed.write_text(json.dumps(list(cases)), encoding="utf-8")
    outputs = [folder / f"{listed.stem}-{rank}.txt" for rank in range(processes)]
    port, command = free_port(), [sys.executable, "-m", "tests.support.engine_runs", str(listed)]
    started = [start(command, rank, processes, port, output) for rank, output in enumerate(outputs)]
    deadline = time.monotonic() + timeout
    try:
        codes = [process.wait(max(1.0, deadline - time.monotonic())) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * processes, f"{codes}\n" + "\n---\n".join(path.read_text(encoding="utf-8")[-4000:] for path in outputs)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(command: Sequence[str], rank: int, processes: int, port: int, output: Path, **more: str) -> subprocess.Popen[bytes]:
    """One process as a launcher would start it."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        **more,
    }
    with output.open("wb") as file:
        return subprocess.Popen(list(command), cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def launch_of(engine: str, config: Any, processes: int) -> Any:
    """What a launcher that asks for this engine would make of it."""
    from byg_plugin.hosts.sharding import Sharding
    from byg_plugin.training import deepspeed_settings
    from byg_plugin.training.launch import Launch

    if engine.startswith("zero"):
        zero: dict[str, Any] = {"stage": int(engine[4]), **ZERO}
        if engine.endswith("-cpu"):
            zero["offload_param" if engine[4] == "3" else "offload_optimizer"] = {"device": "cpu"}
        settings = deepspeed_settings.resolved({"zero_optimization": zero}, "test", config.train, config.accumulation(processes))
        return Launch.of_deepspeed(settings)
    if engine.startswith("fsdp2"):
        return Launch(sharding=Sharding(kind="fsdp2", offload="cpu" if engine.endswith("-cpu") else "none"))
    return Launch()


def sgd(train: Any, parameters: Any) -> torch.optim.Optimizer:
    """Momentum shows a wrong factor of the gradient, which Adam hides."""
    return torch.optim.SGD(parameters, lr=train.lr, momentum=0.9)


def main(path: str) -> None:
    import logging
    from datetime import timedelta

    from accelerate import Accelerator, InitProcessGroupKwargs

    from byg_plugin.hosts.sharding import bytes_held
    from byg_plugin.models import make_family
    from byg_plugin.training import optimizers
    from byg_plugin.training.loop import Trainer

    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=120))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[patience])
    adamw = optimizers.make_optimizer
    for each in json.loads(Path(path).read_text(encoding="utf-8")):
        use_optimizer(sgd if each["sgd"] else adamw)
        config = parse_config(each["config"])
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        launch = launch_of(each["engine"], config, accelerator.num_processes)
        trainer = Trainer(config, make_family(config), accelerator, each["resume"], launch=launch)
        wake_up(trainer, each)
        trainer.run()
        said = {"seconds": time.perf_counter() - started, "held": bytes_held(list(trainer.host.networks.values()))}
        Path(config.output.dir, f"rank-{accelerator.process_index}.json").write_text(json.dumps(said), encoding="utf-8")
    accelerator.wait_for_everyone()


def wake_up(trainer: Any, each: dict[str, Any]) -> None:
    """B is zero at first, where edit, EMA and base are one: random weights, the same on every process, in place."""
    if each["resume"]:
        return
    rng = torch.Generator().manual_seed(5)
    for adapter in trainer.host.adapters.values():
        for parameter in adapter.parameters.values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=rng) * 0.2)
        adapter.ema.load({name: torch.randn(p.shape, generator=rng) * 0.2 for name, p in adapter.parameters.items()})
    trainer.engine.broadcast()


def use_optimizer(make: Any) -> None:
    """In every module that names it."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("byg_plugin.training") and hasattr(module, "make_optimizer"):
            module.make_optimizer = make  # type: ignore[attr-defined]


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BaseException:  # noqa: BLE001 - the interpreter's teardown may hang while others wait in a collective
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    # Sharded engines abort now and then in the interpreter's teardown, after all work.
    os._exit(0)
