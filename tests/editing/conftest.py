"""A LoRA that the trainer wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import make_trainer, run_config, wake


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the trainer, with a LoRA that is awake."""
    trainer = make_trainer(run_config(tmp_path_factory.mktemp("lora") / "out", train={"steps": 1}))
    wake(trainer.host)
    return trainer.run()
