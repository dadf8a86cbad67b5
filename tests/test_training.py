"""The training loop on a tiny cached dataset: what a kill, a full disk or a bad loss must not cost."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tiny import curve, in_child, make_trainer, run_config, wake, workspace

from byg_plugin import train_network
from byg_plugin.config import extras
from byg_plugin.config.sections import Config
from byg_plugin.lora.card import LoraCard
from byg_plugin.models.flux import FluxFamily
from byg_plugin.randomness import coin, generator
from byg_plugin.training import checkpoint, loop, preview
from byg_plugin.training.loop import Trainer, learning_rate

ROOT = Path(__file__).parents[1]


def tensors_of(out: Path, name: str = "byg_lora") -> dict[str, torch.Tensor]:
    return load_file(out / f"{name}.safetensors")


def assert_same_run(one: Path, other: Path, ema: bool = True) -> None:
    """Exactly the same loss curve and the same files, to the last bit."""
    assert curve(one) == curve(other)
    for name in ("byg_lora", "byg_lora-ema") if ema else ("byg_lora",):
        a, b = tensors_of(one, name), tensors_of(other, name)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def train(config: Config, resume: str | None = None) -> None:
    train_network.train(config, FluxFamily(config), torch.device("cpu"), resume)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run that others are compared with."""
    out = tmp_path_factory.mktemp("reference") / "out"
    make_trainer(run_config(out)).run()
    return out


# --- what a run writes ---


def test_a_run_trains_and_writes_what_it_promises(reference: Path):
    lines = curve(reference)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["identity_step"] for line in lines[:2]] == [1, 1] and 0 in [line["identity_step"] for line in lines]
    live, ema = tensors_of(reference), tensors_of(reference, "byg_lora-ema")
    assert all(value.abs().sum() > 0 for name, value in live.items() if "lora_B" in name), "some B has not moved"
    assert not any(torch.equal(live[n], ema[n]) for n in live)
    assert [p.name for p in checkpoint.checkpoints(reference / "checkpoints")] == ["step-000002", "step-000004", "step-000006"]
    assert not list(reference.rglob(".partial*")) and not list(reference.rglob(".probe*"))


def test_golden_keys_of_the_log(reference: Path):
    identity, edit = (next(line for line in curve(reference) if line["identity_step"] == kind) for kind in (1, 0))
    common = {"step", "loss", "identity", "grad_norm", "identity_step", "lr"}
    assert set(identity) == common
    assert set(edit) == common | {"cycle"} | {
        f"{name}_{direction}" for name in ("prior", "cosine", "mse", "zero_directions") for direction in ("fwd", "rev")
    }
    assert "seconds" in json.loads((reference / "log.jsonl").read_text().splitlines()[0])


def test_the_logged_loss_is_equation_5(reference: Path):
    for line in curve(reference):
        if not line["identity_step"]:
            wanted = line["cycle"] + line["prior_fwd"] + line["prior_rev"] + 0.2 * line["identity"]
            assert line["loss"] == pytest.approx(wanted, rel=1e-5)
            assert line["prior_fwd"] == pytest.approx(1 - line["cosine_fwd"] + 0.1 * line["mse_fwd"], rel=1e-4)


def test_metadata_has_what_readers_need_and_nothing_private(reference: Path):
    with safe_open(reference / "byg_lora-ema.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert {key: metadata[key] for key in ("byg.family", "byg.position", "byg.guidance", "byg.rank", "byg.alpha", "byg.step")} == {
        "byg.family": "flux",
        "byg.position": "same",
        "byg.guidance": "3.5",
        "byg.rank": "4",
        "byg.alpha": "4",
        "byg.step": "6",
    }
    assert metadata["byg.weights"] == "ema" and metadata["byg.base"] == "tiny-flux" and metadata["byg.resolution"] == "64"
    text = json.dumps(metadata)
    secrets = [str(workspace()), str(reference), "tuples", "photo", "snow", os.sep + "tmp", str(Path.home())]
    assert not [secret for secret in secrets if secret in text]


