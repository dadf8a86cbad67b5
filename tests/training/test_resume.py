"""What a kill or a full disk must not cost, and from what a run resumes."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from byg_plugin.config.sections import Config
from byg_plugin.models import make_family
from byg_plugin.training import checkpoint, resume
from byg_plugin.training.loop import Trainer
from tests.support.checkpoint_damage import state_changed
from tests.support.tiny import curve, fill_caches, in_child, make_trainer, run_config, tiny_config, write_tuples
from tests.support.tiny_qwen import qwen_folder
from tests.support.training_runs import assert_same_run, kill, killed_after_save, killed_in_step, tensors_of

# --- kill -9 and resume ---

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_ema": {"objective": {"ema_decay": 0.0}},
    # Rank 128: bitsandbytes keeps moments of fewer than 4096 values in 32 bits.
    "adamw8bit": {"train": {"optimizer": "adamw8bit"}, "lora": {"rank": 128}},
    "muon": {"train": {"optimizer": "muon"}},
    "dropout_and_workers": {"lora": {"dropout": 0.2}, "dataset": {"workers": 1}},
}


def killed_before_rename(trainer: Trainer, step: int) -> None:
    """The checkpoint is written, but has not got its name."""
    original = os.replace

    def hook(source: Any, target: Any) -> None:
        if Path(target).name == f"step-{step:06d}":
            kill()
        original(source, target)

    os.replace = hook  # type: ignore[assignment]


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


def test_a_resumed_run_depends_on_the_moments(tmp_path: Path, reference: Path):
    """The comparison above would see a lost optimizer state."""
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    shutil.rmtree(out / "checkpoints" / "step-000006")
    trainer = make_trainer(run_config(out), "latest")
    for values in trainer.engine.optimizers["edit"].state.values():
        values["exp_avg"].zero_()
    trainer.run()
    a, b = tensors_of(out), tensors_of(reference)
    assert not all(torch.equal(a[n], b[n]) for n in a)


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


def test_what_is_left_of_an_old_checkpoint_does_not_end_the_run_at_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On a network's disk a file that another program has open stays, under another name, and its folder with it."""
    original = shutil.rmtree

    def busy(path: Any, **options: Any) -> None:
        if Path(path).name.startswith(".partial-old-step-000002"):
            raise OSError(39, "Directory not empty")
        original(path, **options)

    monkeypatch.setattr(shutil, "rmtree", busy)
    make_trainer(run_config(tmp_path / "out", train={"keep_last": 1})).run()
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out/checkpoints")] == ["step-000006"]
    monkeypatch.undo()
    make_trainer(run_config(tmp_path / "out", train={"keep_last": 1, "steps": 8}), "latest").run()
    assert not [path.name for path in (tmp_path / "out/checkpoints").iterdir() if path.name.startswith(".partial")]


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


def test_a_key_that_the_checkpoint_does_not_know_is_a_change_where_it_is_set(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """What an earlier version did not have was as its default is."""
    plain, chosen = run_config(tmp_path / "out"), run_config(tmp_path / "out", objective={"rollout_solver": "ab2"})
    saved = plain.model_dump(mode="json")
    del saved["objective"]["rollout_solver"], saved["critic"], saved["train"]["betas"]
    with caplog.at_level(logging.WARNING):
        resume._check_same_run(plain, saved)
        where = {"cache_dir": "moved", "workers": 2, "cache_batch_size": 3}
        resume._check_same_run(run_config(tmp_path / "out", dataset=where), saved)
        assert not [line for line in caplog.messages if "train.betas" not in line]
        resume._check_same_run(chosen, saved)
        resume._check_same_run(run_config(tmp_path / "out", dataset={"image_root": "elsewhere"}), saved)
    assert "objective.rollout_solver was None and is now 'ab2'" in caplog.text
    assert "dataset.image_root was None and is now" in caplog.text, "other pictures may have the same names"


# A text's stream of the last block: nothing is read of it.
WITH_TEXT = r"transformer_blocks\.\d+\.attn\.(to_q|to_add_out)"


def test_parameters_that_no_gradient_reaches_do_not_hinder_going_on(tmp_path: Path):
    write_tuples(tmp_path)

    def config(out: str, steps: int) -> Config:
        return tiny_config(
            tmp_path,
            model={"family": "qwen-image", "path": str(qwen_folder())},
            lora={"targets": WITH_TEXT},
            objective={"rollout_steps": 2, "identity_warmup_steps": 1, "ema_decay": 0.9},
            train={"steps": steps, "save_every": 2, "keep_last": 0, "lr_schedule": "constant"},
            output={"dir": str(tmp_path / out)},
        )

    fill_caches(config("whole", 4))
    make_trainer(config("whole", 4)).run()
    trainer = make_trainer(config("halves", 2))
    trainer.run()
    idle = [name for name, p in trainer.host.parameters.items() if not trainer.engine.optimizers["edit"].state.get(p)]
    assert {name.split(".")[2] + name.split(".")[4] for name in idle} == {"1to_add_out"}
    make_trainer(config("halves", 4), "latest").run()
    a, b = tensors_of(tmp_path / "halves"), tensors_of(tmp_path / "whole")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    # DeepSpeed's ZeRO-1/2 would move them, and says so before anything is loaded.
    again = config("halves", 6)
    family = make_family(again)
    with pytest.raises(ValueError, match="to_add_out.lora_A.weight has no gradient, and DeepSpeed ZeRO-1/2 would move it"):
        resume.load_start(tmp_path / "halves/checkpoints/step-000004", again, family, trainer.objective, "", torch.device("cpu"), stage=2)
    # Damage is told from these, also where all are said to have no state.
    spoilt = tmp_path / "halves/checkpoints/step-000004" / checkpoint.TENSORS
    whole = load_file(spoilt)
    shutil.copytree(tmp_path / "halves", tmp_path / "lacking")
    state_changed(lambda record: record["optimizer"].update(idle=list(range(99))))(tmp_path / "lacking")
    lacking = {name: value for name, value in whole.items() if name != "edit/optimizer/0/exp_avg"}
    save_file(lacking, tmp_path / "lacking/checkpoints/step-000004" / checkpoint.TENSORS)
    with pytest.raises(ValueError, match="to_q.lora_A.weight/exp_avg is missing"):
        make_trainer(config("lacking", 6), "latest")
    for damage, message in (
        (lambda record: record["optimizer"].pop("idle"), "to_add_out.lora_A.weight/.* is missing"),
        (lambda record: record["optimizer"].update(idle=[True]), "idle = a list is no list of parameters' numbers"),
    ):
        shutil.rmtree(tmp_path / "spoilt", ignore_errors=True)
        shutil.copytree(tmp_path / "halves", tmp_path / "spoilt")
        state_changed(damage)(tmp_path / "spoilt")
        with pytest.raises(ValueError, match=message):
            make_trainer(config("spoilt", 6), "latest")
