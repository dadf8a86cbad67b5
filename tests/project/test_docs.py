"""The documents say what the code does."""

import re

import byg_plugin
from byg_plugin.config import sections as config
from byg_plugin.config.loading import reference
from tests.support import ROOT


def test_configuration_reference_is_current():
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written.endswith(reference()), "run: python -m byg_plugin.config > docs/configuration.md"


def test_every_option_has_a_sentence():
    for name, field in config.Config.model_fields.items():
        assert name != "musubi" or field.description.endswith(".")
        for key, option in config.keys_of(name).items():
            assert option.description and option.description.endswith("."), f"{name}.{key}"


def test_readme_names_only_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "DEMO_TABLE" not in text, "the demo's figures are missing"
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    commands = re.findall(r"(byg_plugin/\w+\.py|configs/\w+\.toml)", text)
    assert len(links) >= 8 and len(commands) >= 6
    missing = [path for path in {*links, *commands} if not (ROOT / path).exists() and not (ROOT / "byg_plugin" / path).exists()]
    assert not missing


def test_readme_options_exist_in_the_parsers():
    import subprocess
    import sys

    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?:python|accelerate launch) (byg_plugin/\w+\.py .*)$", text, re.M):
        script, *words = line.split("#")[0].split()
        known = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True).stdout
        for word in words:
            if word.startswith("--"):
                assert word in known, f"{script} has no {word}"


def test_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", byg_plugin.__version__)