def test_base_name_of_a_windows_path_is_only_its_end(tmp_path: Path):
    config = run_config(tmp_path, model={"path": "C:\\Users\\me\\models\\FLUX.1-dev\\"})
    assert LoraCard.of(config, 1, "live").base == "FLUX.1-dev"


def test_a_checkpoint_holds_no_pickle(reference: Path):
    kinds = {path.suffix for path in reference.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl"}


# --- the learning rate ---


def test_learning_rate_closed_form(tmp_path: Path, reference: Path):
    config = run_config(tmp_path, train={"steps": 12, "lr_warmup_steps": 4, "lr": 1.0})
    rates = [learning_rate(config, step) for step in range(13)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0 and rates[8] == pytest.approx(0.5) and rates[12] == pytest.approx(0.0)
    assert rates[6] == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    constant = run_config(tmp_path, train={"steps": 12, "lr_warmup_steps": 0, "lr_schedule": "constant", "lr": 0.3})
    assert {learning_rate(constant, step) for step in range(12)} == {0.3}
    used = run_config(tmp_path)
    assert [line["lr"] for line in curve(reference)] == [learning_rate(used, step) for step in range(6)]


def test_the_optimizer_uses_the_schedule(tmp_path: Path):
    trainer = make_trainer(run_config(tmp_path / "out"))
    used: list[float] = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *a: (used.append(trainer.optimizer.param_groups[0]["lr"]), step(*a))  # type: ignore[method-assign]
    trainer.run()
    assert used == [learning_rate(trainer.config, k) for k in range(6)]


# --- kill -9 and resume ---

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_ema": {"objective": {"ema_decay": 0.0}},
    # Rank 128: bitsandbytes keeps moments of fewer than 4096 values in 32 bits.
    "adamw8bit": {"train": {"optimizer": "adamw8bit"}, "lora": {"rank": 128}},
    "muon": {"train": {"optimizer": "muon"}},
    "dropout_and_workers": {"lora": {"dropout": 0.2}, "dataset": {"workers": 1}},
}


def killed_in_step(trainer: Trainer, step: int) -> None:
    """In the middle of a step: after the gradients, before the optimizer."""
    original = trainer._stop_if_not_finite

    def hook(*args: Any) -> None:
        if trainer.step == step:
            kill()
        original(*args)

    trainer._stop_if_not_finite = hook  # type: ignore[method-assign]


def killed_before_rename(trainer: Trainer, step: int) -> None:
    """The checkpoint is written, but has not got its name."""
    original = os.replace

    def hook(source: Any, target: Any) -> None:
        if Path(target).name == f"step-{step:06d}":
            kill()
        original(source, target)

    os.replace = hook  # type: ignore[assignment]


def killed_after_save(trainer: Trainer, step: int) -> None:
    """The checkpoint is there, what follows it (validation) is not."""
    original = trainer._save

    def hook() -> None:
        original()
        if trainer.step == step:
            kill()

    trainer._save = hook  # type: ignore[method-assign]


def killed_in_log_line(trainer: Trainer, step: int) -> None:
    """Half a line is in the log."""

    def hook(metrics: Any, seconds: float, bar: Any, original: Any = trainer._log) -> None:
        original(metrics, seconds, bar)
        if trainer.step == step:
            with open(trainer._log_path, "a", encoding="utf-8") as file:
                file.write('{"step": 4, "lo')
            kill()

    trainer._log = hook  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("variant", "moment", "step", "left"),
    [
        ("plain", killed_in_step, 3, "step-000002"),
        ("plain", killed_in_step, 5, "step-000004"),
        ("plain", killed_before_rename, 4, "step-000002"),
        ("plain", killed_after_save, 4, "step-000004"),
        ("plain", killed_in_log_line, 5, "step-000004"),
        ("no_ema", killed_in_step, 3, "step-000002"),
        ("adamw8bit", killed_in_step, 5, "step-000004"),
        ("muon", killed_in_step, 5, "step-000004"),
        ("dropout_and_workers", killed_in_step, 5, "step-000004"),
    ],
)
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path: Path, reference: Path, variant: str, moment: Any, step: int, left: str):
    changes = VARIANTS[variant]
    if variant == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    if variant == "plain":
        whole = reference
    else:
        whole = tmp_path / "whole"
        make_trainer(run_config(whole, **changes)).run()
        assert curve(whole)[-1] != curve(reference)[-1], "the variant changes nothing"
    config = run_config(tmp_path / "out", **changes)

    def work() -> None:
        trainer = make_trainer(config)
        moment(trainer, step)
        trainer.run()

    assert in_child(work) == -signal.SIGKILL
    found = checkpoint.checkpoints(tmp_path / "out" / "checkpoints")
    if variant == "adamw8bit":
        assert torch.uint8 in {value.dtype for value in load_file(found[-1] / checkpoint.TENSORS).values()}
    assert found[-1].name == left and not (tmp_path / "out" / "byg_lora.safetensors").exists()
    make_trainer(config, "latest").run()
    assert_same_run(tmp_path / "out", whole, ema=variant != "no_ema")
    assert not list((tmp_path / "out").rglob(".partial*"))


