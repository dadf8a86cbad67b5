"""Stands in for torchvision, of which ComfyUI imports names at its start: there is no build of it for every torch. Nothing is called."""

from . import ops, transforms  # noqa: F401
