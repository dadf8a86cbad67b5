"""FLUX.1 of real width in ComfyUI's own server: its latents are `edit.py`'s."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from byg_plugin.sampling import seeded_noise
from tests.support import comfyui_bases as bases
from tests.support.comfyui import MARKS
from tests.support.comfyui_server import Refused, Server, edit_graph, serve

pytestmark = [*MARKS, pytest.mark.timeout(900)]
H, W, STEPS, SEED = 8, 12, 3, 5
LAYERS = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_v_proj",
    "transformer_blocks.0.ff.net.2",
    "single_transformer_blocks.0.attn.to_k",
    "single_transformer_blocks.0.proj_out",
]
FACTOR, SHIFT = 0.3611, 0.1159  # of FLUX.1's latents


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server with a base, a LoRA of each position and inputs; our network beside it."""
    folder = tmp_path_factory.mktemp("comfyui")
    network = bases.flux()
    text = {"t5": random(1, 1, bases.TEXT_TOKENS, bases.TEXT), "pooled": random(2, 1, bases.TEXT)}
    source = random(3, 1, 16, H, W)  # as the network sees it
    lora = bases.lora_of(network, LAYERS, 4)
    with serve(folder) as server:
        bases.save_base(network, "flux", folder / "models/diffusion_models/base.safetensors")
        for position in ("same", "kontext"):
            config = bases.config_of("flux", folder, conditioning={"position": position, "guidance": 3.5})
            save_file(lora, folder / f"models/loras/{position}.safetensors", bases.card_metadata(config))
        server.put("text.safetensors", cross=text["t5"], pooled=text["pooled"])
        server.put("source.safetensors", samples=source / FACTOR + SHIFT)
        server.put("two.safetensors", samples=torch.cat([source, source]) / FACTOR + SHIFT)
        server.put("large.safetensors", samples=random(6, 1, 16, H, W + 4))
        server.put("empty.safetensors", samples=torch.zeros(1, 16, H, W))
        yield SimpleNamespace(server=server, network=network, text=text, source=source, lora=lora, folder=folder)


def ours(world: SimpleNamespace, position: str, lora: float, *, with_source: bool = True) -> Tensor:
    config = bases.config_of("flux", world.folder, conditioning={"position": position, "guidance": 3.5})
    noise = seeded_noise((1, 16, 1, H, W), SEED, torch.device("cpu"))
    bases.merged(world.network, world.lora, lora)
    try:
        source = world.source.unsqueeze(2) if with_source else None
        return bases.edited(config, {"transformer": world.network}, noise, world.text, source, STEPS)[:, :, 0]
    finally:
        bases.merged(world.network, world.lora, -lora)


def theirs(server: Server, **graph: object) -> Tensor:
    server.run(edit_graph("base.safetensors", text="text.safetensors", steps=STEPS, seed=SEED, **graph))  # type: ignore[arg-type]
    return server.result("edit.safetensors")["scaled"]


@pytest.mark.parametrize("position", ["same", "kontext"])
def test_an_edit_without_lora_is_ours(world: SimpleNamespace, position: str) -> None:
    edit, wanted = theirs(world.server, source="source.safetensors", position=position), ours(world, position, 0.0)
    print(position, "largest difference", (edit - wanted).abs().max(), "of", wanted.abs().max())
    torch.testing.assert_close(edit, wanted, rtol=0, atol=1e-3)
