"""Folders of users' files: what a Mac or another system hides there is no input of any command."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from byg_plugin.data.import_kontext import import_kontext
from byg_plugin.data.tuples import read_tuples_file
from byg_plugin.edit import jobs_of
from byg_plugin.models.files import _weight_files
from dataset_tools.inputs import HIDDEN, files_below, passed_over
from tests.support.data_fakes import picture, record
from tests.support.data_fakes import write_tuples as write_lines

SIDECAR = b"\0\x05\x16\x07\0\x02\0\0Mac OS X        " + bytes(32)


def edit(folder: Path) -> list[str]:
    args = argparse.Namespace(tuples=None, source=str(folder), instruction="make it red")
    return [job.source.name for job in jobs_of(args)]


def tuples(folder: Path) -> list[str]:
    for path in folder.glob("[!.]*.png"):
        write_lines(path.with_suffix(".json"), [{k: v for k, v in record("x").items() if k != "source"}])
    (folder / "._a.json").write_bytes(SIDECAR)
    return [item.source.name for item in read_tuples_file(folder)]


def kontext(folder: Path) -> list[str]:
    done = import_kontext(folder, folder, folder.parent / "out.jsonl")
    return ["a.png"] * (done.complete + done.incomplete)


def generate_edits(folder: Path) -> list[str]:
    others: Counter[str] = Counter()
    found = [path.name for path in files_below(folder, (".png", ".jpg"), others)]
    if not found:
        raise ValueError(passed_over(others))
    return found


COMMANDS = [edit, tuples, kontext, generate_edits]


@pytest.mark.parametrize("command", COMMANDS)
def test_hidden_files_are_passed_over(tmp_path: Path, command: Callable[[Path], list[str]]) -> None:
    folder = tmp_path / "photos"
    picture(folder / "a.png")
    for name in ("._a.png", "._b.JPG", ".DS_Store", "._a.txt"):
        (folder / name).write_bytes(SIDECAR)
    assert command(folder) == ["a.png"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_of_hidden_files_alone_says_so(tmp_path: Path, command: Callable[[Path], list[str]]) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "._a.png").write_bytes(SIDECAR)
    with pytest.raises(ValueError, match="1 hidden"):
        command(folder)


def test_hidden_weights_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "._model.safetensors").write_bytes(SIDECAR)
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert _weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_hidden_files_are_counted_by_suffix_asked_for(tmp_path: Path) -> None:
    for name in ("._a.png", "._b.PNG", ".DS_Store", "c.gif"):
        (tmp_path / name).write_bytes(SIDECAR)
    others: Counter[str] = Counter()
    assert list(files_below(tmp_path, (".png",), others)) == [] and others == {HIDDEN: 2, ".gif": 1}
