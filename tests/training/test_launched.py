"""Launched as users launch: `accelerate launch` with the shipped configurations, two real processes, the weights of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from byg_plugin.config.sections import Config
from byg_plugin.models import make_family
from byg_plugin.training.loop import Trainer
from tests.support import ROOT
from tests.support.engine_runs import difference, free_port
from tests.support.tiny import curve, make_trainer, run_config

pytestmark = pytest.mark.timeout(900)  # interpreters start
NAMES = {"zero2": "ZeRO-2", "zero3": "ZeRO-3, cpu offload", "fsdp2": "FSDP2"}
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def config(out: Path, **train: Any) -> Config:
    """With validation, a preview and scores, in which every process of a sharded base takes part."""
    return run_config(
        out,
        train={"steps": 2, "save_every": 2, "global_batch_size": 4, "validate_every": 2, "lr": 1e-3, **train},
        objective={"rollout_steps": 2, "identity_warmup_steps": 1, "identity_probability": 0.0},
        dataset={"validation_items": 1},
        sample={"every": 2, "items": 1, "steps": 2},
        evaluate={"every": 2, "items": 1, "metrics": ["error"], "select": ["error_source"]},
    )


def write_toml(path: Path, made: Config) -> Path:
    raw = made.model_dump(mode="json", exclude_none=True)
    lines = [f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()) for name, keys in raw.items() if keys]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def started(toml: Path, *options: str) -> subprocess.Popen[str]:
    """On a CPU, where no process finds a card."""
    words = [*LAUNCH, *options, "--mixed_precision", "no", str(ROOT / "byg_plugin/train_network.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*words, "--config", str(toml)], env=environment, cwd=ROOT, **pipes)


def launched(toml: Path, *options: str) -> tuple[int, str]:
    """Exit code and output."""
    process = started(toml, *options, "--main_process_port", "0")
    output, _ = process.communicate(timeout=800)
    return process.returncode, output


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one") / "out"
    make_trainer(config(out)).run()
    return out


@pytest.mark.parametrize("engine", NAMES)
def test_the_shipped_configurations_train_the_weights_of_one_process(engine: str, tmp_path: Path, reference: Path):
    if engine != "fsdp2" and not find_spec("deepspeed"):
        pytest.skip('DeepSpeed is not installed: pip install -e ".[deepspeed]"')
    toml = write_toml(tmp_path / "run.toml", config(tmp_path / "out"))
    code, output = launched(toml, "--config_file", str(ROOT / f"configs/accelerate/{engine}.yaml"), "--num_processes", "2")
    assert code == 0, output[-4000:]
    for rank in (0, 1):
        assert f"[RANK {rank}] engine: {NAMES[engine]}, base held by this rank " in output, "accepted, and not ignored"
    assert difference(tmp_path / "out", reference) <= 5e-6
    assert curve(tmp_path / "out", "validation.jsonl")[0]["step"] == 2
    assert {path.name for path in (tmp_path / "out/previews").iterdir()} == {"step-000000", "step-000002"}
    best = json.loads((tmp_path / "out/best.json").read_text(encoding="utf-8"))
    assert best["step"] == 2 and best["score"] == curve(tmp_path / "out", "evaluation.jsonl")[0]["evaluate/error_source"]


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"] if os.environ.get("BYG_ALL_ENGINES") else ["fsdp2"])
def test_two_machines_train_the_weights_of_one_process(engine: str, tmp_path: Path, reference: Path):
    """As docs/distributed.md says it, on the loopback device: two launchers that know of each other by address alone."""
    options = ["--config_file", str(ROOT / f"configs/accelerate/{engine}.yaml"), "--num_machines", "2", "--num_processes", "2"]
    options += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    if engine == "zero3":
        pytest.importorskip("deepspeed", reason='DeepSpeed is not installed: pip install -e ".[deepspeed]"')
        options += ["--deepspeed_multinode_launcher", "standard"]
    toml = write_toml(tmp_path / "run.toml", config(tmp_path / "out"))
    machines = [started(toml, *options, "--machine_rank", str(rank)) for rank in (0, 1)]
    outputs = [machine.communicate(timeout=800)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    for rank, output in enumerate(outputs):
        assert f"[RANK {rank}] engine: {NAMES[engine]}, base held by this rank " in output
    assert difference(tmp_path / "out", reference) <= 5e-6


def test_a_contradiction_is_named_before_anything_is_loaded(tmp_path: Path):
    toml = write_toml(tmp_path / "run.toml", config(tmp_path / "out"))
    settings = tmp_path / "ds.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}), encoding="utf-8")
    code, output = launched(
        toml, "--use_deepspeed", "--deepspeed_config_file", str(settings), "--num_processes", "1", "--num_machines", "1"
    )
    if find_spec("deepspeed"):
        assert f"{settings}: optimizer: the optimizer is train.optimizer; leave it out" in output
    assert code != 0 and not (tmp_path / "out").exists()


def test_one_process_holds_the_base_in_main_memory_and_trains_the_same(tmp_path: Path, reference: Path):
    """FSDP2's offload on one card: a block at a time comes to the device. No launcher, no process group of its own."""
    from accelerate import Accelerator

    from byg_plugin.training.launch import read_launch

    made = config(tmp_path / "out", sharding="fsdp2", sharding_offload=True)
    trainer = Trainer(made, make_family(made), Accelerator(cpu=True), launch=read_launch(made, environment={}))
    trainer.run()
    assert difference(tmp_path / "out", reference) == 0.0
    torch.distributed.destroy_process_group()
