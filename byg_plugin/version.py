"""The version of this package (setup.py reads it from here), and those of what a result depends on."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"byg_plugin": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "diffusers", "peft", "accelerate", "transformers", "safetensors", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
