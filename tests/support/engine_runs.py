"""Runs of the trainer on several gloo processes, many in one launch.

A case is a run, as `case` makes it. What each process measured lies in `output.dir`, rank-R.json.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from byg_plugin.config.loading import parse_config
from byg_plugin.config.sections import Config
from byg_plugin.hosts.blocks import blocks_of
from byg_plugin.hosts.sharding import bytes_held
from byg_plugin.training import checkpoint

ZERO = {"overlap_comm": False, "reduce_bucket_size": 500_000, "allgather_bucket_size": 500_000}
# By the server of the forks, once.
IMPORTED = ["tests.support.engine_runs", "tests.support.tiny", "tests.support.wan_runs", "diffusers", "peft", "torch._dynamo"]


def case(config: Config, engine: str, *, sgd: bool = False, resume: str | None = None) -> dict[str, Any]:
    """One run; `engine`: plain, zero1, zero2, zero3 or fsdp2, with `-cpu` for what can be offloaded."""
    return {"config": config.model_dump(mode="json"), "engine": engine, "sgd": sgd, "resume": resume}


def run_all(cases: Sequence[dict[str, Any]], processes: int, folder: Path, timeout: float = 600.0) -> None:
    """Run them, all in one launch of so many processes.

    Raises:
        AssertionError: a process failed; with the ends of all outputs.
    """
    in_processes(processes, partial(run_cases, cases), folder, timeout)


def in_processes(processes: int, work: Callable[[], object], folder: Path, timeout: float = 600.0) -> None:
    """`work`, which can be pickled, in so many processes with a launcher's variables.

    Raises:
        AssertionError: a process failed or did not end in `timeout` seconds; with the ends of all outputs.
    """
    codes, outputs = codes_of(processes, work, folder, timeout)
    assert codes == [0] * processes, f"{codes}\n" + "\n---\n".join(outputs)


def codes_of(processes: int, work: Callable[[], object], folder: Path, timeout: float = 600.0) -> tuple[list[int], list[str]]:
    """The exit codes, negative for a signal, and the ends of the outputs.

    They are forked from a server that has imported and computed nothing: this process has threads of torch and of pytest-xdist, and
    a fork of it crashes or hangs now and then. Skips the test where processes cannot fork (Windows).
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no fork server on this system")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(IMPORTED)
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    outputs = [folder / f"{port}-{rank}.txt" for rank in range(processes)]
    children = [
        forks.Process(target=child, args=(work, variables(rank, processes, port), outputs[rank], timeout)) for rank in range(processes)
    ]
    for each in children:
        each.start()
    for each in children:
        each.join()
    return [int(each.exitcode or 0) for each in children], [path.read_text(encoding="utf-8")[-4000:] for path in outputs]


def child(work: Callable[[], object], environment: dict[str, str], output: Path, timeout: float) -> None:
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    signal.alarm(int(timeout))
    os.environ.update(environment)
    torch.set_num_threads(1)
    work()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """What a launcher sets for one process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",  # otherwise accelerate sets the number of threads
    }


def last(out: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's newest checkpoint."""
    state = checkpoint.load(checkpoint.checkpoints(out / "checkpoints")[-1])
    return checkpoint.tensors_of(state.adapters["edit"])


def difference(one: Path, other: Path) -> float:
    """The largest, of weights, averages and moments."""
    a, b = last(one), last(other)
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


def launch_of(engine: str, config: Any, processes: int) -> Any:
    """What a launcher that asks for this engine would make of it."""
    from byg_plugin.hosts.sharding import Sharding
    from byg_plugin.training import deepspeed_settings
    from byg_plugin.training.launch import Launch

    if engine.startswith("zero"):
        zero: dict[str, Any] = {"stage": int(engine[4]), **ZERO}
        if engine.endswith("-cpu"):
            zero["offload_param" if engine[4] == "3" else "offload_optimizer"] = {"device": "cpu"}
        terms = deepspeed_settings.Terms.of(config.train, config.accumulation(processes))
        settings = deepspeed_settings.resolved({"zero_optimization": zero}, "test", terms)
        return Launch.of_deepspeed(settings)
    if engine.startswith("fsdp2"):
        return Launch(sharding=Sharding(kind="fsdp2", offload="cpu" if engine.endswith("-cpu") else "none"))
    return Launch()


