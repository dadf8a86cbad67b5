"""Appendix D.2 of the paper: the styles of clips, the template that names one, and instructions between them."""

from __future__ import annotations

STYLES = ("cartoon", "photo-realistic")
INSTRUCTIONS = (
    "Turn the video to {style} style",
    "Convert the video to {style} style",
    "Change the style of the video to {style}",
    "Make the video look {style}",
)


def wrap(caption: str, style: str) -> str:
    """The template of D.2: the caption with a style."""
    return f"{caption.rstrip().rstrip('.')}. The video is in {style} style."
