"""The training command as processes: kills, Ctrl-C, SIGTERM, two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from byg_plugin.training import checkpoint, loop
from tests.support import ROOT
from tests.support.tiny import curve, in_child, make_trainer, run_config, workspace
from tests.support.training_runs import assert_same_run, tensors_of

TOML = """
[model]
path = "{model}"
dtype = "float32"
device = "cpu"
gradient_checkpointing = false
[dataset]
tuples = "{work}/tuples.jsonl"
cache_dir = "{work}/cache"
resolution = 64
[conditioning]
max_text_tokens = 8
[lora]
rank = 4
[objective]
rollout_steps = 2
identity_warmup_steps = 2
ema_decay = 0.9
[train]
steps = {steps}
global_batch_size = 2
mixed_precision = "no"
tracker = "none"
lr = 1e-2
save_every = 2
keep_last = 0
lr_warmup_steps = 2
lr_schedule = "cosine"
[output]
dir = "{out}"
"""


def write_toml(path: Path, out: Path, steps: int) -> Path:
    config = run_config(out)
    path.write_text(TOML.format(model=config.model.path, work=workspace(), out=out, steps=steps), encoding="utf-8")
    return path


def start(toml: Path, *arguments: str, log: Path | None) -> subprocess.Popen[bytes]:
    """The command, which writes into a file, or into a pipe."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "byg_plugin/train_network.py"), "--config", str(toml), *arguments]
    with nullcontext(subprocess.PIPE) if log is None else open(log, "ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=toml.parent, env=environment)


def wait_for_step(out: Path, step: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = out / "log.jsonl"
        if path.exists() and any(f'"step": {step},' in line for line in path.read_text().splitlines()):
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {log.read_text()}")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows cannot send these signals to a process")
def test_the_command_survives_kill_9_and_ctrl_c(tmp_path: Path):
    out, steps, log = tmp_path / "out", 14, tmp_path / "log"
    toml = write_toml(tmp_path / "run.toml", out, steps)
    process = start(toml, log=log)
    wait_for_step(out, 3, process, log)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    process = start(toml, "--resume", "latest", log=log)
    wait_for_step(out, 7, process, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130, log.read_text()
    said = log.read_text()
    assert "interrupted: saving after this step" in said and "go on with --resume latest" in said and "Traceback" not in said
    saved = checkpoint.checkpoints(out / "checkpoints")[-1]
    assert curve(out)[-1]["step"] == checkpoint.load(saved).step < steps, "Ctrl-C saves the step it stopped after"
    config = run_config(out, train={"steps": steps})
    make_trainer(config, "latest").run()
    make_trainer(run_config(tmp_path / "whole", train={"steps": steps})).run()
    assert_same_run(out, tmp_path / "whole")
    versions = json.loads((out / "run.json").read_text())
    assert {"torch", "diffusers", "byg_plugin"} <= versions["versions"].keys() and "--resume" in versions["command"]
    assert json.loads((out / "config.json").read_text())["train"]["steps"] == steps


def test_two_processes_are_one_with_twice_the_accumulation(tmp_path: Path):
    toml = write_toml(tmp_path / "run.toml", tmp_path / "out", 6)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(29000 + os.getpid() % 2000)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # A small rate: Adam's first steps turn a rounding difference in a tiny gradient into one of the rate's size.
    command = [*launch, str(ROOT / "byg_plugin/train_network.py"), "--config", str(toml)]
    # Validation and previews are the first process's work; the other one must wait for it and not hang.
    for override in ("train.lr=3e-4", "dataset.validation_items=1", "train.validate_every=2", "sample.every=3", "sample.steps=1"):
        command += ["--set", override]
    make_trainer(run_config(tmp_path / "one", dataset={"validation_items": 1}, train={"lr": 3e-4})).run()
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    for name in ("byg_lora", "byg_lora-ema"):
        a, b = tensors_of(tmp_path / "out", name), tensors_of(tmp_path / "one", name)
        assert max((a[n] - b[n]).abs().max().item() for n in a) <= 1e-6
        assert max(b[n].abs().max().item() for n in b if "lora_B" in n) > 1e-4
    for one, other in zip(curve(tmp_path / "out"), curve(tmp_path / "one"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert [line["step"] for line in curve(tmp_path / "out", "validation.jsonl")] == [2, 4, 6]
    assert len(list((tmp_path / "out/previews").iterdir())) == 3


@pytest.mark.parametrize(
    ("signals", "apart", "code"),
    [
        ((signal.SIGTERM,), 0.0, 11),
        ((signal.SIGTERM, signal.SIGTERM, signal.SIGTERM), 0.2, 11),  # a scheduler's reaches launcher and process, and is handed on
        ((signal.SIGINT, signal.SIGINT), 0.0, 11),  # a terminal's too
        ((signal.SIGTERM, signal.SIGINT), 0.3, 12),
        ((signal.SIGINT, signal.SIGINT), 0.3, 12),
    ],
)
def test_a_signal_saves_and_a_later_ctrl_c_stops_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signals: tuple[int, ...], apart: float, code: int
):
    monkeypatch.setattr(loop, "_ONE_SIGNAL", 0.1)
    config = run_config(tmp_path / "out", train={"save_every": 0})

    def work() -> None:
        trainer = make_trainer(config)
        original = trainer.diagnosis.before_step

        def hook(*args: Any) -> None:
            original(*args)
            for number in signals if trainer.step == 2 else ():
                os.kill(os.getpid(), number)
                time.sleep(apart)

        trainer.diagnosis.before_step = hook  # type: ignore[method-assign]
        try:
            trainer.run()
        except loop.Interrupted:
            raise SystemExit(11) from None
        except KeyboardInterrupt:
            raise SystemExit(12) from None

    assert in_child(work) == code
    saved = [path.name for path in checkpoint.checkpoints(tmp_path / "out/checkpoints")]
    assert saved == (["step-000003"] if code == 11 else [])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_long_step_is_given_up_and_the_last_one_saved(tmp_path: Path, processes: int):
    """A launcher kills 30 seconds after it has handed the signal on, a scheduler as late or sooner."""
    toml = write_toml(tmp_path / "run.toml", tmp_path / "out", 6)
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from byg_plugin import _cli, train_network\n"
        "from byg_plugin.training import loop, watchdog\n"
        "watchdog._INTERRUPTED = 1.0\n"
        "step = loop.Trainer._optimizer_step\n"
        "def slow(self, batches):\n"
        "    if self.step == 3:\n"
        "        time.sleep(30)\n"
        "    return step(self, batches)\n"
        "loop.Trainer._optimizer_step = slow\n"
        "_cli.run(train_network.main)\n",
        encoding="utf-8",
    )
    port = str(29000 + os.getpid() % 2000)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    log = tmp_path / "log"
    with open(log, "ab") as file:
        command = [sys.executable, *launch, str(script), "--config", str(toml), "--set", "train.save_every=0"]
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=tmp_path, env=environment, start_new_session=True)
    try:
        wait_for_step(tmp_path / "out", 3, process, log)
        process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while not checkpoint.checkpoints(tmp_path / "out/checkpoints") and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.5)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    said = log.read_text()
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out/checkpoints")] == ["step-000003"], said
    assert said.count("step 3 is saved now: go on with --resume latest") == 1, said
    state = checkpoint.load(tmp_path / "out/checkpoints/step-000003")
    assert state.step == 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send this signal to a process")
