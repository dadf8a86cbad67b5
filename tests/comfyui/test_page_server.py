"""What needs ComfyUI's server and no network: its nodes are as the workflows describe them, and pictures go through it unshifted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import comfyui_workflows as workflows
from benchmarks.comfyui_graphs import KINDS, NOTE
from comfyui import sizes
from tests.support import comfyui_bases as bases
from tests.support.comfyui import MARKS
from tests.support.comfyui_server import Server, serve, touch_weights

pytestmark = [*MARKS, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("comfyui")
    for task in workflows.TASKS:
        touch_weights(folder, task.weights)
    with serve(folder) as started:
        grains = np.random.default_rng(0).integers(0, 255, (90, 160, 3), dtype=np.uint8)
        Image.fromarray(grains).resize((640, 359), Image.Resampling.BICUBIC).save(folder / "input" / "example.png")
        (folder / "input" / "source.mp4").touch()
        yield started


@pytest.fixture(scope="module")
def info(server: Server) -> dict[str, Any]:
    answer: dict[str, Any] = server.ask("/object_info")
    return answer


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != NOTE])
def test_nodes_are_as_the_page_form_describes_them(info: dict[str, Any], kind: str) -> None:
    """Widgets are stored by their order alone."""
    assert kind in info, f"this ComfyUI has no {kind}"
    inputs, outputs = KINDS[kind]
    declared = {**info[kind]["input"].get("required", {}), **info[kind]["input"].get("optional", {})}
    wanted = [name for name, type_ in inputs.items() if type_ != "page"]
    assert [name for name in declared if name in wanted] == wanted
    for name in declared.keys() - inputs.keys():
        assert name in info[kind]["input"].get("optional", {}) or is_connection(declared[name]), f"{kind} has a widget {name}"
    for name in wanted:
        assert is_connection(declared[name]) == inputs[name].isupper() or inputs[name] == "*", name
        if inputs[name].isupper():
            assert declared[name][0] == inputs[name]
    types = ["COMBO" if isinstance(type_, list) else type_ for type_ in info[kind]["output"]]
    assert types[: len(outputs)] == list(outputs.values())


def is_connection(declared: list[Any]) -> bool:
    options = declared[1] if len(declared) > 1 else {}
    widget = isinstance(declared[0], list) or declared[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
    return not widget or bool(options.get("forceInput"))


@pytest.mark.parametrize("name", [task.name for task in workflows.TASKS])
def test_the_server_takes_every_workflow(server: Server, name: str) -> None:
    """It checks types and values of all nodes before it runs the first; then an empty file of weights stops it."""
    graph = json.loads((workflows.FOLDER / f"{name}.api.json").read_text(encoding="utf-8"))
    answer = server.ask("/prompt", {"prompt": graph})
    assert answer["node_errors"] == {}


def test_a_picture_is_brought_to_size_and_back_without_a_shift(server: Server) -> None:
    """Through ComfyUI's own files and nodes, at a model's card: what is not edited comes back where it was."""
    network = bases.wan(num_attention_heads=2, ffn_dim=256)
    bases.save_base(network, "wan", server.base / "models/diffusion_models/narrow.safetensors")
    graph = {
        "model": {"class_type": "UNETLoader", "inputs": {"unet_name": "narrow.safetensors", "weight_dtype": "default"}},
        "picture": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
        "size": {
            "class_type": "BygSize",
            "inputs": {"image": ["picture", 0], "model": ["model", 0], "family": "wan2.1-t2v-1.3b", "resolution": 384},
        },
        "back": {"class_type": "BygSizeBack", "inputs": {"edit": ["size", 0], "original": ["picture", 0]}},
        "small": {"class_type": "SaveImage", "inputs": {"images": ["size", 0], "filename_prefix": "small"}},
        "whole": {"class_type": "SaveImage", "inputs": {"images": ["back", 0], "filename_prefix": "whole"}},
    }
    server.run(graph)
    outputs = server.base / "output"
    files = (server.base / "input" / "example.png", *outputs.glob("small*"), *outputs.glob("whole*"))
    original, small, whole = (Image.open(path).convert("RGB") for path in files)
    assert small.size == sizes.size_for((640, 359), 384, 16, 32) != original.size and whole.size == original.size
    best = min(((dx, dy) for dx in range(-2, 3) for dy in range(-2, 3)), key=lambda by: difference(original, whole, by))
    assert best == (0, 0)


def difference(a: Image.Image, b: Image.Image, by: tuple[int, int]) -> float:
    """Mean absolute difference of a and b moved by whole pixels, away from the borders."""
    moved = np.roll(np.asarray(b, dtype=np.float32), by, axis=(1, 0))
    return float(np.abs(np.asarray(a, dtype=np.float32) - moved)[8:-8, 8:-8].mean())
