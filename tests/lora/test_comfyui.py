"""Our LoRA files against ComfyUI's own key map and weight patching, from the checkout that `COMFYUI` names."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from byg_plugin.lora import flux_names
from byg_plugin.lora import formats as lora_formats
from byg_plugin.lora.check import check
from byg_plugin.models import files, flux_files
from tests.support.comfyui import MARKS, comfyui, detected

pytestmark = MARKS
DOUBLE, SINGLE, WIDTH = 19, 38, 3072


@pytest.fixture(scope="module")
def comfy() -> Iterator[SimpleNamespace]:
    """ComfyUI's full-size FLUX.1-dev on the meta device, as it detects it, and its key map."""
    with torch.device("meta"):
        network = FluxTransformer2DModel.from_config(files.shipped_config("flux_dev/transformer"))
    with comfyui() as modules:
        yield detected(modules, flux_files.to_native_layout(network.state_dict()))


def full_lora(layers: list[str] | None = None) -> dict[str, Tensor]:
    """PEFT files of a full FLUX.1-dev at rank 1: sizes are real, every tensor is one stored number."""
    out = {}
    for linear in flux_names.linears(DOUBLE, SINGLE, guidance=True):
        for part, width in zip(linear.parts, linear.widths, strict=True):
            if layers is None or any(word in part for word in layers):
                out[f"transformer.{part}.lora_A.weight"] = torch.ones(1, 1).expand(1, WIDTH)
                out[f"transformer.{part}.lora_B.weight"] = torch.ones(1, 1).expand(width * WIDTH, 1)
    return out


def loaded_by_comfyui(comfy: SimpleNamespace, tensors: dict[str, Tensor], caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """(patches that ComfyUI makes of a file, keys that it warns about)."""
    caplog.clear()
    patches = comfy.lora.load_lora(tensors, comfy.key_map)
    return len(patches), sum("lora key not loaded" in record.message for record in caplog.records)


IN_BLOCKS = ("attn.", "ff.", "ff_context.", "proj_mlp", "single_transformer_blocks.")


def default_layers() -> dict[str, Tensor]:
    """Attention and MLP of every block: what is trained by default."""
    return {k: v for k, v in full_lora(list(IN_BLOCKS)).items() if "norm" not in k}


def test_every_diffusers_layer_maps(comfy: SimpleNamespace, caplog: pytest.LogCaptureFixture):
    tensors = full_lora()
    layers = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]
    assert len(layers) == 504
    assert [layer for layer in layers if layer not in comfy.key_map] == []
    assert loaded_by_comfyui(comfy, tensors, caplog) == (504, 0)


def test_our_default_file_maps_whole(comfy: SimpleNamespace, caplog: pytest.LogCaptureFixture):
    tensors = default_layers()
    assert loaded_by_comfyui(comfy, tensors, caplog) == (418, 0)
    assert len(check(tensors, {"byg.family": "flux"}, ["comfyui"]).tools[0].loaded) == 418


@pytest.mark.parametrize("to", ["musubi", "comfyui"])
def test_native_files_map_whole(comfy: SimpleNamespace, to: lora_formats.Format, caplog: pytest.LogCaptureFixture):
    tensors = lora_formats.convert(default_layers(), to)
    assert loaded_by_comfyui(comfy, tensors, caplog) == (228, 0)
    assert len(check(tensors, {"byg.family": "flux"}, ["comfyui"]).tools[0].loaded) == 228


@pytest.mark.parametrize("prefix", ["lora_transformer_", "lycoris_", "base_model.model.", ""])
def test_check_agrees_about_other_namings(comfy: SimpleNamespace, prefix: str, caplog: pytest.LogCaptureFixture):
    tensors = {}
    for key, tensor in default_layers().items():
        layer, _, matrix = key.removeprefix("transformer.").partition(".lora_")
        name = layer.replace(".", "_") if prefix.endswith("_") else layer
        tensors[f"{prefix}{name}.lora_{matrix}"] = tensor
    reported = len(check(tensors, {"byg.family": "flux"}, ["comfyui"]).tools[0].loaded)
    made, _ = loaded_by_comfyui(comfy, tensors, caplog)
    if prefix == "":
        assert reported == 0, "check() answers for releases that lack the bare names"
        assert made in (0, 418)
    else:
        assert reported == made


@pytest.mark.parametrize(
    ("to", "layer"),
    [
        ("musubi", "double_blocks.3.txt_attn.qkv"),
        ("musubi", "single_blocks.5.linear1"),
        ("comfyui", "double_blocks.3.img_attn.qkv"),
        ("comfyui", "single_blocks.37.linear1"),
        ("comfyui", "final_layer.adaLN_modulation.1"),
    ],
)
def test_a_conversion_changes_no_weight_in_comfyui(comfy: SimpleNamespace, to: lora_formats.Format, layer: str):
    """ComfyUI patches one native weight from our file and from its conversion: the same weight, and not a zero update."""
    linear = flux_names.find_native(layer)
    assert linear is not None
    g = torch.Generator().manual_seed(0)
    ours = {}
    # Few input columns keep it small; the rows must be real, because ComfyUI's key map holds their offsets.
    for part, width in zip(linear.parts, linear.widths, strict=True):
        rows = 2 * WIDTH if linear.swap else width * WIDTH
        ours[f"transformer.{part}.lora_A.weight"] = torch.randn(3, 5, generator=g)
        ours[f"transformer.{part}.lora_B.weight"] = torch.randn(rows, 3, generator=g)
    theirs = lora_formats.convert(ours, to)
    weights = []
    for tensors in (ours, theirs):
        rows = 2 * WIDTH if linear.swap else sum(linear.widths) * WIDTH
        weight = torch.zeros(rows, 5)
        for target, adapter in comfy.lora.load_lora(tensors, comfy.key_map).items():
            key, offset, function = (target, None, None) if isinstance(target, str) else (*target, None)[:3]
            assert key == f"diffusion_model.{layer}.weight"
            patch = (1.0, adapter, 1.0, offset, function)
            weight = comfy.lora.calculate_weight([patch], weight, key, intermediate_dtype=torch.float32)
        weights.append(weight)
    assert weights[0].abs().max() > 1
    torch.testing.assert_close(weights[0], weights[1])