def test_muon_needs_a_torch_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = run_config(tmp_path / "out", train={"optimizer": "muon"})
    extras.require_training_extras(config)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r'train.optimizer = "muon" needs torch 2.9.*set train.optimizer = "adamw"'):
        extras.require_training_extras(config)


def test_muon_s_first_update_is_as_long_as_adamw_s_would_be(tmp_path: Path):
    """Orthogonal and scaled to a root mean square of 0.2 of the learning rate, whatever the gradient's size."""
    lr = 1e-2
    train = {"optimizer": "muon", "steps": 1, "weight_decay": 0.0, "lr": lr, "lr_warmup_steps": 0, "lr_schedule": "constant"}
    trainer = make_trainer(run_config(tmp_path / "out", train=train))
    before = {name: p.detach().clone() for name, p in trainer.host.parameters.items()}
    trainer.run()
    moved = [p.detach() - before[n] for n, p in trainer.host.parameters.items() if n.endswith("lora_B.weight")]
    sizes = torch.tensor([delta.square().mean().sqrt() for delta in moved if delta.any()])
    assert len(sizes) > 4
    assert ((sizes / lr > 0.05) & (sizes / lr < 0.25)).all(), sizes / lr


def test_a_resumed_run_depends_on_the_moments(tmp_path: Path, reference: Path):
    """The comparison above would see a lost optimizer state."""
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    shutil.rmtree(out / "checkpoints" / "step-000006")
    trainer = make_trainer(run_config(out), "latest")
    for values in trainer.optimizer.state.values():
        values["exp_avg"].zero_()
    trainer.run()
    a, b = tensors_of(out), tensors_of(reference)
    assert not all(torch.equal(a[n], b[n]) for n in a)


def test_a_loader_process_gives_the_same_run(tmp_path: Path, reference: Path):
    make_trainer(run_config(tmp_path / "out", dataset={"workers": 1})).run()
    assert_same_run(tmp_path / "out", reference)


