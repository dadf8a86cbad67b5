"""Files of a vote in folders that have none in common, as those on two drives of Windows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from byg_plugin.evaluation.vote.__main__ import main
from byg_plugin.evaluation.vote.ballots import order, read_pairs
from byg_plugin.local_page import serving


@pytest.fixture
def client(runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    def two_drives(paths: Any) -> str:
        raise ValueError("Paths don't have the same drive")

    served: list[Any] = []
    monkeypatch.setattr(os.path, "commonpath", two_drives)
    monkeypatch.setattr(serving, "serve", lambda app, host, listening: (served.append(app), listening.close()))
    main(["--a", str(runs[0]), "--b", str(runs[1]), "--votes", str(tmp_path / "votes.jsonl"), "--port", "0"])
    return TestClient(served[0], base_url="http://127.0.0.1")


def test_files_without_a_common_folder_are_shown(runs: tuple[Path, Path], client: TestClient):
    pairs = read_pairs(*runs)
    (index, left), *_ = order(pairs, "ada")
    assert client.get("/media/0/reference?rater=ada").content == pairs[index].a.source.read_bytes()
    assert client.get("/media/0/left?rater=ada").content == getattr(pairs[index], left).edit.read_bytes()


def test_a_name_with_a_port_is_refused(runs: tuple[Path, Path], tmp_path: Path):
    with pytest.raises(ValueError, match="--allow-host 'box:7861': .*give a bare name"):
        main(["--a", str(runs[0]), "--b", str(runs[1]), "--votes", str(tmp_path / "votes.jsonl"), "--allow-host", "box:7861"])


def test_what_a_shown_file_has_become_elsewhere_is_not(runs: tuple[Path, Path], tmp_path: Path, client: TestClient):
    pairs = read_pairs(*runs)
    (index, _), *_ = order(pairs, "ada")
    source = pairs[index].a.source
    (tmp_path / "other").mkdir()
    source.rename(tmp_path / "other" / "secret.png")
    source.symlink_to(tmp_path / "other" / "secret.png")
    assert client.get("/media/0/reference?rater=ada").status_code == 404
