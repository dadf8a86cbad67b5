"""README and the pages under docs: links, keys, options, quoted messages and figures are those of the code."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from byg_plugin.config.sections import Config, keys_of
from byg_plugin.objectives.base import Batch
from byg_plugin.objectives.unpaired_cycle import UnpairedCycle
from byg_plugin.objectives.unpaired_cycle_config import UnpairedCycleConfig
from tests.support import ROOT
from tests.support.toy_fields import ToyFields

README, TROUBLE = ROOT / "README.md", ROOT / "docs/troubleshooting.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = ("train_network", "edit", "evaluate", "cache_latents", "cache_text_encoder_outputs", "convert_lora")


def page(path: Path) -> pytest.ParameterSet:
    return pytest.param(path, id=path.name)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_readme_is_for_a_reader_in_a_hurry():
    assert len(text_of(README).split()) <= 1400


def anchors(path: Path) -> set[str]:
    """As GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text_of(path), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", map(page, PAGES))
def test_links_lead_somewhere(path: Path):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(path)) if "://" not in link]
    assert links or path.name in ("configuration.md", "step_cost.md", "extending.md")
    for link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", [page(README), page(ROOT / "docs/training.md"), page(TROUBLE)])
def test_keys_are_keys(path: Path):
    named = re.findall(r"\b([a-z]+)\.([a-z_0-9]+)\b(?!\.|\()", text_of(path))
    found = {(section, key) for section, key in named if section in set(Config.model_fields) - {"musubi"}} - {("model", "ckpt")}
    assert len(found) >= 1
    assert not {f"{section}.{key}" for section, key in found if key != "md" and key not in keys_of(section)}


@cache
def help_of(command: str) -> str:
    script = [sys.executable, str(ROOT / f"byg_plugin/{command}.py"), "--help"]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("path", map(page, PAGES))
def test_options_of_the_commands_exist(path: Path):
    text = text_of(path).replace("\\\n", " ")
    for command, line in re.findall(rf"byg_plugin/({'|'.join(COMMANDS)})\.py([^\n`]*)", text):
        for option in re.findall(r"(?<=\s)--[a-z][\w-]*", line.split(" #")[0]):
            assert re.search(rf"{option}(?![\w-])", help_of(command)), (command, option)


# --- troubleshooting ---


@cache
def literals() -> tuple[str, ...]:
    """All texts in the package's code; of an f-string the pieces between values."""
    found = []
    for path in (ROOT / "byg_plugin").rglob("*.py"):
        found += [n.value for n in ast.walk(ast.parse(text_of(path))) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return tuple(found)


def quoted_messages() -> list[str]:
    """The first cells of tables of messages, and quotations with an ellipsis."""
    text = text_of(TROUBLE)
    tables = re.findall(r"^\| the message (?:says|goes on) \|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)", text, re.M)
    cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    quoted = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    return quoted + [message for message in re.findall(r"`([^`\n]*\.\.\. [a-z][^`\n]*)`", text) if "lora_" not in message]


def test_quoted_messages_are_the_programs():
    messages = quoted_messages()
    assert len(messages) >= 15
    for message in messages:
        for piece in filter(None, (part.strip(" .;:") for part in re.split(r"\.\.\.| N\b", message))):
            assert any(piece in text for text in literals()), (message, piece)


def test_every_term_of_the_log_is_explained(fields: ToyFields, batch: Batch):
    terms = UnpairedCycle(UnpairedCycleConfig()).step(fields, batch, lambda loss, last: loss.backward() or 1.0)
    assert {"cosine_fwd", "zero_directions_rev"} <= terms.keys()
    table = (
        text_of(TROUBLE)
        .partition("## What the log says")[2]
        .partition("\n\nThe tiny world")[0]
        .replace("`, `_rev`", "`, `zero_directions_rev`")
    )
    assert not {name for name in terms if name != "loss" and not name.startswith("mse_") and f"`{name}`" not in table}


# --- figures ---


@pytest.mark.parametrize("recipe", ["flux_image", "flux_image_24gb"])
def test_memory_of_the_recipes_is_what_dry_run_prints(recipe: str, tmp_path: Path):
    assets = ROOT / "byg_plugin/models/assets/flux_dev"
    for part in ("transformer", "vae"):
        (tmp_path / "flux" / part).mkdir(parents=True)
        shutil.copy(assets / f"{part}.json", tmp_path / "flux" / part / "config.json")
    (tmp_path / "data").mkdir()
    edit = {"source": "a.png", "src_caption": "a red cup on a table", "tgt_caption": "a blue cup on a table"}
    edit |= {"instruction": "make the cup blue", "reverse_instruction": "make the cup red"}
    (tmp_path / "data/tuples.jsonl").write_text(str(edit).replace("'", '"'), encoding="utf-8")
    (tmp_path / "data/a.png").write_bytes((ROOT / "docs/demo.png").read_bytes())
    command = [sys.executable, str(ROOT / "byg_plugin/train_network.py"), "--config", str(ROOT / f"configs/{recipe}.toml"), "--dry-run"]
    command += ["--set", "model.path=flux", "--set", "model.device=cpu"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ, check=False)
    (printed,) = re.findall(r"([\d.]+) GiB  sum", said.stdout)
    assert f"(configs/{recipe}.toml) | {float(printed):.1f} GiB |" in text_of(README), said.stderr


@pytest.mark.parametrize(
    ("recipe", "figure", "head"),
    [
        ("wan22_5b", "19.3 GiB", r"19\.3 GiB  sum"),
        ("wan22_video_24gb", "22.0 GiB", r"22\.0 GiB in all"),
        ("wan22_video", "58 GiB", r"58   GiB  sum"),
    ],
)
def test_memory_of_clips_is_that_of_the_recipes_head(recipe: str, figure: str, head: str):
    assert f"(configs/{recipe}.toml) | {figure} |" in text_of(README)
    assert re.search(head, text_of(ROOT / f"configs/{recipe}.toml"))


def test_the_citation_is_the_papers():
    cited = text_of(ROOT / "CITATION.cff")
    assert re.findall(r'family-names: "(\w+)"', cited) == ["Tewel", "Atzmon", "Chechik", "Wolf"]
    title = "Bootstrap Your Generator: Unpaired Visual Editing with Flow Matching"
    assert f'title: "{title}"' in cited and "https://research.nvidia.com/labs/par/byg/" in text_of(README)
