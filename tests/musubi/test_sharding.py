"""The host's frozen base in shards: the same LoRA as plain processes train."""

from __future__ import annotations

import logging
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.engine_runs import in_processes
from tests.support.musubi_host import T2V, needs_host
from tests.support.musubi_images import ZIMAGE
from tests.support.musubi_runs import run_here, write_config, write_work

pytestmark = needs_host
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
_prepare = accelerate.Accelerator.prepare_model


def prepare_model(self: Any, model: nn.Module, device_placement: Any = None, evaluation_mode: bool = False) -> nn.Module:
    """On CPUs accelerate hands a frozen model to DDP too, which refuses it; on GPUs it looks whether it is frozen."""
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    return _prepare(self, model, device_placement=device_placement, evaluation_mode=evaluation_mode or frozen)


def train(config: Path, environment: dict[str, str]) -> None:
    accelerate.Accelerator.prepare_model = prepare_model
    os.environ.update(environment)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)  # not pytest's
    run_here(config)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["flux", T2V, ZIMAGE])
def test_the_lora_is_that_of_plain_processes(tmp_path: Path, family: str):
    write_work(tmp_path, family, items=4)
    engines = {"plain": {}, "fsdp2": FSDP, **({"zero3": DEEPSPEED} if find_spec("deepspeed") else {})}
    # DeepSpeed's hooks change the order in which autograd adds up an input's gradients. What is left of that in float32 is rounding, which
    # Adam would blow up where a gradient is nothing else.
    exact = {"mixed_precision": "no", "optimizer_type": "SGD", "learning_rate": 0.05}
    for name, environment in engines.items():
        config = write_config(tmp_path, family, name, max_train_steps=3, **exact)
        in_processes(2, partial(train, config, environment), tmp_path / "logs")
    plain = load_file(tmp_path / "plain/tiny-ema.safetensors")
    for name in list(engines)[1:]:
        said = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "logs").iterdir())
        assert f"engine: {({'fsdp2': 'FSDP2', 'zero3': 'ZeRO-3'})[name]}, base held by rank 1" in said
        made = load_file(tmp_path / name / "tiny-ema.safetensors")
        assert made.keys() == plain.keys() and max(float((made[key] - plain[key]).abs().max()) for key in plain) <= 5e-6, name
    assert any(float(value.abs().max()) > 1e-4 for key, value in plain.items() if "lora_up" in key)
    assert torch.isfinite(next(iter(plain.values()))).all()
