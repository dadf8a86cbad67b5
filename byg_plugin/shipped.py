"""Where `configs`, `dataset_tools` and `patches` are: beside the package in a clone, inside it once installed (setup.py)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent


def folder(name: str) -> Path:
    """The folder of this name. Inside first: what lies beside an installed package belongs to others."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name


def command(name: str) -> str:
    """What a shell runs a module of one of these folders by, e.g. `dataset_tools.validate`; a clone's own from its folder."""
    inside = folder(name.partition(".")[0]).is_relative_to(PACKAGE)
    return f"python -m {__package__}.{name}" if inside else f"python -m {name}"


def module(name: str) -> ModuleType:
    """A module of one of these folders: `patches.musubi` is `byg_plugin.patches.musubi`, also in a clone.

    Raises:
        ImportError: there is no such module.
    """
    top = name.partition(".")[0]
    package = f"{__package__}.{top}"
    if package not in sys.modules:
        spec = importlib.util.spec_from_file_location(package, folder(top) / "__init__.py")
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        sys.modules[package] = loaded
    return importlib.import_module(f"{__package__}.{name}")
