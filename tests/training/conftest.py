"""The run that others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny import make_trainer, run_config


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run that others are compared with."""
    out = tmp_path_factory.mktemp("reference") / "out"
    make_trainer(run_config(out)).run()
    return out
