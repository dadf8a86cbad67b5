"""What a run writes: LoRA, metadata, log lines, TensorBoard."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from byg_plugin.lora.metadata import lora_metadata
from byg_plugin.training import checkpoint
from tests.support.tiny import curve, run_config, workspace
from tests.support.training_runs import tensors_of, train


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
    assert lora_metadata(config, 1, "live")["byg.base"] == "FLUX.1-dev"


def test_a_checkpoint_holds_no_pickle(reference: Path):
    kinds = {path.suffix for path in reference.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl"}


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
