"""The smallest study that trains."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import tiny_world as study


@pytest.fixture
def little_data(monkeypatch):
    monkeypatch.setattr(study, "TRAIN_EDITS_PER_TYPE", 4)
    stages = {name: dataclasses.replace(stage, eval_edits=4, curve_edits=2) for name, stage in study.STAGES.items()}
    monkeypatch.setattr(study, "STAGES", stages)
