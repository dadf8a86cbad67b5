"""What a layout says is what formats, files and reports follow, also of a layout that is not ours."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from byg_plugin.families import LORA_FORMATS, SPECS
from byg_plugin.lora import files as lora_files
from byg_plugin.lora import formats as lora_formats
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.check import check, runtime
from byg_plugin.lora.layout import Layout, Linear, Module, Network
from byg_plugin.lora.layouts import LAYOUTS, layout_of

FUSED = Linear("cells.{}.kv", ("rooms.{}.to_k", "rooms.{}.to_v"), (1, 1))


def native(name: str) -> Linear | None:
    found = re.fullmatch(r"cells[._](\d+)[._]kv", name)
    return FUSED.at(int(found[1])) if found else None


def part(name: str) -> tuple[Linear, int] | None:
    found = re.fullmatch(r"rooms[._](\d+)[._]to_([kv])", name)
    return (FUSED.at(int(found[1])), "kv".index(found[2])) if found else None


HOUSE = Layout(
    name="house",
    find_native=native,
    find_part=part,
    linears=lambda: [FUSED.at(0)],
    networks=(Network("House", {"cells.": 2}, {"kv": (4, 8)}),),
    blocks=("cells.",),
    pattern=re.compile(r"(cells|rooms)[._]\d"),
    peft=("diffusers", "musubi"),
    written="comfyui",
    pairs=True,
    in_diffusers=lambda module, modules: f"one of {len(modules)}",
    loader="FluxLoraLoaderMixin",
    runtime={("same", "comfyui"): "runs in the house"},
)


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> str:
    """A family of this layout."""
    monkeypatch.setitem(LAYOUTS, "house", HOUSE)
    monkeypatch.setitem(SPECS, "house-1", replace(SPECS["flux"], name="house-1", lora_layout="house"))
    return "house-1"


def lora(prefix: str = "transformer.") -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"A": (2, 4), "B": (4, 2)}
    return {
        f"{prefix}rooms.{block}.to_{kind}.lora_{matrix}.weight": torch.randn(shapes[matrix], generator=rng)
        for block in range(2)
        for kind in "kv"
        for matrix in "AB"
    }


def test_every_family_has_a_layout_and_its_positions_have_sentences():
    assert {spec.lora_layout for spec in SPECS.values()} == set(LAYOUTS)
    for spec in SPECS.values():
        assert set(layout_of(spec.name).runtime) == {(position, tool) for position in spec.positions for tool in LORA_FORMATS}


def adapted(network: Network, name: str, end: str) -> dict[str, Tensor]:
    """A LoRA of all layers of a network whose native name has this end, on the meta device."""
    tensors = {}
    for linear in LAYOUTS[name].linears():
        start = next((start for start in network.blocks if linear.native.startswith(start)), None)
        if start is None or not linear.native.endswith(end) or int(linear.native.split(".")[1]) >= network.blocks[start]:
            continue
        inputs, outputs = network.shapes[end]
        for part, width in zip(linear.parts, linear.widths, strict=True):
            tensors[f"transformer.{part}.lora_A.weight"] = torch.empty(1, inputs, device="meta")
            tensors[f"transformer.{part}.lora_B.weight"] = torch.empty(outputs // sum(linear.widths) * width, 1, device="meta")
    return tensors


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_and_sizes_tell_the_layout(name: str):
    for network in LAYOUTS[name].networks:
        for end in network.shapes:
            tensors = adapted(network, name, end)
            assert tensors, f"{network.name} has no {end}"
            guessed = SPECS[lora_formats.guess_family(tensors, {})].lora_layout
            assert guessed == name, (network.name, end)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_loader_is_one_of_diffusers(name: str):
    from diffusers import loaders

    assert hasattr(getattr(loaders, LAYOUTS[name].loader), "load_lora_weights")


def test_names_tell_the_layout_where_no_size_does():
    """Attention is called alike in FLUX.1 and FLUX.2; the feed-forward layers are not."""
    layers = ("attn.to_q", "ff.linear_in")
    tensors = {f"transformer.transformer_blocks.0.{layer}.lora_{matrix}.weight": torch.ones(5, 5) for layer in layers for matrix in "AB"}
    with pytest.raises(ValueError, match="in FLUX.2 klein 4B 3072"):
        lora_formats.guess_family(tensors, {})


def test_a_new_layout_is_guessed_and_converted(house: str):
    tensors = lora()
    assert lora_formats.guess_family(tensors, {}) == house
    with pytest.raises(ValueError, match="in block 2, and House has 2"):
        lora_formats.guess_family({key.replace("rooms.1", "rooms.2"): tensor for key, tensor in tensors.items()}, {})
    comfy = lora_formats.convert(tensors, "comfyui", family=house)
    assert {key.rpartition("kv.")[2] for key in comfy} == {"lora_down.weight", "lora_up.weight", "alpha"}
    musubi = lora_formats.convert(tensors, "musubi", family=house)
    assert set(musubi) == {f"lora_unet_cells_{block}_kv.lora_{matrix}.weight" for block in range(2) for matrix in "AB"}
    back = lora_formats.convert(comfy, "diffusers", family=house)
    for block, kind in ((0, "k"), (1, "v")):
        (a, b), (c, d) = ([some[f"transformer.rooms.{block}.to_{kind}.lora_{m}.weight"] for m in "BA"] for some in (tensors, back))
        torch.testing.assert_close(a @ b, c @ d)


def test_native_names_are_read_where_the_layout_has_them(house: str, monkeypatch: pytest.MonkeyPatch):
    bare = {"cells.0.kv.lora_A.weight": torch.ones(2, 4), "cells.0.kv.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(ValueError, match="no LoRA of house-1"):
        lora_formats.parse(bare, house)
    monkeypatch.setitem(LAYOUTS, "house", replace(HOUSE, native_prefixes=("",)))
    (module,), _ = lora_formats.parse(bare, house)
    assert isinstance(module, Module) and module.part is None


def test_files_of_a_pair_are_written_and_read_where_the_layout_has_them(house: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = lora() | lora("transformer_2.")
    written = lora_formats.written_files(tensors, house)
    assert set(written) == {"_high_noise", "_low_noise"}
    assert all(key.startswith("diffusion_model.cells.") for key in written["_low_noise"])
    for suffix, some in written.items():
        lora_files.write_lora(tmp_path / f"lora{suffix}.safetensors", some, {})
    named, _ = lora_formats.read_named(tmp_path / "lora.safetensors", house)
    assert set(named) == set(tensors)
    monkeypatch.setitem(LAYOUTS, "house", replace(HOUSE, pairs=False, written="diffusers"))
    named, _ = lora_formats.read_named(tmp_path / "lora_low_noise.safetensors", house)
    assert set(named) == set(lora())
    assert lora_formats.written_files(lora(), house).keys() == {""}


def test_reports_follow_the_layout(house: str, monkeypatch: pytest.MonkeyPatch):
    metadata = {"byg.family": house, "byg.position": "same"}
    comfy, musubi = check(lora(), metadata, ["comfyui", "musubi"]).tools
    assert not comfy.lost and comfy.runtime == "runs in the house"
    assert {item.why for item in musubi.lost} == {"musubi-tuner reads lora_unet_….lora_down/lora_up only: convert with --to musubi"}
    assert runtime("musubi", LoraCard.from_metadata(metadata)) == "unknown: byg.position is 'same'"
    monkeypatch.setitem(LAYOUTS, "house", replace(HOUSE, parts_in_comfyui="no rooms", blocks=("cells.0.",)))
    assert {item.why for item in check(lora(), metadata, ["comfyui"]).tools[0].lost} == {"no rooms"}
    assert [item.name for item in lora_formats.losses(lora(), "musubi", family=house)] == ["cells.1.kv"]
    wrong = {
        key: tensor / 2 if key.endswith("alpha") else tensor
        for key, tensor in lora_formats.convert(lora(), "comfyui", family=house).items()
    }
    (diffusers,) = check(wrong, metadata, ["diffusers"]).tools
    assert {item.why for item in diffusers.lost} == {"one of 2"}, "in the layout's words, where diffusers does not load a layer"
