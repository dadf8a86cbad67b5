"""Package layout: the user-facing folders `configs`, `dataset_tools` and `patches` live inside `byg_plugin` once installed."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "byg_plugin/version.py").read_text(encoding="utf-8")).group(1)
FOLDERS = ("configs", "dataset_tools", "patches")

setup(
    version=VERSION,
    packages=[*find_packages(include=["byg_plugin", "byg_plugin.*"]), *(f"byg_plugin.{folder}" for folder in FOLDERS)],
    package_dir={"byg_plugin": "byg_plugin", **{f"byg_plugin.{folder}": folder for folder in FOLDERS}},
    package_data={
        "byg_plugin.configs": ["*.toml"],
        "byg_plugin.dataset_tools": ["_review_page/*"],
        "byg_plugin.models": ["assets/**/*"],
        "byg_plugin.demo": ["base/**/*", "video_base/**/*"],
    },
)
