"""A newcomer's first minute: what needs no network is told without importing one. Not timed: torch alone takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from byg_plugin.data.rules import ROLES
from tests.support import ROOT

CONFIGURED = ("byg_plugin.train_network", "byg_plugin.cache_latents", "byg_plugin.cache_text_encoder_outputs")
EDIT = ("--source", "a.png", "--instruction", "add snow")
COMMANDS = (
    *CONFIGURED,
    "byg_plugin.edit",
    "byg_plugin.evaluate",
    "byg_plugin.evaluation.vote",
    "byg_plugin.convert_lora",
    "byg_plugin.data.import_kontext",
    "byg_plugin.demo",
    "byg_plugin.demo.video",
    "dataset_tools.generate_edits",
    "dataset_tools.hold_out",
    "dataset_tools.prepare_captions",
    "dataset_tools.render_videos",
    "dataset_tools.review",
    "dataset_tools.validate",
)
# command, its words, exit code, what it says
CASES = [
    *((command, ["--help"], 0, "usage: ") for command in COMMANDS),
    *((command, ["--config", "none.toml"], 2, "error: --config none.toml: no such file") for command in CONFIGURED),
    *((command, ["--config", "c.toml", "--set", "train.stepps=3"], 2, "did you mean train.steps?") for command in CONFIGURED),
    *((command, ["--config", "c.toml", "--set", "train.steps"], 2, "expected section.key=value") for command in CONFIGURED),
    *((command, ["--config", "c.toml"], 2, "error: dataset.tuples = none.jsonl: no such file or folder") for command in CONFIGURED),
    ("byg_plugin.train_network", ["--config", "c.toml", "--print-config"], 0, '"steps": 10'),
    ("byg_plugin.train_network", ["--config", "c.toml", "--dry-run"], 2, "dataset.tuples = none.jsonl: no such file"),
    *(
        (command, ["--config", "d.toml"], 2, "error: model.path = none/nowhere/else: no such file or folder; give one")
        for command in CONFIGURED
    ),
    (
        "byg_plugin.cache_text_encoder_outputs",
        ["--config", "d.toml", "--set", "model.path=a/b", "--set", "model.t5=t5.safetensors"],
        2,
        "model.t5 = ",
    ),
    (
        "byg_plugin.train_network",
        ["--config", "d.toml", "--set", "model.path=a/b", "--set", "lora.init_from=x"],
        2,
        "lora.init_from = x: no",
    ),
    ("byg_plugin.edit", ["--model", "nowhere", "--lora", "l.safetensors", *EDIT], 2, "--model nowhere: no such file or folder"),
    ("byg_plugin.edit", ["--config", "d.toml", "--lora", "l.safetensors", *EDIT], 2, "model.path = none/nowhere/else: no such file"),
    ("byg_plugin.edit", ["--config", "none.toml", "--lora", "l.safetensors", *EDIT], 2, "--config none.toml: no such file"),
    ("byg_plugin.edit", ["--config", "c.toml", "--set", "lora.rnk=3", "--lora", "l.safetensors", *EDIT], 2, "did you mean lora.rank?"),
    ("byg_plugin.edit", ["--model", "m", "--lora", "none.safetensors", *EDIT], 2, "--lora none.safetensors: no such file"),
    ("byg_plugin.edit", ["--model", "m", "--lora", "l.safetensors", "--frames", "5", *EDIT], 2, "--frames 5 is for clips"),
    ("byg_plugin.edit", ["--model", "m", "--lora", "l.safetensors", "--source", "b.png", "--instruction", "x"], 2, "b.png: no such file"),
    ("byg_plugin.edit", ["--model", "m", "--lora", "l.safetensors", "--tuples", "none.jsonl"], 2, "none.jsonl: no such file or folder"),
    ("byg_plugin.edit", ["--model", "m", "--lora", "l.safetensors", *EDIT, "--steps", "0"], 2, "argument --steps: '0' is not a whole"),
    ("byg_plugin.evaluate", [], 2, "error: give --edits DIR, or --tuples FILE --results DIR, or"),
    ("byg_plugin.evaluate", ["--edits", "none", "--metrics", "clip"], 2, "edits.jsonl: no such file; byg_plugin/edit.py writes it"),
    ("byg_plugin.evaluate", ["--tuples", "d.jsonl", "--results", "none"], 2, "error: --results none: no such folder"),
    ("byg_plugin.evaluate", ["--sources", ".", "--results", ".", "--metrics", "beauty"], 2, "invalid choice: 'beauty'"),
    ("byg_plugin.evaluation.vote", ["--a", "none", "--b", "nothing"], 2, "edits.jsonl: no such file; byg_plugin/edit.py writes it"),
    ("byg_plugin.convert_lora", ["none.safetensors", "--check"], 2, "none.safetensors: no such file"),
    ("byg_plugin.convert_lora", ["l.safetensors", "--to", "kohya", "--out", "x"], 2, "invalid choice: 'kohya'"),
    ("byg_plugin.demo", ["--set", "train.stepps=3"], 2, "did you mean train.steps?"),
    ("byg_plugin.demo.video", ["--set", "train.stepps=3"], 2, "did you mean train.steps?"),
    ("dataset_tools.generate_edits", ["--config", "none.toml"], 2, "--config none.toml: no such file"),
    ("dataset_tools.prepare_captions", ["--config", "none.toml"], 2, "--config none.toml: no such file"),
    ("dataset_tools.render_videos", ["--config", "none.toml"], 2, "--config none.toml: no such file"),
    ("dataset_tools.hold_out", ["none.jsonl"], 2, "none.jsonl: no such file"),
    ("dataset_tools.validate", ["none.jsonl"], 2, "none.jsonl: no such file"),
    ("dataset_tools.review", ["none.jsonl"], 2, "none.jsonl: no such file"),
]
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "av", "matplotlib", "bitsandbytes")
# Runs a module as a command and tells at its end which of those packages it has imported.
CHILD = f"""
import atexit, runpy, sys
atexit.register(lambda: print("imported:", *sorted({HEAVY!r} & sys.modules.keys()), file=sys.stderr))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
""".replace(repr(HEAVY), repr(set(HEAVY)))
TOML = 'model.path = "m"\ndataset = {tuples = "none.jsonl", cache_dir = "c"}\ntrain.steps = 10\noutput.dir = "o"\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    (folder / "c.toml").write_text(TOML, encoding="utf-8")
    (folder / "d.toml").write_text(TOML.replace("none.jsonl", "d.jsonl").replace('"m"', '"none/nowhere/else"'), encoding="utf-8")
    texts = ("a field", "a field in snow", "add the snow", "remove the snow")
    roles = dict(zip(ROLES, texts, strict=True))
    (folder / "d.jsonl").write_text(json.dumps({"source": "a.png", **roles}), encoding="utf-8")
    (folder / "a.png").touch()
    (folder / "l.safetensors").touch()
    return folder


@pytest.mark.parametrize(("command", "words", "code", "says"), CASES, ids=[" ".join([case[0], *case[1]])[:60] for case in CASES])
def test_what_needs_no_network_imports_none(folder: Path, command: str, words: list[str], code: int, says: str):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    child = [sys.executable, "-c", CHILD, command, *words]
    done = subprocess.run(child, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and says in done.stdout + done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (imported,) = [line for line in done.stderr.splitlines() if line.startswith("imported:")]
    assert imported == "imported:"
    assert {path.name for path in folder.iterdir()} == {"c.toml", "d.toml", "d.jsonl", "a.png", "l.safetensors"}, (
        "nothing is made for a command that cannot start"
    )


def test_the_child_would_tell():
    """The test above must be able to fail."""
    done = subprocess.run([sys.executable, "-c", CHILD, "byg_plugin.flow"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "imported: torch", done.stderr


def test_the_package_itself_is_light():
    code = "import sys, byg_plugin, byg_plugin.config.sections, byg_plugin.edit; print({'torch', 'diffusers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr
