"""What the launcher asks of musubi-tuner: its frozen base in shards, or what is refused there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from byg_plugin.musubi.launch import read_host_launch
from byg_plugin.training.launch import Launch
from tests.support.musubi_host import A14B, host_config

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
    return read_host_launch(host_config(tmp_path, family).model, arguments(**given), environment)


def test_what_the_launcher_asks_of_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("byg_plugin.musubi.launch.require_deepspeed", lambda *names: None)
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
    monkeypatch.setattr("byg_plugin.musubi.launch.require_deepspeed", lambda *names: None)
    with pytest.raises(ValueError, match=says):
        read(tmp_path, environment, family, **given)
