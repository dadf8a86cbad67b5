"""Train instruction-following visual editors without paired data (Bootstrap Your Generator)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from byg_plugin.version import __version__

if TYPE_CHECKING:
    from byg_plugin.editing.pipeline import EditPipeline

__all__ = ["EditPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the heavy pipeline only when somebody asks for it (PEP 562)."""
    if name == "EditPipeline":
        return import_module("byg_plugin.editing.pipeline").EditPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
