"""The host's frozen base in shards: the same LoRA as plain processes train; what cannot be in shards there is refused."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from byg_plugin.musubi.launch import read_host_launch
from byg_plugin.training.launch import Launch
from tests.support.engine_runs import in_processes
from tests.support.musubi_host import A14B, T2V, host_config, needs_host
from tests.support.musubi_runs import run_here, write_config, write_work

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def arguments(**given: Any) -> SimpleNamespace:
    known: dict[str, Any] = {
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 1.0,
    }
    return SimpleNamespace(**(known | given))


def read(tmp_path: Path, environment: dict[str, str], family: str = "flux", **given: Any) -> Launch:
    return read_host_launch(host_config(tmp_path, family), arguments(**given), environment)


def test_what_the_launcher_asks_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("byg_plugin.musubi.launch.require", lambda *names: None)
    assert read(tmp_path, {}) == Launch()
    assert read(tmp_path, FSDP).name == "FSDP2" and read(tmp_path, DEEPSPEED).name == "ZeRO-3"


REFUSED: list[tuple[dict[str, str], str, dict[str, Any], str]] = [
    (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "flux", {}, "stage = 2 shards the LoRA's optimizer, which is the host's own"),
    (DEEPSPEED | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "flux", {}, "= 4, and musubi.gradient_accumulation_steps = 2"),
    (DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "flux", {}, "gradient_clipping = 0.5, and musubi.max_grad_norm = 1.0"),
    (FSDP, A14B, {}, "musubi-tuner exchanges the two experts' weights whole"),
    (FSDP, "flux", {"blocks_to_swap": 4}, "musubi.blocks_to_swap = 4: shards can be offloaded themselves"),
    (FSDP, "flux", {"fp8_base": True}, "musubi.fp8_base = True"),
    (FSDP, "flux", {"compile": True}, "musubi.compile = True"),
    (FSDP, "flux", {"sample_prompts": "prompts.txt"}, "musubi.sample_prompts = 'prompts.txt': the host shares the previews out"),
    (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "flux", {}, "and musubi.gradient_checkpointing = false"),
]


@pytest.mark.parametrize(("environment", "family", "given", "says"), REFUSED)
def test_what_cannot_be_in_shards_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], family: str, given: dict[str, Any], says: str
):
    monkeypatch.setattr("byg_plugin.musubi.launch.require", lambda *names: None)
    with pytest.raises(ValueError, match=says):
        read(tmp_path, environment, family, **given)


_prepare = accelerate.Accelerator.prepare_model


def prepare_model(self: Any, model: nn.Module, device_placement: Any = None, evaluation_mode: bool = False) -> nn.Module:
    """On CPUs accelerate hands a frozen model to DDP too, which refuses it; on GPUs it looks whether it is frozen."""
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    return _prepare(self, model, device_placement=device_placement, evaluation_mode=evaluation_mode or frozen)


def train(config: Path, environment: dict[str, str]) -> None:
    accelerate.Accelerator.prepare_model = prepare_model
    os.environ.update(environment)
    run_here(config)


@needs_host
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["flux", T2V])
def test_the_lora_is_that_of_plain_processes(tmp_path: Path, family: str):
    write_work(tmp_path, family, items=4)
    engines = {"plain": {}, "fsdp2": FSDP, **({"zero3": DEEPSPEED} if find_spec("deepspeed") else {})}
    for name, environment in engines.items():
        config = write_config(tmp_path, family, name, max_train_steps=3)
        in_processes(2, lambda config=config, environment=environment: train(config, environment), tmp_path / "logs")  # type: ignore[misc]
    plain = load_file(tmp_path / "plain/tiny-ema.safetensors")
    for name in list(engines)[1:]:
        said = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "logs").iterdir())
        assert f"engine: {({'fsdp2': 'FSDP2', 'zero3': 'ZeRO-3'})[name]}, base held by rank 1" in said
        made = load_file(tmp_path / name / "tiny-ema.safetensors")
        assert made.keys() == plain.keys() and max(float((made[key] - plain[key]).abs().max()) for key in plain) <= 5e-6, name
    assert any(float(value.abs().max()) > 1e-4 for key, value in plain.items() if "lora_up" in key)
    assert torch.isfinite(next(iter(plain.values()))).all()
