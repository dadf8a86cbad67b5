"""What `accelerate launch` asks for and no host does is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from byg_plugin import train_network
from byg_plugin.models.flux import FluxFamily
from byg_plugin.training.launch import check_launch, check_processes
from tests.support import tiny

ASKED = {
    ("ACCELERATE_USE_DEEPSPEED", "true"): "asks for DeepSpeed, .* run plain multi-GPU",
    ("ACCELERATE_USE_FSDP", "true"): "asks for FSDP",
    ("ACCELERATE_USE_MEGATRON_LM", "1"): "asks for Megatron",
    ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"): "asks for dynamo, inside which the LoRA cannot be taken off: answer NO",
    ("ACCELERATE_MIXED_PRECISION", "fp16"): 'asks for mixed precision "fp16", train.mixed_precision is "no": set one of them',
}


@pytest.mark.parametrize(("variable", "value"), ASKED)
def test_the_embedded_host_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str):
    monkeypatch.setenv(variable, value)
    config = tiny.run_config(tmp_path / "out")
    with pytest.raises(ValueError, match=ASKED[variable, value]):
        train_network.train(config, FluxFamily(config), torch.device("cpu"), None)
    assert not (tmp_path / "out").exists()


def test_what_asks_for_nothing_is_accepted(monkeypatch: pytest.MonkeyPatch):
    for variable, _ in ASKED:
        monkeypatch.setenv(variable, {"ACCELERATE_DYNAMO_BACKEND": "no", "ACCELERATE_MIXED_PRECISION": "bf16"}.get(variable, "false"))
    check_launch("train.mixed_precision", "bf16")
    check_launch("musubi.mixed_precision", None)  # follows the launcher
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_launch("train.mixed_precision", "bf16")


def test_processes_that_are_not_plain_are_refused():
    for kind in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU"):
        check_processes(SimpleNamespace(distributed_type=SimpleNamespace(value=kind)))
    for kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"):
        with pytest.raises(ValueError, match=f"asks for {kind}, under which"):
            check_processes(SimpleNamespace(distributed_type=SimpleNamespace(value=kind)))
