"""The families with classifier-free guidance in ComfyUI's own server: source, LoRA, guidance and schedule make `edit.py`'s latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import save_file
from torch import Tensor

from byg_plugin import sampling
from byg_plugin.families import SPECS
from byg_plugin.models import make_family
from byg_plugin.sampling import seeded_noise
from tests.support import comfyui_bases as bases
from tests.support.comfyui import MARKS
from tests.support.comfyui_server import Server, edit_graph, serve

pytestmark = [*MARKS, pytest.mark.timeout(900)]
H, W, STEPS, SEED = 4, 8, 3, 5
FEW = 2  # steps of a few-step editor


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family with a base."""

    family: str
    make: Callable[[], Any]
    kind: str
    channels: int
    text: tuple[int, ...]
    """Length and width, or length, layers and width, of an encoded text."""
    layers: tuple[str, ...]
    stored: torch.dtype = torch.float32


CASES = {
    case.family: case
    for case in (
        Case(
            family="flux2-klein-4b",
            make=bases.klein,
            kind="flux2",
            channels=128,
            text=(512, bases.TEXT),  # ComfyUI fills shorter ones up in front
            layers=("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_out"),
        ),
        Case(
            family="krea2",
            make=bases.krea2,
            kind="krea2",
            channels=16,
            text=(7, 12, 160),
            layers=("transformer_blocks.0.attn.to_gate", "transformer_blocks.0.ff.down"),
        ),
        Case(
            family="qwen-image",
            make=bases.qwen,
            kind="qwen",
            channels=16,
            text=(7, 3584),
            layers=("transformer_blocks.0.attn.to_k", "transformer_blocks.0.img_mlp.net.2"),
        ),
        Case(
            family="z-image",
            make=bases.zimage,
            kind="zimage",
            channels=16,
            text=(7, bases.TEXT),
            layers=("layers.0.attention.to_q", "layers.0.feed_forward.w2"),
            stored=torch.bfloat16,
        ),
    )
}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_vae_gives_it(latents: Tensor, case: Case) -> Tensor:
    """Latents of the network -> of ComfyUI's VAE node; (B, C, 1, H, W) where it has frames."""
    if case.kind == "flux2":
        return latents[:, :, 0]
    if case.kind == "zimage":
        return latents[:, :, 0] / 0.3611 + 0.1159  # FLUX.1's
    config = AutoencoderKLQwenImage().config
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    return latents * std + mean


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("comfyui")) as started:
        yield started


@pytest.fixture(scope="module", params=list(CASES))
def world(server: Server, request: pytest.FixtureRequest) -> Iterator[SimpleNamespace]:
    """A base with a LoRA of each position, and inputs, in files of its own: ComfyUI reads no name twice. The base is gone afterwards."""
    case = CASES[request.param]
    network = case.make()
    base = server.base / "models" / "diffusion_models" / f"{case.family}.safetensors"
    bases.save_base(network, case.kind, base, case.stored)
    lora = bases.lora_of(network, list(case.layers), 4)
    for position in SPECS[case.family].positions:
        config = bases.config_of(case.family, server.base, conditioning={"position": position})
        metadata = bases.card_metadata(config)
        save_file(lora, server.base / "models" / "loras" / f"{case.family}_{position}.safetensors", metadata)
    few = {**metadata, "byg.sampler": "stochastic", "byg.steps": str(FEW)}
    save_file(lora, server.base / "models" / "loras" / f"{case.family}_few.safetensors", few)
    texts = [random(seed, 1, *case.text) for seed in (1, 2)]
    for name, text in zip(("text", "negative"), texts, strict=True):
        server.put(f"{case.family}_{name}.safetensors", cross=text.flatten(2))
    source = random(3, 1, case.channels, 1, H, W)
    server.put(f"{case.family}_source.safetensors", samples=as_vae_gives_it(source, case))
    encoded = [{"qwen": text, "mask": torch.ones(1, case.text[0], dtype=torch.bool)} for text in texts]
    yield SimpleNamespace(server=server, case=case, network=network, lora=lora, source=source, text=encoded[0], negative=encoded[1])
    base.unlink()


def ours(world: SimpleNamespace, position: str, strength: float) -> Tensor:
    config = bases.config_of(world.case.family, world.server.base, conditioning={"position": position})
    noise = seeded_noise(tuple(world.source.shape), SEED, torch.device("cpu"))
    bases.merged(world.network, world.lora, strength)
    try:
        return bases.edited(config, {"transformer": world.network}, noise, world.text, world.source, STEPS, world.negative)
    finally:
        bases.merged(world.network, world.lora, -strength)


def graph_of(case: Case, lora: dict[str, Any]) -> dict[str, Any]:
    """An edit whose position and guidance come with the LoRA."""
    graph = edit_graph(
        f"{case.family}.safetensors",
        f"{case.family}_source.safetensors",
        f"{case.family}_text.safetensors",
        steps=STEPS,
        position="as trained",
        lora=lora,
        negative=f"{case.family}_negative.safetensors",
        seed=SEED,
    )
    graph["guider"]["inputs"]["cfg"] = ["lora", 4]
    return graph


@pytest.mark.parametrize("position", ["same", "reference"])
@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_an_edit_is_ours(world: SimpleNamespace, position: str, strength: float) -> None:
    """Position, guidance and its formula come with the LoRA."""
    case = world.case
    if position not in SPECS[case.family].positions:
        pytest.skip(f"{case.family} has no {position!r}")
    graph = graph_of(case, {"lora": f"{case.family}_{position}.safetensors", "strength": strength})
    world.server.run(graph)
    edit = world.server.result("edit.safetensors")["scaled"]
    wanted = ours(world, position, strength)
    if len(SPECS[case.family].positions) > 1:
        other = ours(world, {"same": "reference", "reference": "same"}[position], strength)
        assert (wanted - other).abs().max() > 0.02, "the two positions are one"
    bases.close(edit.reshape(wanted.shape), wanted)


def test_a_few_step_editor_is_sampled_as_it_was_trained(world: SimpleNamespace) -> None:
    """Steps, sampler and no guidance come with the LoRA; the fresh noise is ComfyUI's own."""
    case, position = world.case, list(SPECS[world.case.family].positions)[-1]
    graph = graph_of(case, {"lora": f"{case.family}_few.safetensors"})
    graph["times"]["inputs"]["steps"] = ["lora", 6]
    graph["sample"]["inputs"]["sampler"] = ["lora", 9]
    world.server.run(graph)
    edit = world.server.result("edit.safetensors")["scaled"]
    wanted = ours_in_few_steps(world, position)
    bases.close(edit.reshape(wanted.shape), wanted)


def ours_in_few_steps(world: SimpleNamespace, position: str) -> Tensor:
    """Our own few steps, with the fresh noise that ComfyUI draws on a CPU."""
    family = make_family(bases.config_of(world.case.family, world.server.base, conditioning={"position": position}))
    noise = seeded_noise(tuple(world.source.shape), SEED, torch.device("cpu"))
    nodes = sampling.sampling_nodes(family, FEW, "shifted", tuple(noise.shape))
    fresh = torch.Generator().manual_seed(SEED + 1)
    bases.merged(world.network, world.lora, 1.0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "generator", lambda *key: fresh)
            velocity = partial(family.velocity, world.network)
            return sampling.sample_stochastic(velocity, noise, world.text, world.source, nodes, [SEED])
    finally:
        bases.merged(world.network, world.lora, -1.0)
