"""What the nodes refuse and pass on, with ComfyUI's own modules but without its server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from comfyui import families, loader, nodes
from tests.support.comfyui import MARKS, comfyui

pytestmark = MARKS


@pytest.fixture(scope="module", autouse=True)
def comfy() -> Iterator[SimpleNamespace]:
    """ComfyUI on the path."""
    with comfyui() as modules:
        yield modules


def packed(comfy: SimpleNamespace) -> Any:
    """A model with one layer of 32 x 64 in 4 bits, two of which ComfyUI stores in a byte."""
    from comfy.quant_ops import QuantizedTensor

    operations = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    network = nn.Module()
    network.diffusion_model = nn.Module()
    network.diffusion_model.layer = operations.Linear(64, 32, bias=False, device="cpu", dtype=torch.bfloat16)
    key = "diffusion_model.layer"
    state = QuantizedTensor.from_float(torch.randn(32, 64).bfloat16(), "TensorCoreNVFP4Layout").state_dict(f"{key}.weight")
    state[f"{key}.comfy_quant"] = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)
    network.load_state_dict(state, strict=False)
    return network


def test_a_lora_fits_packed_weights(comfy: SimpleNamespace) -> None:
    """By the layer's size, not by its storage's."""
    network = packed(comfy)
    assert network.state_dict()["diffusion_model.layer.weight"].shape == (32, 32)
    key_map = {"diffusion_model.layer": "diffusion_model.layer.weight", "part": ("diffusion_model.layer.weight", (0, 16, 16))}
    shapes = {f"{name}.lora_{kind}.weight": shape for name, rows in (("diffusion_model.layer", 32), ("part", 16), ("other", 8))
              for kind, shape in (("A", (4, 64)), ("B", (rows, 4)))}  # fmt: skip
    fit = loader.fit_of(shapes, key_map, nodes._weights(network, shapes, key_map))
    assert fit == loader.Fit(loaded=("diffusion_model.layer", "part"), missing=("other",), sizes={})


@pytest.mark.parametrize(("family", "dimensions"), [("qwen-image", 3), ("krea2", 3), ("flux", 2), ("wan2.1-t2v-1.3b", 3)])
def test_a_batch_is_refused_where_the_vae_makes_a_clip_of_it(family: str, dimensions: int) -> None:
    """ComfyUI would encode all pictures but the first away."""
    architecture = families.family_named(family).architecture
    network = SimpleNamespace(
        model_config=SimpleNamespace(unet_config=families.ARCHITECTURES[architecture]),
        latent_format=SimpleNamespace(latent_dimensions=dimensions),
    )
    model = SimpleNamespace(model=network, get_attachment=lambda key: None)
    fit = nodes.BygSize().fit
    assert len(fit(torch.rand(1, 64, 64, 3), model, family, 64)[0]) == 1
    if family in ("qwen-image", "krea2"):
        with pytest.raises(ValueError, match="takes a batch for a clip: give one picture at a time"):
            fit(torch.rand(2, 64, 64, 3), model, family, 64)
    else:
        assert len(fit(torch.rand(5, 64, 64, 3), model, family, 64)[0]) == 5
