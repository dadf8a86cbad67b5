"""Package layout: the user-facing folders `configs` and `patches` live inside `byg_plugin` once installed."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "byg_plugin/__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    version=VERSION,
    packages=[*find_packages(include=["byg_plugin", "byg_plugin.*"]), "byg_plugin.configs", "byg_plugin.patches"],
    package_dir={"byg_plugin": "byg_plugin", "byg_plugin.configs": "configs", "byg_plugin.patches": "patches"},
    package_data={
        "byg_plugin.configs": ["*.toml"],
        "byg_plugin.models": ["assets/**/*"],
        "byg_plugin.demo": ["base/**/*"],
    },
)