def test_an_optimizer_step_is_the_mean_over_its_micro_steps(tmp_path: Path):
    """Also through the reverse pass, whose gradient at y_0 must not be scaled twice."""
    settings = {
        "train": {"global_batch_size": 3, "max_grad_norm": 0.0},
        "objective": {"identity_warmup_steps": 0, "identity_probability": 0.0},
    }
    trainer = make_trainer(run_config(tmp_path / "out", **settings))
    assert trainer.accumulation == 3
    wake(trainer.host)
    micro_batches = next(trainer._loader())
    total = {name: torch.zeros_like(p) for name, p in trainer.host.parameters.items()}

    def plain(loss: torch.Tensor, *, last: bool) -> float:
        loss.backward()
        return 1.0

    for position, examples in enumerate(micro_batches):
        batch = trainer._batch(examples, generator(trainer.config.train.seed, "noise", position), identity_step=False)
        trainer.objective.step(trainer.host, batch, plain)
        for name, parameter in trainer.host.parameters.items():
            assert parameter.grad is not None
            total[name] += parameter.grad / 3
            parameter.grad = None
    taken: dict[str, torch.Tensor] = {}

    def take(*args: Any) -> None:
        taken.update({name: p.grad.clone() for name, p in trainer.host.parameters.items() if p.grad is not None})

    trainer.optimizer.step = take  # type: ignore[method-assign]
    metrics = trainer._optimizer_step(micro_batches)
    for name, wanted in total.items():
        torch.testing.assert_close(taken[name], wanted, rtol=1e-4, atol=1e-6)
    norm = torch.stack([wanted.norm() for wanted in total.values()]).norm()
    assert metrics["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-4)


def test_an_epoch_shows_every_tuple(tmp_path: Path):
    trainer = make_trainer(run_config(tmp_path / "out", train={"global_batch_size": 5, "steps": 3}))
    for group in trainer._loader():
        assert sorted(i for micro in group for i in micro["index"]) == [0, 1, 2, 3, 4]


# --- signals and the real command ---


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


def start(toml: Path, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "ab") as file:
        command = [sys.executable, str(ROOT / "byg_plugin/train_network.py"), "--config", str(toml), *arguments]
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=toml.parent, env=environment)


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


def test_sigterm_saves_and_a_second_one_stops_at_once(tmp_path: Path):
    config = run_config(tmp_path / "out", train={"save_every": 0})

    def work(signals: int) -> None:
        trainer = make_trainer(config)
        original = trainer._stop_if_not_finite

        def hook(*args: Any) -> None:
            original(*args)
            for _ in range(signals if trainer.step == 2 else 0):
                os.kill(os.getpid(), signal.SIGTERM)

        trainer._stop_if_not_finite = hook  # type: ignore[method-assign]
        try:
            trainer.run()
        except loop.Interrupted:
            raise SystemExit(11) from None
        except KeyboardInterrupt:
            raise SystemExit(12) from None

    assert in_child(lambda: work(1)) == 11
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "out/checkpoints")] == ["step-000003"]
    shutil.rmtree(tmp_path / "out")
    assert in_child(lambda: work(2)) == 12
    assert checkpoint.checkpoints(tmp_path / "out/checkpoints") == []


def test_ctrl_c_reaches_the_whole_group_and_the_loader_process_leaves_it_to_the_trainer(tmp_path: Path):
    config = run_config(tmp_path / "out", dataset={"workers": 1}, train={"save_every": 0})

    def work() -> None:
        os.setpgid(0, 0)  # a terminal's Ctrl-C goes to a group; not to pytest's
        trainer = make_trainer(config)
        original = trainer._stop_if_not_finite

        def hook(*args: Any) -> None:
            original(*args)
            if trainer.step == 2:
                os.killpg(0, signal.SIGINT)
                time.sleep(0.3)  # for the loader process to fall over

        trainer._stop_if_not_finite = hook  # type: ignore[method-assign]
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


# --- checkpoints on a bad disk ---


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("Error while serializing: I/O error")])
@pytest.mark.parametrize("file", ["byg_lora.safetensors", "training.safetensors"])
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, file: str):
    out = tmp_path / "out"
    trainer = make_trainer(run_config(out))
    original = checkpoint.save_file

    def full(tensors: Any, path: Path, **options: Any) -> None:
        if "step-000004" in str(path) and Path(path).name == file:
            Path(path).write_bytes(b"half")
            raise error
        original(tensors, path, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ValueError, match="cannot write .*step-000004.*the last complete checkpoint is .*step-000002.*--resume latest"):
        trainer.run()
    monkeypatch.undo()
    assert [p.name for p in checkpoint.checkpoints(out / "checkpoints")] == ["step-000002"]
    assert not list(out.rglob(".partial*"))
    make_trainer(run_config(out), "latest").run()


