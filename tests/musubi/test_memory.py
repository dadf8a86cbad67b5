"""Inside the real musubi-tuner: its options of memory and optimizers, 8-bit weights, compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from byg_plugin.musubi import trainer as musubi_trainer
from tests.support.musubi_host import A14B, T2V, needs_host
from tests.support.musubi_images import MASKED, ZIMAGE
from tests.support.musubi_runs import run_here, write_config, write_work

pytestmark = needs_host


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True, "gradient_checkpointing_cpu_offload": True},
        {"split_attn": True, "gradient_accumulation_steps": 2, "max_train_steps": 2},
        {"network_dropout": 0.1, "gradient_checkpointing": True, "network_args": ["rank_dropout=0.1", "module_dropout=0.1"]},
        {"offload_inactive_dit": True, "gradient_checkpointing": True},
        {"lr_scheduler": "cosine", "lr_warmup_steps": "10%", "max_grad_norm": 0.5, "optimizer_args": ["weight_decay=0.1"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_memory_and_optimizer_options_run(tmp_path: Path, options: dict[str, Any]):
    write_work(tmp_path, A14B)
    saved = run_here(write_config(tmp_path, A14B, **options))
    assert all(value.isfinite().all() for value in load_file(saved).values())


@pytest.mark.parametrize(
    ("family", "scaled"),
    [
        (A14B, True),
        ("flux", True),
        ("flux", False),
        (ZIMAGE, False),
        *((family, True) for family in MASKED),
    ],  # unscaled, the host's Wan needs an autocast to float32, which a CPU has not
)
def test_a_base_of_8_bit_weights(tmp_path: Path, family: str, scaled: bool, monkeypatch: pytest.MonkeyPatch):
    write_work(tmp_path, family)
    dtypes: set[torch.dtype] = set()
    plain = musubi_trainer.UnpairedCycleTrainer.on_train_start

    def look(self: Any, args: Any, accelerator: Any, network: Any, transformer: Any, *rest: Any) -> None:
        dtypes.update(parameter.dtype for parameter in transformer.parameters())
        plain(self, args, accelerator, network, transformer, *rest)

    monkeypatch.setattr(musubi_trainer.UnpairedCycleTrainer, "on_train_start", look)
    options = {"fp8_base": True, "fp8_scaled": scaled, "mixed_precision": "bf16", "gradient_checkpointing": True}
    saved = run_here(write_config(tmp_path, family, max_train_steps=2, **options))
    weights = load_file(saved)
    assert torch.float8_e4m3fn in dtypes and all(value.isfinite().all() for value in weights.values())
    assert any(value.abs().max() > 1e-4 for name, value in weights.items() if "lora_up" in name)


@pytest.mark.timeout(1800)
def test_a_compiled_network_gives_the_same(tmp_path: Path):
    write_work(tmp_path, T2V, items=1)
    plain = load_file(run_here(write_config(tmp_path, T2V, "plain")))
    compiled = load_file(run_here(write_config(tmp_path, T2V, "compiled", compile=True, compile_backend="eager")))
    assert all(torch.allclose(plain[name], compiled[name], atol=1e-5) for name in plain)
