"""The backend that the settings name."""

from __future__ import annotations

from .backend import Backend
from .settings import BackendSettings


def make_backend(settings: BackendSettings, *, proven: bool = False) -> Backend:
    """The backend of the settings.

    Args:
        settings: checked ones.
        proven: it has answered requests of this kind before.

    Raises:
        ValueError: a package is missing, or the model cannot be loaded.
    """
    if settings.backend == "openai":
        from .backend_openai import OpenAIBackend

        return OpenAIBackend(settings, proven=proven)
    from .backend_transformers import TransformersBackend

    assert settings.backend == "transformers", settings.backend
    return TransformersBackend(settings)