def test_keep_last(tmp_path: Path):
    make_trainer(run_config(tmp_path / "out", train={"keep_last": 2, "save_every": 1})).run()
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "out/checkpoints")] == ["step-000005", "step-000006"]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    original = os.replace

    def busy(source: Any, target: Any) -> None:
        if Path(source).name == "step-000002":
            raise PermissionError(13, "in use")
        original(source, target)

    monkeypatch.setattr(os, "replace", busy)
    make_trainer(run_config(tmp_path / "out", train={"keep_last": 1})).run()
    assert (tmp_path / "out/byg_lora.safetensors").exists()


def test_a_damaged_checkpoint_is_named(tmp_path: Path, reference: Path):
    shutil.copytree(reference, tmp_path / "out")
    newest = tmp_path / "out/checkpoints/step-000006"
    (newest / "training.safetensors").write_bytes(b"xx")
    with pytest.raises(ValueError, match="step-000006 is damaged"):
        make_trainer(run_config(tmp_path / "out"), "latest")
    (newest / "state.json").unlink()
    with pytest.raises(ValueError, match="is not a checkpoint"):
        make_trainer(run_config(tmp_path / "out"), "latest")


# --- what cannot go on ---


def test_existing_output_without_resume_is_refused_and_untouched(tmp_path: Path, reference: Path):
    shutil.copytree(reference, tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="already has checkpoints up to step-000006: go on with --resume latest"):
        make_trainer(run_config(tmp_path / "out"))
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_resume_latest_of_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="--resume latest: no checkpoint in"):
        make_trainer(run_config(tmp_path / "out"), "latest")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 8}}, "lora.rank: 4 -> 8"),
        ({"conditioning": {"position": "kontext"}}, "conditioning.position: 'same' -> 'kontext'"),
        ({"train": {"optimizer": "adamw8bit"}}, "train.optimizer: 'adamw' -> 'adamw8bit'"),
        ({"lora": {"targets": r"transformer_blocks\.0\.attn\.to_q"}}, "lora.targets: None -> "),
    ],
)
def test_resume_with_another_model_is_refused(tmp_path: Path, reference: Path, changes: dict[str, Any], message: str):
    shutil.copytree(reference, tmp_path / "out")
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer(run_config(tmp_path / "out", **changes), "latest")


def test_resume_from_an_earlier_checkpoint_would_overwrite_a_later_one(tmp_path: Path, reference: Path):
    shutil.copytree(reference, tmp_path / "out")
    with pytest.raises(ValueError, match="has the later checkpoint step-000006.*add --discard-later"):
        make_trainer(run_config(tmp_path / "out"), str(tmp_path / "out/checkpoints/step-000002"))
    # Into a new folder it goes, and ends where the first run ended.
    make_trainer(run_config(tmp_path / "new"), str(tmp_path / "out/checkpoints/step-000002")).run()
    a, b = tensors_of(tmp_path / "new"), tensors_of(reference)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_finished_run_resumes_to_itself(tmp_path: Path, reference: Path):
    shutil.copytree(reference, tmp_path / "out")
    make_trainer(run_config(tmp_path / "out"), "latest").run()
    assert_same_run(tmp_path / "out", reference)


def test_a_finished_run_resumes_into_another_folder(tmp_path: Path, reference: Path):
    make_trainer(run_config(tmp_path / "new"), str(reference / "checkpoints/step-000006")).run()
    a, b = tensors_of(tmp_path / "new"), tensors_of(reference)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_an_ema_can_be_switched_on_in_a_resumed_run(tmp_path: Path):
    make_trainer(run_config(tmp_path / "out", objective={"ema_decay": 0.0}, train={"steps": 2})).run()
    trainer = make_trainer(run_config(tmp_path / "out"), "latest")
    for name, value in trainer.host.ema_weights.state().items():
        assert torch.equal(value, trainer.host.parameters[name])
    trainer.run()


