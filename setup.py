"""Package layout: the user-facing folders `configs`, `dataset_tools` and `patches` live inside `byg_plugin` once installed: shipped.py."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "byg_plugin/version.py").read_text(encoding="utf-8")).group(1)
FOLDERS = ("configs", "dataset_tools", "patches")

setup(
    version=VERSION,
    packages=[
        *find_packages(include=["byg_plugin", "byg_plugin.*"]),
        *(f"byg_plugin.{name}" for name in (*FOLDERS, *find_packages(include=[f"{folder}.*" for folder in FOLDERS]))),
    ],
    package_dir={"byg_plugin": "byg_plugin", **{f"byg_plugin.{folder}": folder for folder in FOLDERS}},
    package_data={
        "byg_plugin.configs": ["*.toml", "accelerate/*.yaml"],
        "byg_plugin.dataset_tools.review_page": ["static/*"],
        "byg_plugin.evaluation.vote": ["static/*"],
        "byg_plugin.models": ["assets/**/*"],
    },
    # What MANIFEST.in adds to the sdist, the demo's weights of fifteen megabytes among it, stays out of the wheel.
    include_package_data=False,
)
