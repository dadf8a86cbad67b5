"""See the package above."""

from . import functional  # noqa: F401