def test_unwritable_output(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"output.dir = .*file.* is not writable"):
        make_trainer(run_config(tmp_path / "file" / "out"))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path, where: str):
    trainer = make_trainer(run_config(tmp_path / "out"))
    original = trainer.objective.step
    moments: list[Any] = []

    def broken(fields: Any, batch: Any, backward: Any) -> Any:
        if trainer.step < 3:
            return original(fields, batch, backward)
        moments[:] = [
            {n: p.detach().clone() for n, p in trainer.host.parameters.items()},
            [v["exp_avg"].clone() for v in trainer.optimizer.state.values()],
            {n: v.clone() for n, v in trainer.host.ema_weights.state().items()},
        ]
        if where == "loss":
            return original(fields, batch, backward) | {"cycle": torch.tensor(float("nan"))}

        def infinite(loss: torch.Tensor, *, last: bool) -> float:
            return backward(loss * 1e38 * 1e10, last=last)

        return {k: v for k, v in original(fields, batch, infinite).items() if k == "identity"}

    trainer.objective.step = broken  # type: ignore[method-assign]
    term = {"loss": "cycle", "gradient": "gradient norm"}[where]
    with pytest.raises(FloatingPointError, match=f"{term} is not finite at step 4; the weights were not changed.*step-000002"):
        trainer.run()
    weights, exp_avg, ema = moments
    assert all(torch.equal(p, weights[n]) for n, p in trainer.host.parameters.items())
    assert all(torch.equal(a["exp_avg"], b) for a, b in zip(trainer.optimizer.state.values(), exp_avg, strict=True))
    assert all(torch.equal(v, ema[n]) for n, v in trainer.host.ema_weights.state().items())
    assert [line["step"] for line in curve(tmp_path / "out")] == [1, 2, 3]


# --- previews and validation ---


def test_previews_are_written_and_change_nothing(tmp_path: Path, reference: Path):
    out = tmp_path / "out"
    make_trainer(run_config(out, sample={"every": 4, "items": 2, "steps": 2})).run()
    assert_same_run(out, reference)
    folders = sorted(p.name for p in (out / "previews").iterdir())
    assert folders == ["step-000000", "step-000004", "step-000006"]
    files = {name: sorted(p.name for p in (out / "previews" / name).iterdir()) for name in folders}
    assert set(map(tuple, files.values())) == {("000.png", "001.png")}
    first, last = ((out / "previews" / name / "000.png").read_bytes() for name in (folders[0], folders[-1]))
    assert first != last


def test_previews_have_fixed_seeds_and_the_asked_weights(tmp_path: Path):
    def pictures(step: int, **sample: Any) -> list[np.ndarray]:
        config = run_config(tmp_path / "out", sample={"items": 2, "steps": 2} | sample)
        torch.manual_seed(step)  # the run's own random state must not matter
        preview.write(config, trainer.family, trainer.host, trainer.data, step, trainer.accelerator)
        return [np.asarray(Image.open(path)) for path in sorted(preview.folder(config, step).glob("*.png"))]

    trainer = make_trainer(run_config(tmp_path / "out"))
    wake(trainer.host)
    one, two = pictures(1), pictures(2)
    assert len(one) == 2 and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], pictures(3, weights="live")[0])
    assert not np.array_equal(one[0], pictures(4, seed=9)[0])
    assert np.array_equal(one[0][:, :64], np.asarray(pictures(5, weights="live")[0])[:, :64]), "the source stands on the left"


