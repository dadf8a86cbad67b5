"""The section `[critic]`: for objectives that ask one, and none else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from byg_plugin.config.critic import CriticConfig
from tests.support.tiny import tiny_config


@pytest.mark.parametrize("key", list(CriticConfig.model_fields))
def test_where_nothing_asks_a_critic_its_keys_are_refused(key: str, tmp_path: Path):
    value: Any = {"path": "x", "dtype": "float32", "quantization": "nf4", "device": "cpu"}.get(key, 32)
    value = {"gradient_checkpointing": False, "least_accuracy": 0.5, "scale_from": 0.5}.get(key, value)
    with pytest.raises(ValueError, match=f"critic.{key} is for objectives that ask a critic, .* asks none: leave it out"):
        tiny_config(tmp_path, critic={key: value})
    tiny_config(tmp_path, critic={key: CriticConfig.model_fields[key].default})


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps"])
def test_a_device_is_one_of_torchs(device: str):
    with pytest.raises(ValueError, match="device"):
        CriticConfig(device=device)
    assert CriticConfig(device="cuda:1").device == "cuda:1"
