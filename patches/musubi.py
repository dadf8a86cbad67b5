"""Patches of musubi-tuner. Each says what has no seam, when it is applied, and which test fails once it is unnecessary."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def needs_device_index() -> bool:
    """Whether `torch.cuda.current_device()` fails here: a torch without CUDA, or no device."""
    return not torch.cuda.is_available()


@contextmanager
def imports_without_cuda() -> Iterator[None]:
    """Import the host on a machine without CUDA.

    Its Wan text encoder asks for the current CUDA device in the default of an argument, so on import. While the host is
    imported, that answers 0; afterwards it fails again as it should. Unnecessary once
    `tests/musubi/test_versions.py::test_patch_of_imports_is_needed` fails.
    """
    if not needs_device_index():
        yield
        return
    asked = torch.cuda.current_device
    torch.cuda.current_device = lambda: 0
    try:
        yield
    finally:
        torch.cuda.current_device = asked
