"""Wan LoRA files: conversion of a full expert, and the report against what diffusers' own loader does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from byg_plugin import convert_lora
from byg_plugin.lora import files as lora_files
from byg_plugin.lora import formats as lora_formats
from byg_plugin.lora import wan_names
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.check import check, runtime
from tests.support.tiny_wan import A14B, tiny_wan

BLOCKS, WIDTH = 2, 24
OURS = {"byg.family": A14B}  # says what the tiny network's width cannot


def layers(blocks: int = BLOCKS, outside: bool = False) -> list[tuple[str, str]]:
    """(native, diffusers) names of the adapted linears."""
    inside = [linear.at(block) for block in range(blocks) for linear in wan_names.BLOCK]
    return [(linear.native, linear.parts[0]) for linear in (*inside, *(wan_names.OUTSIDE if outside else ()))]


def lora(
    name: Callable[[str, str], str], down: str, up: str, *, alpha: bool = False, which: list[tuple[str, str]] | None = None
) -> dict[str, Tensor]:
    """A random rank-3 LoRA of the tiny Wan under a naming."""
    rng = torch.Generator().manual_seed(0)
    shapes = {n: m.weight.shape for n, m in tiny_wan().named_modules() if isinstance(m, torch.nn.Linear)}
    out = {}
    for native, ours in layers() if which is None else which:
        rows, columns = shapes[ours]
        key = name(native, ours)
        out[f"{key}{down}"] = torch.randn(3, columns, generator=rng)
        out[f"{key}{up}"] = torch.randn(rows, 3, generator=rng)
        if alpha:
            out[f"{key}.alpha"] = torch.tensor(1.5)
    return out


AB, KOHYA, DIFFSYNTH = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
)
NAMINGS: dict[str, dict[str, Tensor]] = {
    "comfyui A/B": lora(lambda n, d: f"diffusion_model.{n}", *AB),
    "comfyui down/up alpha": lora(lambda n, d: f"diffusion_model.{n}", *KOHYA, alpha=True),
    "comfyui some layers": lora(lambda n, d: f"diffusion_model.{n}", *AB, which=layers()[3:5]),
    "comfyui outside": lora(lambda n, d: f"diffusion_model.{n}", *AB, which=layers(outside=True)),
    "peft": lora(lambda n, d: f"transformer.{d}", *AB),
    "peft some layers": lora(lambda n, d: f"transformer.{d}", *AB, which=layers()[3:5]),
    "peft alpha": lora(lambda n, d: f"transformer.{d}", *AB, alpha=True),
    "musubi": lora(lambda n, d: f"lora_unet_{n.replace('.', '_')}", *KOHYA, alpha=True),
    "musubi without alpha": lora(lambda n, d: f"lora_unet_{n.replace('.', '_')}", *KOHYA),
    "musubi some layers": lora(lambda n, d: f"lora_unet_{n.replace('.', '_')}", *KOHYA, alpha=True, which=layers()[:4]),
    "diffsynth": lora(lambda n, d: n, *DIFFSYNTH),
    "low-noise keys": lora(lambda n, d: f"transformer_2.{d}", *AB),
}


def loaded_by_diffusers(tensors: dict[str, Tensor]) -> int:
    """How many layers diffusers' pipeline really adapts; an error is none."""
    network = tiny_wan()
    pipe = WanPipeline(None, None, None, UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), network)
    try:
        pipe.load_lora_weights(dict(tensors))
    except (KeyError, ValueError):
        return 0
    return sum(isinstance(module, BaseTunerLayer) for module in network.modules())


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_report_is_what_diffusers_does(naming: str):
    tensors = {name: tensor.clone() for name, tensor in NAMINGS[naming].items()}
    report = check(tensors, OURS, tools=["diffusers"]).tools[0]
    assert all(torch.equal(tensor, NAMINGS[naming][name]) for name, tensor in tensors.items()), "diffusers multiplies in place"
    assert len(report.loaded) + len(report.lost) == sum(
        key.endswith((".lora_A.weight", ".lora_down.weight", ".lora_A.default.weight")) for key in tensors
    )
    assert len(report.loaded) == loaded_by_diffusers(tensors)


@pytest.mark.parametrize("naming", NAMINGS)
def test_comfyui_reads_native_names_alone(naming: str):
    report = check(NAMINGS[naming], OURS, tools=["comfyui"]).tools[0]
    expected = naming.startswith(("comfyui", "musubi"))
    assert bool(report.loaded) == expected and bool(report.lost) != expected


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("to", lora_formats.FORMATS)
def test_every_naming_converts_and_means_the_same(naming: str, to: lora_formats.Format):
    tensors = NAMINGS[naming]
    if naming == "comfyui outside" and to == "musubi":
        with pytest.raises(ValueError, match="musubi would lose 6 of 26 layers"):
            lora_formats.convert(tensors, to, family=A14B)
        return
    converted = lora_formats.convert(tensors, to, family=A14B)
    assert not check(converted, OURS, tools=[to]).tools[0].lost

    def updates(some: dict[str, Tensor]) -> dict[str, Tensor]:
        return {m.linear.native: m.scale * m.up @ m.down for m in lora_formats.parse(some, A14B)[0]}

    before, after = updates(tensors), updates(converted)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name])


def test_a_full_expert_is_400_layers_in_every_format():
    tensors = {}
    for _, ours in layers(40):
        tensors |= {f"transformer.{ours}.lora_A.weight": torch.ones(1, 1), f"transformer.{ours}.lora_B.weight": torch.ones(1, 1)}
    for to in lora_formats.FORMATS:
        converted = lora_formats.convert(tensors, to, family=A14B)
        report = check(converted, {"byg.family": A14B, "byg.position": "bernini"})
        assert report.modules == 400 and report.format == to
        assert not next(tool for tool in report.tools if tool.tool == to).lost


def test_runtime_by_position():
    assert "stock: BerniniConditioning" in runtime("comfyui", LoraCard(family=A14B, position="bernini"))
    assert "needs a node" in runtime("comfyui", LoraCard(family=A14B, position="same"))
    assert "WanBygPipeline" in runtime("diffusers", LoraCard(family=A14B, position="same"))


def test_the_command_knows_wan_without_being_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    low = {}
    for (_, ours), (inputs, outputs) in zip(layers(1), [(5120, 5120)] * 8 + [(5120, 13824), (13824, 5120)], strict=True):
        low[f"transformer_2.{ours}.lora_A.weight"] = torch.ones(1, inputs)
        low[f"transformer_2.{ours}.lora_B.weight"] = torch.ones(outputs, 1)
    lora_files.write_lora(tmp_path / "low.safetensors", low, {})
    with pytest.raises(SystemExit, match="1"):
        convert_lora.main([str(tmp_path / "low.safetensors"), "--check"])
    assert "load_into_transformer_2=True" in capsys.readouterr().out
    convert_lora.main([str(tmp_path / "low.safetensors"), "--to", "comfyui", "--out", str(tmp_path / "out.safetensors")])
    convert_lora.main([str(tmp_path / "out.safetensors"), "--check", "--tools", "diffusers", "comfyui"])
