"""What ComfyUI's registry reads of the folder of nodes."""

from __future__ import annotations

from byg_plugin.documents import toml_table
from byg_plugin.version import __version__
from tests.support import ROOT

FOLDER = ROOT / "comfyui"


def test_the_registry_finds_what_it_asks_for() -> None:
    """The publisher's name and address are left to whoever publishes."""
    read = toml_table((FOLDER / "pyproject.toml").read_bytes())
    project = read["project"]
    assert (project["name"], project["version"], project["license"]) == ("byg-edit", __version__, {"text": "Apache-2.0"})
    assert project["dependencies"] == [], "the nodes need ComfyUI alone"
    assert set(read["tool"]["comfy"]) == {"PublisherId", "DisplayName", "Icon", "requires-comfyui"}
    assert read["tool"]["comfy"]["DisplayName"] == "ByG Edit"


def test_the_licence_is_in_the_folder_that_users_copy() -> None:
    assert (FOLDER / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
