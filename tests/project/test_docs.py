"""The reference of options and the version; the pages are looked at in test_pages.py."""

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


def test_version_is_one():
    assert re.fullmatch(r"\d+\.\d+\.\d+", byg_plugin.__version__)
