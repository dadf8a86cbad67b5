"""Editors compared edit by edit: differences by hand, and the command on two LoRAs that differ and one twice."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import compare
from benchmarks.editors import float32_config, named_loras
from byg_plugin.demo import metrics, world
from byg_plugin.hosts import make_host
from byg_plugin.lora.files import write_lora
from byg_plugin.models import make_family
from tests.support import ROOT

NEITHER = metrics.Score(edit_share=0, outside_error=0, iou=0, edit=False, preserved=False, joint=False, pebble=None)
KEPT = replace(NEITHER, preserved=True, pebble=True)
MADE = replace(NEITHER, edit=True, pebble=False)
BOTH = replace(KEPT, edit=True, joint=True)


def test_a_difference_is_of_the_same_edits():
    found = compare.difference([BOTH, BOTH, MADE, KEPT], [BOTH, MADE, MADE, NEITHER])
    assert found["joint"] == pytest.approx({"mean": 0.25, "error": 0.25, "edits": 4})
    assert found["edit"] == {"mean": 0, "error": 0, "edits": 4}
    assert found["preserved"]["mean"] == 0.5
    assert found["pebble"] == pytest.approx({"mean": 1 / 3, "error": 1 / 3, "edits": 3}), "one has no verdict"
    # At equal edit rate: of the three that both made, one more is kept.
    assert found[compare.WHERE_BOTH] == pytest.approx({"mean": 1 / 3, "error": 1 / 3, "edits": 3})


def test_the_error_is_that_of_the_pairs_not_of_two_shares():
    """Two editors of 50 % that agree but for one edit in a hundred differ by 1 point, known to 1 point."""
    one = [BOTH, NEITHER] * 50
    found = compare.difference([KEPT, *one[1:]], one)["joint"]
    assert found == pytest.approx({"mean": -0.01, "error": 0.01, "edits": 100})


def test_where_nothing_is_common_nothing_is_claimed():
    found = compare.difference([MADE, NEITHER], [NEITHER, MADE])
    assert found[compare.WHERE_BOTH] == {"mean": None, "error": None, "edits": 0}
    assert compare.difference([MADE], [MADE])["edit"] == {"mean": 0, "error": None, "edits": 1}
    record = {"editors": {"a": {"all": {"shares": compare.shares([MADE]), "difference": compare.difference([MADE], [NEITHER])}}}}
    assert "| a | all | 0.0 (+0.0 ± ?) | 100.0 (+100.0 ± ?) |" in compare.table(record)
    assert compare.table(record).splitlines()[-1].endswith("| ? ± ? |")


def test_scores_are_grouped_by_type():
    edits = world.sample_split(3, 0, "x", ("remove",)) + world.sample_split(1, 0, "x", ("add",))
    grouped = compare.by_type(edits, [BOTH, MADE, KEPT, NEITHER])
    assert grouped == {"add": [NEITHER], "remove": [BOTH, MADE, KEPT], "all": [BOTH, MADE, KEPT, NEITHER]}


@pytest.mark.parametrize("text", ["missing", "a=missing.safetensors", "=FILE", "a=FILE a=FILE"])
def test_what_names_no_editor_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "x.safetensors"
    file.touch()
    with pytest.raises(SystemExit):
        named_loras(argparse.ArgumentParser(), text.replace("FILE", str(file)).split())
    assert "another editor named a" in capsys.readouterr().err if text.count("FILE") == 2 else True


def test_the_command_compares_with_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    zero, noise = tmp_path / "zero.safetensors", tmp_path / "noise.safetensors"
    config = float32_config()
    host = make_host(config, make_family(config), torch.device("cpu"))
    (tensors,) = host.lora_files({name: value.detach() for name, value in host.parameters.items()}).values()
    write_lora(zero, tensors, {})
    shutil.copy(zero, tmp_path / "same.safetensors")
    rng = torch.Generator().manual_seed(0)
    write_lora(noise, {name: torch.randn(value.shape, generator=rng) * 0.1 for name, value in tensors.items()}, {})
    compare.main(
        [f"zero={zero}", f"same={tmp_path / 'same.safetensors'}", f"noise={noise}", "--edits", "4", "--out", str(tmp_path / "o.json")]
    )
    printed = capsys.readouterr().out
    record = json.loads(printed.splitlines()[-1])
    assert json.loads((tmp_path / "o.json").read_text(encoding="utf-8"))["edits"] == record["edits"] == 4
    assert set(record["editors"]["same"]) == {"all", *world.DEFAULT_TYPES}
    assert record["editors"]["same"]["all"]["shares"] == record["editors"]["zero"]["all"]["shares"]
    assert "difference" not in record["editors"]["zero"]["all"]
    assert all(known["mean"] in (0, None) for known in record["editors"]["same"]["all"]["difference"].values())
    assert record["editors"]["noise"]["all"]["shares"]["preserved"] < record["editors"]["zero"]["all"]["shares"]["preserved"]
    assert compare.table(record) in printed


def test_the_table_tells_the_committed_figures():
    committed = json.loads((ROOT / "benchmarks/results/compare.json").read_text(encoding="utf-8"))
    text = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    for line in compare.table(committed).splitlines():
        assert line in text
