"""Encoded texts that do not fit into main memory."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
from pathlib import Path

import pytest
import torch

from byg_plugin.editing.encodings import Encodings
from byg_plugin.texts import MASK
from tests.support.editing import photo, pipeline, pixels


def encoding(seed: int, rows: int = 4) -> dict[str, torch.Tensor]:
    """48 bytes a row of bfloat16, 1 of its mask."""
    values = torch.randn(24, rows, generator=torch.Generator().manual_seed(seed)).bfloat16().T  # not contiguous
    return {"qwen": values, MASK: torch.ones(rows, dtype=torch.bool)}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_does_not_fit_lies_in_files_until_the_mapping_goes(temporary: Path):
    kept = Encodings(most=2 * 4 * 49)
    made = {f"text {index}": encoding(index) for index in range(5)}
    for text, value in made.items():
        assert text not in kept
        kept[text] = value
    assert len(list(temporary.glob("byg-texts-*/*"))) == 3, "two fit"
    for text, value in made.items():
        assert text in kept
        found = kept[text]
        assert found.keys() == value.keys()
        for name in value:
            assert found[name].dtype == value[name].dtype
            assert torch.equal(found[name], value[name])
    with pytest.raises(KeyError):
        kept["another"]
    del kept, found
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_a_small_one_fits_after_a_large_one_did_not(temporary: Path):
    kept = Encodings(most=3 * 49)
    kept["large"], kept["small"] = encoding(0, rows=4), encoding(1, rows=3)
    assert len(list(temporary.glob("byg-texts-*/*"))) == 1
    assert torch.equal(kept["small"]["qwen"], encoding(1, rows=3)["qwen"])


def test_no_folder_is_made_while_all_fits(temporary: Path):
    Encodings()["text"] = encoding(0)
    assert list(temporary.iterdir()) == []


def test_a_full_disk_is_named(temporary: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = Encodings(most=0)
    kept["text"] = encoding(0)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match="No space left on device, with 1 encoded texts in it; set TMPDIR") as raised:
        kept["another"] = encoding(1)
    assert str(raised.value).startswith(str(temporary))
    assert "another" not in kept
    assert torch.equal(kept["text"]["qwen"], encoding(0)["qwen"])


def test_no_place_for_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch):
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_get_default_tempdir", nowhere)
    with pytest.raises(ValueError, match="no folder for temporary files: No usable temporary directory found.* set TMPDIR"):
        Encodings(most=0)["text"] = encoding(0)


def test_an_edit_is_the_same_with_its_text_in_a_file(lora: Path, temporary: Path):
    wanted = pipeline(lora)(photo(), "add the snow", steps=2, seed=4)
    pipe = pipeline(lora)
    pipe._texts = Encodings(most=0)
    assert (pixels(pipe(photo(), "add the snow", steps=2, seed=4)) == pixels(wanted)).all()
    assert len(list(temporary.glob("byg-texts-*/*"))) == 1