def sgd(train: Any, parameters: Any) -> torch.optim.Optimizer:
    """Momentum shows a wrong factor of the gradient, which Adam hides."""
    return torch.optim.SGD(parameters, lr=train.lr, momentum=0.9)


def run_cases(cases: Sequence[dict[str, Any]]) -> None:
    """In one of the processes."""
    from byg_plugin.models import make_family
    from byg_plugin.training import optimizers
    from byg_plugin.training.loop import Trainer

    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    # A collective that only one process makes ends a test, not the suite.
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=60))])
    adamw = optimizers.make_optimizer
    for each in cases:
        use_optimizer(sgd if each["sgd"] else adamw)
        config = parse_config(each["config"])
        accelerator.wait_for_everyone()
        started = time.perf_counter()
        launch = launch_of(each["engine"], config, accelerator.num_processes)
        trainer = Trainer(config, make_family(config), accelerator, each["resume"], launch=launch)
        wake_up(trainer, each)
        networks = list(trainer.host.networks.values())
        with peak_of(networks) if launch.sharding else nullcontext([]) as peak:
            trainer.run()
        said = {"seconds": time.perf_counter() - started, "held": bytes_held(networks), "peak": max(peak, default=0)}
        said |= sizes_of(networks, accelerator.num_processes)
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


@contextmanager
def peak_of(networks: list[torch.nn.Module]) -> Iterator[list[int]]:
    """Bytes of the base held, whenever the last linear of a block is about to compute, and at some gradients of the LoRA."""
    seen: list[int] = []

    def look(*_: Any) -> None:
        seen.append(bytes_held(networks)[0])

    blocks = [block for network in networks for block in blocks_of(network)]
    linears = [[module for module in block.modules() if isinstance(module, torch.nn.Linear)][-1] for block in blocks]
    trained = [parameter for network in networks for parameter in network.parameters() if parameter.requires_grad]
    hooks: list[Any] = [linear.register_forward_pre_hook(look) for linear in linears]
    hooks += [parameter.register_post_accumulate_grad_hook(look) for parameter in trained[:: max(1, len(trained) // 6)]]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def sizes_of(networks: list[torch.nn.Module], processes: int) -> dict[str, int]:
    """Bytes of the base with the padding of its shards: a process's part, and whole the largest block and what is in no block."""
    blocks = [share_of(block.parameters(), processes) for network in networks for block in blocks_of(network)]
    share = sum(share_of(network.parameters(), processes) for network in networks)
    # Of the network itself, and whole throughout a pass: Wan's table of shifts.
    own = max(share_of(network.parameters(recurse=False), processes) for network in networks)
    return {"share": share, "block": processes * max(blocks), "outside": processes * (share - sum(blocks)), "own": processes * own}


def share_of(parameters: Iterable[torch.nn.Parameter], processes: int) -> int:
    """Bytes of a process's part of the frozen ones. FSDP2 cuts between rows, ZeRO-3 between elements."""
    total = 0
    for weight in (weight for weight in parameters if not weight.requires_grad):
        elements, rows = getattr(weight, "ds_numel", weight.numel()), weight.shape[0] if weight.dim() else 1
        pieces = elements if hasattr(weight, "ds_numel") else rows
        total += -(-pieces // processes) * (elements // pieces) * weight.element_size()
    return total


def use_optimizer(make: Any) -> None:
    """In every module that names it."""
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("byg_plugin.training") and hasattr(module, "make_optimizer"):
            module.make_optimizer = make  # type: ignore[attr-defined]