def test_ctrl_c_saves_where_it_ends_the_reader_of_the_output_too(tmp_path: Path):
    """`train ... 2>&1 | tee log`: the whole group gets the signal, and every later line has no reader."""
    out = tmp_path / "out"
    toml = write_toml(tmp_path / "run.toml", out, 2000)
    process = start(toml, "--set", "train.save_every=0", log=None)
    assert process.stdout is not None
    try:
        wait_for_step(out, 3, process, toml)
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    (saved,) = checkpoint.checkpoints(out / "checkpoints")
    assert checkpoint.load(saved).step == curve(out)[-1]["step"] < 2000


def test_ctrl_c_reaches_the_whole_group_and_the_loader_process_leaves_it_to_the_trainer(tmp_path: Path):
    config = run_config(tmp_path / "out", dataset={"workers": 1}, train={"save_every": 0})

    def work() -> None:
        os.setpgid(0, 0)  # a terminal's Ctrl-C goes to a group; not to pytest's
        trainer = make_trainer(config)
        original = trainer.diagnosis.before_step

        def hook(*args: Any) -> None:
            original(*args)
            if trainer.step == 2:
                os.killpg(0, signal.SIGINT)
                time.sleep(0.3)  # for the loader process to fall over

        trainer.diagnosis.before_step = hook  # type: ignore[method-assign]
        try:
            trainer.run()
        except loop.Interrupted:
            raise SystemExit(11) from None

    log = tmp_path / "log"
    assert in_child(work, log) == 11, log.read_text()
    assert log.read_text().count("interrupted: saving") == 1
    assert checkpoint.checkpoints(tmp_path / "out/checkpoints")[-1].name == "step-000003"


def test_what_needs_a_fork_is_skipped_where_there_is_none(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "fork", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no os.fork"):
        in_child(lambda: None)


def test_signal_handlers_are_given_back(tmp_path: Path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    make_trainer(run_config(tmp_path / "out", train={"steps": 1})).run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
