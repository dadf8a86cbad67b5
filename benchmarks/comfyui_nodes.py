"""What the ComfyUI nodes have from the package: `python -m benchmarks.comfyui_nodes` writes `comfyui/families.json` anew."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from byg_plugin.config.sections import SampleConfig
from byg_plugin.families import SPECS, FamilySpec

FILE = Path(__file__).parent.parent / "comfyui" / "families.json"
_STEPS = SampleConfig.model_fields["steps"].default
_PIXEL_MULTIPLES = {"wan2.2-ti2v-5b": 32}  # the VAE's factor times the patch
_PIXEL_MULTIPLE = 16


def row_of(spec: FamilySpec) -> dict[str, Any]:
    """What the nodes know of a family; see `comfyui.families.Family`."""
    return {
        "name": spec.name,
        "architecture": spec.lora_layout,
        "positions": spec.positions,
        "steps": spec.defaults.get("sample", {}).get("steps", _STEPS),
        "embeds_guidance": spec.guidance == "embedding",
        "guidance_scales": spec.guidance_scales,
        "unguided": spec.unguided,
        "negative": spec.negative,
        "shift": _shift_of(spec),
        "boundary": spec.boundary,
        "frame_multiple": spec.frame_multiple,
        "pixel_multiple": _PIXEL_MULTIPLES.get(spec.name, _PIXEL_MULTIPLE),
        "native": spec.native,
        "fps": spec.fps,
    }


def _shift_of(spec: FamilySpec) -> Any:
    if isinstance(spec.shift, float):
        return spec.shift
    parts = asdict(spec.shift)
    if "lines" in parts:
        parts["lines"] = sorted(parts["lines"].items())
    return parts


def text() -> str:
    """The file as it must be."""
    return json.dumps([row_of(spec) for spec in SPECS.values()], indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
