"""The wheel: what is in it, and that it and a clone run in an environment that has nothing of ours."""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.support import ROOT
from tests.support.tiny import model_folder, workspace

BASES = ("byg_plugin/demo/base/", "byg_plugin/demo/critic/", "byg_plugin/demo/video_base/")
MOVED = ("configs", "dataset_tools", "patches")  # into the package
METADATA = {
    **{"byg.family": "flux", "byg.position": "same", "byg.guidance": "1.0"},
    **{"byg.resolution": "64", "byg.max_text_tokens": "16"},
}
TOML = 'model.path = "m"\ndataset = {tuples = "t.jsonl", cache_dir = "c"}\ntrain.steps = 10\noutput.dir = "o"\n'
LAUNCH = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]


def files_of(folder: str) -> set[str]:
    """Paths from the repository's root."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel, and with SOURCES.txt: what an sdist has."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", out, "build", "--build-base", out / "build"]
    command += ["bdist_wheel", "--bdist-dir", out / "bdist", "--dist-dir", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def environment(folder: Path) -> Path:
    """An environment that sees the packages of the one that runs the tests, and nothing that is installed there in place: its python."""
    venv.EnvBuilder(symlinks=os.name != "nt").create(folder)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    packages = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (site_packages(folder) / "beside.pth").write_text("\n".join(packages), encoding="utf-8")
    return python


def site_packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    python = environment(folder)
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site_packages(folder))
    return python


def run(python: Path, folder: Path, *words: str | Path) -> tuple[int, str]:
    """Exit code and all that is said; nothing but the environment and the folder leads to a package."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "120"}
    done = subprocess.run([python, *words], cwd=folder, env=variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_wheel_has_everything_but_the_weights(built: Path):
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert not any(name.endswith((".safetensors", ".pt", ".bin")) for name in names)
    package = {name for name in files_of("byg_plugin") if not name.startswith(BASES)}
    assert names == package | {f"byg_plugin/{name}" for folder in MOVED for name in files_of(folder)}


def in_sdist(built: Path) -> set[str]:
    lines = (built / "byg_plugin.egg-info/SOURCES.txt").read_text(encoding="utf-8").splitlines()
    return {line.replace(os.sep, "/") for line in lines}


def test_the_sdist_has_the_weights_too(built: Path):
    sources = in_sdist(built)
    assert all(files_of(base) <= sources for base in BASES)
    assert {"Makefile", "constraints.txt", "pyproject.toml", "setup.py"} <= sources
    assert all(files_of(folder) <= sources for folder in ("byg_plugin", *MOVED))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_the_sdist_has_what_its_pages_name(built: Path, page: str):
    sources = in_sdist(built)
    assert page in sources
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8"))
    for link in (link for link in links if "://" not in link):
        named = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
        assert named in sources or any(source.startswith(f"{named}/") for source in sources), link


def test_the_sdist_has_the_tests_whole(built: Path):
    assert {path for path in files_of("tests") | files_of("benchmarks") if path.endswith((".py", ".toml"))} <= in_sdist(built)


def commands() -> list[str]:
    """The modules of the installed package that are run."""
    paths = [path for folder in ("byg_plugin", "dataset_tools") for path in files_of(folder) if path.endswith(".py")]
    run = (path for path in paths if '__name__ == "__main__"' in (ROOT / path).read_text(encoding="utf-8"))
    inside = (path if path.startswith("byg_plugin/") else f"byg_plugin/{path}" for path in run)
    return sorted(path.removesuffix(".py").removesuffix("/__main__").replace("/", ".") for path in inside)


def test_every_command_of_the_wheel_starts(installed: Path, tmp_path: Path):
    assert {"byg_plugin.train_network", "byg_plugin.demo", "byg_plugin.dataset_tools.review"} <= {*commands()}
    for name in commands():
        code, said = run(installed, tmp_path, "-m", name, "--help")
        assert code == 0 and ("usage: " in said or "# Configuration" in said), f"{name}: {said}"


@pytest.mark.parametrize(("demo", "base"), [("byg_plugin.demo", "base"), ("byg_plugin.demo.video", "video_base")])
def test_a_demo_without_its_base_says_what_to_do(installed: Path, tmp_path: Path, demo: str, base: str):
    code, said = run(installed, tmp_path, "-m", demo)
    assert code == 2 and said.startswith("error: --base ") and said.count("\n") == 1, said
    assert "in a clone and in the sdist, not in the wheel" in said and f"byg_plugin/demo/{base} with --base" in said
    code, said = run(installed, tmp_path, "-m", demo, "--base", ROOT / "byg_plugin" / "demo" / base, "--set", "train.stepps=3")
    assert code == 2 and "did you mean train.steps?" in said
    assert not list(tmp_path.iterdir())


def test_an_edit_with_the_wheel(installed: Path, tmp_path: Path):
    name = "transformer.transformer_blocks.0.attn.to_q"
    lora = {f"{name}.lora_A.weight": torch.ones(4, 32), f"{name}.lora_B.weight": torch.ones(32, 4)}
    save_file(lora, tmp_path / "l.safetensors", METADATA)
    model = ["--model", model_folder(), "--dtype", "float32", "--device", "cpu", "--steps", "1"]
    edit = ["--source", workspace() / "photo0.png", "--instruction", "add snow", "--out", tmp_path / "edits"]
    code, said = run(installed, tmp_path, "-m", "byg_plugin.edit", "--lora", tmp_path / "l.safetensors", *model, *edit)
    assert code == 0, said
    assert all(Image.open(path).size[1] > 0 for path in (tmp_path / "edits").glob("*.png")) and list((tmp_path / "edits").glob("*.png"))


@pytest.mark.parametrize("how", ["the clone's folder", "another folder", "installed", "installed, without accelerate launch"])
def test_training_is_launched(how: str, request: pytest.FixtureRequest, tmp_path: Path):
    (tmp_path / "c.toml").write_text(TOML, encoding="utf-8")
    python = request.getfixturevalue("installed" if how.startswith("installed") else "empty")
    words = {
        "the clone's folder": (ROOT, *LAUNCH, "byg_plugin/train_network.py"),
        "another folder": (tmp_path, *LAUNCH, ROOT / "byg_plugin" / "train_network.py"),
        "installed": (tmp_path, *LAUNCH, "-m", "byg_plugin.train_network"),
        "installed, without accelerate launch": (tmp_path, "-m", "byg_plugin.train_network"),
    }
    code, said = run(python, *words[how], "--config", tmp_path / "c.toml", "--print-config")
    assert code == 0 and '"steps": 10' in said, said
