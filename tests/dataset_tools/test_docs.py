"""The page on data and its recipes say what the tools do."""

from __future__ import annotations

import re

import pytest

from byg_plugin.documents import toml_table
from dataset_tools import settings
from dataset_tools.balance import PRIORITY
from dataset_tools.settings import CaptionsSettings, GenerateSettings, JudgeSettings, RenderSettings, read_settings
from tests.support import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
MODELS = {
    **{"generate_edits": GenerateSettings, "prepare_captions": CaptionsSettings, "render_videos": RenderSettings},
    "judge": JudgeSettings,
}


def knows(tool: str, option: str) -> bool:
    source = (ROOT / "dataset_tools" / f"{tool}.py").read_text(encoding="utf-8")
    return option[2:].replace("-", "_") in getattr(MODELS.get(tool), "model_fields", ()) or f'"{option}"' in source


@pytest.mark.parametrize(("page", "least"), [("docs/data.md", 9), ("README.md", 4), ("docs/evaluation.md", 2)])
def test_commands_of_the_pages_exist(page: str, least: int) -> None:
    commands = re.findall(r"^(?:python|accelerate launch) dataset_tools/(\w+)\.py([^\n]*)", (ROOT / page).read_text(encoding="utf-8"), re.M)
    assert len(commands) >= least
    for tool, line in commands:
        for option in re.findall(r"--[\w-]+", line.split("#")[0]):
            assert option == "--config" or knows(tool, option), (tool, option)


def test_links_and_options_of_the_page_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / path).exists(), path
    tools = [path.stem for path in (ROOT / "dataset_tools").glob("[a-z]*.py")]
    for option in set(re.findall(r"`(--[\w-]+)", PAGE)):
        # `--tuples` is edit.py's, whose manifest the page describes, and `--set` is training's.
        assert option in ("--help", "--tuples", "--set") or any(knows(tool, option) for tool in tools), option


def test_documented_weights_are_the_programs() -> None:
    assert "`p` is 1.5 for remove and replace, 1 for the others" in PAGE
    assert {name: p for name, p in PRIORITY.items() if p != 1} == {"remove": 1.5, "replace": 1.5}


@pytest.mark.parametrize("name", ["data_images", "data_videos"])
def test_recipes_are_read_whole(name: str) -> None:
    path = ROOT / "configs" / f"{name}.toml"
    sections = toml_table(path.read_text(encoding="utf-8"))
    assert set(sections) <= set(settings.SECTIONS)
    needed = {"generate": ["--images", "x", "--out", "y"], "captions": ["--table", "x"], "render": []}
    models = {"generate": GenerateSettings, "captions": CaptionsSettings, "render": RenderSettings}
    for section in sections:
        read = read_settings(models[section], section, "", ["--config", str(path), *needed[section]])  # type: ignore[type-var]
        for key, value in sections[section].items():
            assert getattr(read, key) == value, key


def test_defaults_are_the_papers() -> None:
    generate = GenerateSettings(images="x", out="y")
    assert (generate.model, generate.k, generate.style_conversion) == ("Qwen/Qwen3-VL-30B-A3B-Thinking", 3, 0.15)
    assert CaptionsSettings(table="x", out="y").model == "Qwen/Qwen3-VL-30B-A3B-Instruct"
    assert RenderSettings(captions="x", out="y").hold_out == 4
    assert JudgeSettings(edits="x", out="y").model == "Qwen/Qwen2.5-VL-72B-Instruct"
