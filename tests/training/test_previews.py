"""Previews while training: they change nothing, and a failing one ends nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from byg_plugin.training import preview
from tests.support.tiny import make_trainer, run_config, wake
from tests.support.training_runs import assert_same_run


def test_previews_are_written_and_change_nothing(tmp_path: Path, reference: Path):
    out = tmp_path / "out"
    make_trainer(run_config(out, sample={"every": 4, "items": 2, "steps": 2})).run()
    assert_same_run(out, reference)
    folders = sorted(p.name for p in (out / "previews").iterdir())
    assert folders == ["step-000000", "step-000004", "step-000006"]
    files = {name: sorted(p.name for p in (out / "previews" / name).iterdir()) for name in folders}
    assert set(map(tuple, files.values())) == {("000.png", "001.png")}
    first, last = ((out / "previews" / name / "000.png").read_bytes() for name in (folders[0], folders[-1]))
    assert first != last


def test_previews_have_fixed_seeds_and_the_asked_weights(tmp_path: Path):
    def pictures(step: int, **sample: Any) -> list[np.ndarray]:
        config = run_config(tmp_path / "out", sample={"items": 2, "steps": 2} | sample)
        torch.manual_seed(step)  # the run's own random state must not matter
        preview.write(config, trainer.family, trainer.host, trainer.data, step, trainer.accelerator)
        return [np.asarray(Image.open(path)) for path in sorted(preview.folder(config.output, step).glob("*.png"))]

    trainer = make_trainer(run_config(tmp_path / "out"))
    wake(trainer.host)
    one, two = pictures(1), pictures(2)
    assert len(one) == 2 and all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], pictures(3, weights="live")[0])
    assert not np.array_equal(one[0], pictures(4, seed=9)[0])
    assert np.array_equal(one[0][:, :64], np.asarray(pictures(5, weights="live")[0])[:, :64]), "the source stands on the left"


def test_a_failing_preview_does_not_end_the_run(tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def broken(*args: Any) -> None:
        calls.append(args)
        with args[2].ema():
            raise RuntimeError("out of memory")

    monkeypatch.setattr(preview, "_edits", broken)
    make_trainer(run_config(tmp_path / "out", sample={"every": 2})).run()
    assert len(calls) == 4, "step 0, 2, 4, 6"
    assert_same_run(tmp_path / "out", reference)
