"""ComfyUI's own modules, from the checkout that `COMFYUI` names."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

CHECKOUT = os.environ.get("COMFYUI")
STAND_INS = Path(__file__).parent / "comfyui_site"
"""torchvision and torchaudio, as far as ComfyUI imports names of them at its start: there is no build of them for every torch."""
MARKS = [
    pytest.mark.comfyui,
    pytest.mark.skipif(not CHECKOUT, reason="COMFYUI does not name a ComfyUI checkout (folder with comfy/lora.py)"),
]


def needs_comfyui(test: object) -> object:
    """Mark a test, also one of a class."""
    for mark in MARKS:
        test = mark(test)
    return test


@contextmanager
def comfyui() -> Iterator[SimpleNamespace]:
    """The modules that tests ask: `lora`, `detection`, `ops`."""
    root = Path(str(CHECKOUT)).expanduser()
    assert (root / "comfy" / "lora.py").is_file(), f"COMFYUI={root} has no comfy/lora.py"
    sys.path.insert(0, str(root))
    sys.path.append(str(STAND_INS))  # behind the real ones
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True  # before model_management looks for a GPU
        import comfy.lora
        import comfy.model_detection
        import comfy.ops

        yield SimpleNamespace(lora=comfy.lora, detection=comfy.model_detection, ops=comfy.ops)
    finally:
        sys.path.remove(str(root))
        sys.path.remove(str(STAND_INS))


def detected(comfy: SimpleNamespace, state: Mapping[str, Tensor]) -> SimpleNamespace:
    """The model that ComfyUI makes of a state dict in native names, on the meta device, and what its loader calls the layers."""
    config = comfy.detection.model_config_from_unet(dict(state), "")
    assert config is not None, "ComfyUI does not know this model"
    with torch.device("meta"):
        model = config.get_model(dict(state), "", device=torch.device("meta"))
    return SimpleNamespace(lora=comfy.lora, model=model, key_map=comfy.lora.model_lora_keys_unet(model, {}))
