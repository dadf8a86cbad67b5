"""Where the folders beside the package are found: in a clone, and once installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from byg_plugin import shipped
from byg_plugin.data.tuples import read_tuples_file
from tests.support import ROOT


def test_a_clone_has_them_beside_the_package():
    for name in ("configs", "dataset_tools", "patches"):
        assert shipped.folder(name) == ROOT / name
    assert shipped.PACKAGE == ROOT / "byg_plugin"


def test_installed_the_folder_beside_the_package_is_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "byg_plugin")
    for folder in ("byg_plugin/configs", "configs"):
        (tmp_path / folder).mkdir(parents=True)
    assert shipped.folder("configs") == tmp_path / "byg_plugin" / "configs"


def test_the_command_of_a_tool_is_where_the_tool_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    (tmp_path / "a.png").touch()
    texts = {"src_caption": "a car", "tgt_caption": "a car, not red", "instruction": "paint it", "reverse_instruction": "paint it red"}
    tuples = tmp_path / "t.jsonl"
    tuples.write_text(json.dumps({"source": "a.png", **texts}), encoding="utf-8")
    read_tuples_file(tuples)
    assert "; python -m dataset_tools.validate names the lines" in caplog.text
    (tmp_path / "byg_plugin" / "dataset_tools").mkdir(parents=True)
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "byg_plugin")
    read_tuples_file(tuples)
    assert "; python -m byg_plugin.dataset_tools.validate names the lines" in caplog.text


def test_their_modules_have_one_name_everywhere(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("byg_plugin.patches")]:
        monkeypatch.delitem(sys.modules, name)
    module = shipped.module("patches.musubi")
    assert module.__name__ == "byg_plugin.patches.musubi" and Path(module.__file__ or "") == ROOT / "patches" / "musubi.py"
    assert shipped.module("patches.musubi") is module
    with pytest.raises(ImportError, match="patches.nothing"):
        shipped.module("patches.nothing")