def test_a_failing_preview_does_not_end_the_run(tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def broken(*args: Any) -> None:
        calls.append(args)
        with args[2].ema():
            raise RuntimeError("out of memory")

    monkeypatch.setattr(preview, "_render", broken)
    make_trainer(run_config(tmp_path / "out", sample={"every": 2})).run()
    assert len(calls) == 4, "step 0, 2, 4, 6"
    assert_same_run(tmp_path / "out", reference)


VALIDATED = {"dataset": {"validation_items": 1}, "train": {"validate_every": 2}}


def test_validation_is_deterministic_and_disturbs_nothing(tmp_path: Path):
    for name, validate in (("with", 2), ("again", 2), ("without", 0)):
        changes = {"dataset": {"validation_items": 1}, "train": {"validate_every": validate}, "lora": {"dropout": 0.3}}
        make_trainer(run_config(tmp_path / name, **changes)).run()
    assert_same_run(tmp_path / "with", tmp_path / "without")
    lines = curve(tmp_path / "with", "validation.jsonl")
    assert lines == curve(tmp_path / "again", "validation.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert {"validation/loss", "validation/cycle", "validation/cosine_fwd"} <= lines[0].keys()
    assert len({line["validation/loss"] for line in lines}) == 3
    assert not (tmp_path / "without/validation.jsonl").exists()


def test_validation_has_no_dropout(tmp_path: Path):
    trainer = make_trainer(run_config(tmp_path / "out", **VALIDATED, lora={"dropout": 0.5}))
    for parameter in trainer.host.parameters.values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.2)
    trainer._validate()
    trainer._validate()
    one, two = curve(tmp_path / "out", "validation.jsonl")
    assert one == two


def test_a_kill_between_save_and_validation_costs_no_validation(tmp_path: Path):
    make_trainer(run_config(tmp_path / "whole", **VALIDATED)).run()
    config = run_config(tmp_path / "out", **VALIDATED)

    def work() -> None:
        trainer = make_trainer(config)
        killed_after_save(trainer, 4)
        trainer.run()

    assert in_child(work) == -signal.SIGKILL
    make_trainer(config, "latest").run()
    assert curve(tmp_path / "out", "validation.jsonl") == curve(tmp_path / "whole", "validation.jsonl")
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_a_kill_after_validation_repeats_no_line(tmp_path: Path):
    make_trainer(run_config(tmp_path / "whole", **VALIDATED)).run()
    config = run_config(tmp_path / "out", **VALIDATED)

    def work() -> None:
        trainer = make_trainer(config)
        original = trainer._validate
        trainer._validate = lambda: (original(), kill() if trainer.step == 4 else None)  # type: ignore[method-assign]
        trainer.run()

    assert in_child(work) == -signal.SIGKILL
    # The newer checkpoint is lost too: its validation line is about to be made again.
    shutil.rmtree(tmp_path / "out/checkpoints/step-000004")
    make_trainer(config, "latest").run()
    assert curve(tmp_path / "out", "validation.jsonl") == curve(tmp_path / "whole", "validation.jsonl")


# --- identity coin, paired baseline ---


def test_identity_steps_follow_warm_up_and_coin(tmp_path: Path):
    config = run_config(tmp_path / "out", objective={"identity_warmup_steps": 3, "identity_probability": 0.5})
    trainer = make_trainer(config)
    kinds = []
    for trainer.step in range(200):
        kinds.append(trainer._is_identity_step())
    assert all(kinds[:3])
    assert kinds[3:] == [coin(0, step, 0.5) for step in range(3, 200)]
    assert 0.4 < sum(kinds[3:]) / 197 < 0.6
    never = make_trainer(run_config(tmp_path / "never", objective={"identity_warmup_steps": 0, "identity_probability": 0.0}))
    assert not any(never._is_identity_step() for never.step in range(50))


def test_paired_needs_targets(tmp_path: Path):
    with pytest.raises(ValueError, match="needs a `target`"):
        make_trainer(run_config(tmp_path / "out", objective={"name": "paired"}))


def test_tensorboard_gets_the_curve_and_the_previews(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = run_config(tmp_path / "out", train={"tracker": "tensorboard", "steps": 2}, sample={"every": 2, "items": 1, "steps": 1})
    train(config)
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    logged = curve(tmp_path / "out")
    assert [e.value for e in reader.Scalars("loss")] == pytest.approx([line["loss"] for line in logged])
    assert "preview/0" in reader.Tags()["images"]
