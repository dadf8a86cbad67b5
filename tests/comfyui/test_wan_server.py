"""Wan in ComfyUI's own server: clips edited with one network of real width, and with two networks in two stages, are `edit.py`'s."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from byg_plugin.lora import formats
from byg_plugin.models import files, make_family
from byg_plugin.sampling import sampling_nodes, seeded_noise
from tests.support import comfyui_bases as bases
from tests.support.comfyui import MARKS
from tests.support.comfyui_server import Refused, edit_graph, sample_node, serve

pytestmark = [*MARKS, pytest.mark.timeout(900)]
SHAPE, STEPS, SEED = (1, 16, 3, 4, 8), 4, 5
LAYERS = ["blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0", "blocks.0.attn2.to_v", "blocks.0.ffn.net.2"]
ONE, TWO = "wan2.1-t2v-1.3b", "wan2.2-t2v-a14b"
NARROW = {"num_attention_heads": 2, "ffn_dim": 512}
CPU = torch.device("cpu")


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def save_lora(lora: dict[str, Tensor], family: str, path: Path, metadata: dict[str, str]) -> None:
    save_file(formats.convert(lora, "comfyui", family=family), path, metadata)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server with a Wan2.1 of real width and a narrow pair of experts, LoRAs of both positions, and inputs."""
    folder = tmp_path_factory.mktemp("comfyui")
    wide, high, low = bases.wan(0), bases.wan(1, **NARROW), bases.wan(2, **NARROW)
    text = {"umt5": random(1, 1, bases.TEXT_TOKENS, bases.WAN_TEXT)}
    negative = {"umt5": random(2, 1, bases.TEXT_TOKENS, bases.WAN_TEXT)}
    source = random(3, *SHAPE)
    named = {"one": wide, "high": high, "low": low}
    loras = {name: bases.lora_of(network, LAYERS, seed) for seed, (name, network) in enumerate(named.items(), start=4)}
    with serve(folder) as server:
        for name, network in (("wide", wide), ("high", high), ("low", low)):
            bases.save_base(network, "wan", folder / f"models/diffusion_models/{name}.safetensors")
        for position in ("same", "bernini"):
            where = folder / "models/loras"
            config = bases.config_of(ONE, folder, conditioning={"position": position})
            save_lora(loras["one"], ONE, where / f"one_{position}.safetensors", bases.card_metadata(config))
            config = bases.config_of(TWO, folder, conditioning={"position": position})
            for name in ("high", "low"):
                metadata = bases.card_metadata(config, expert=f"{name}_noise", boundary=0.875)
                save_lora(loras[name], TWO, where / f"two_{position}_{name}_noise.safetensors", metadata)
        scale = scale_of("vae")
        server.put("text.safetensors", cross=text["umt5"])
        server.put("negative.safetensors", cross=negative["umt5"])
        server.put("source.safetensors", samples=source * scale.std + scale.mean)
        server.put("long.safetensors", samples=random(6, 1, 16, 5, 4, 8))
        server.put("empty.safetensors", samples=torch.zeros(SHAPE))
        networks = SimpleNamespace(wide=wide, high=high, low=low)
        yield SimpleNamespace(server=server, networks=networks, text=text, negative=negative, source=source, loras=loras, folder=folder)


def scale_of(vae: str) -> SimpleNamespace:
    """Mean and standard deviation of the latents by channel."""
    with torch.device("meta"):
        config = AutoencoderKLWan.from_config(files.shipped_config(f"wan/{vae}")).config
    mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    return SimpleNamespace(mean=mean, std=std)


def ours(world: SimpleNamespace, family: str, position: str, *, lora: bool, cfg: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    sample = {"solver": "euler", "cfg_high_noise": cfg[0], "cfg_low_noise": cfg[1]}
    if family == ONE:
        del sample["cfg_low_noise"]
    config = bases.config_of(family, world.folder, conditioning={"position": position}, sample=sample)
    names = {"transformer": ("wide", "one")} if family == ONE else {"transformer": ("high", "high"), "transformer_2": ("low", "low")}
    networks = {expert: getattr(world.networks, name) for expert, (name, _) in names.items()}
    for expert, (_, name) in names.items():
        bases.merged(networks[expert], world.loras[name], float(lora))
    try:
        noise = seeded_noise(SHAPE, SEED, CPU)
        negative = None if cfg == (1.0, 1.0) else world.negative
        return bases.edited(config, networks, noise, world.text, world.source, STEPS, negative)
    finally:
        for expert, (_, name) in names.items():
            bases.merged(networks[expert], world.loras[name], -float(lora))


@pytest.mark.parametrize("position", ["same", "bernini"])
@pytest.mark.parametrize("lora", [False, True])
def test_an_edit_of_one_network_is_ours(world: SimpleNamespace, position: str, lora: bool) -> None:
    loaded = {"lora": f"one_{position}.safetensors"} if lora else None
    graph = edit_graph(
        "wide.safetensors",
        "source.safetensors",
        "text.safetensors",
        steps=STEPS,
        position="as trained" if lora else position,
        lora=loaded,
        negative="negative.safetensors",
        cfg=6.0,
        family="as trained" if lora else ONE,
        seed=SEED,
    )
    if lora:
        graph["guider"]["inputs"]["cfg"] = ["lora", 4]
    world.server.run(graph)
    wanted = ours(world, ONE, position, lora=lora, cfg=(6.0, 6.0))
    other = ours(world, ONE, {"same": "bernini", "bernini": "same"}[position], lora=lora, cfg=(6.0, 6.0))
    assert (wanted - other).abs().max() > 0.02, "the two positions are one"
    bases.close(world.server.result("edit.safetensors")["scaled"], wanted)


@pytest.mark.parametrize("position", ["same", "bernini"])
def test_an_edit_of_the_5b_is_ours(world: SimpleNamespace, position: str) -> None:
    """Its latents have 48 channels of its own VAE, and ComfyUI has a class of its own for it."""
    family, network = "wan2.2-ti2v-5b", bases.wan(3, **NARROW, in_channels=48, out_channels=48)
    source, scale = random(7, 1, 48, 3, 4, 8), scale_of("vae_5b")
    bases.save_base(network, "wan", world.folder / "models/diffusion_models/five.safetensors")
    lora = bases.lora_of(network, LAYERS, 8)
    config = bases.config_of(family, world.folder, conditioning={"position": position})
    save_lora(lora, family, world.folder / f"models/loras/five_{position}.safetensors", bases.card_metadata(config))
    world.server.put("five_source.safetensors", samples=source * scale.std + scale.mean)
    graph = edit_graph(
        "five.safetensors",
        "five_source.safetensors",
        "text.safetensors",
        steps=STEPS,
        position="as trained",
        lora={"lora": f"five_{position}.safetensors"},
        negative="negative.safetensors",
        seed=SEED,
    )
    graph["guider"]["inputs"]["cfg"] = ["lora", 4]
    world.server.run(graph)
    noise = seeded_noise((1, 48, 3, 4, 8), SEED, CPU)
    wanted = bases.edited(config, {"transformer": bases.merged(network, lora)}, noise, world.text, source, STEPS, world.negative)
    bases.close(world.server.result("edit.safetensors")["scaled"], wanted)


def two_stages(position: str, *, low: bool = True) -> dict[str, dict[str, Any]]:
    """An edit by two networks: loader and source with both, the steps on either side of the boundary one after the other."""
    graph = edit_graph(
        "high.safetensors",
        "source.safetensors",
        "text.safetensors",
        steps=STEPS,
        position="as trained",
        lora={"lora": f"two_{position}_high_noise.safetensors"},
        negative="negative.safetensors",
        seed=SEED,
    )
    graph["guider"]["inputs"]["cfg"] = ["lora", 4]
    graph["model_low"] = {"class_type": "UNETLoader", "inputs": {"unet_name": "low.safetensors", "weight_dtype": "default"}}
    if low:
        graph["lora"]["inputs"]["model_low"] = ["model_low", 0]
    graph["source"]["inputs"]["model_low"] = ["lora", 1]
    inputs = {"model": ["source", 2], "positive": ["text", 0], "negative": ["negative", 0], "cfg": ["lora", 5]}
    graph["guider_low"] = {"class_type": "CFGGuider", "inputs": inputs}
    graph["silence"] = {"class_type": "DisableNoise", "inputs": {}}
    graph["sample"]["inputs"]["sigmas"] = ["times", 1]
    graph["sample_low"] = sample_node("silence", "guider_low", ["times", 2], ["sample", 0])
    graph["save"]["inputs"]["latent"] = ["sample_low", 0]
    graph["sigmas"] = {"class_type": "TestSigmas", "inputs": {"sigmas": ["times", 0], "file": "sigmas.safetensors"}}
    return graph


@pytest.mark.parametrize("position", ["same", "bernini"])
def test_an_edit_of_two_networks_is_ours(world: SimpleNamespace, position: str) -> None:
    """Both halves of the LoRA, each network's guidance, its steps on its side of the boundary."""
    world.server.run(two_stages(position))
    bases.close(world.server.result("edit.safetensors")["scaled"], ours(world, TWO, position, lora=True, cfg=(4.0, 3.0)))
    nodes = sampling_nodes(make_family(bases.config_of(TWO, world.folder)), STEPS, "shifted", SHAPE)
    assert torch.equal(world.server.result("sigmas.safetensors")["sigmas"], nodes)
    assert 0 < int((nodes >= 0.875).sum()) < STEPS, "one network makes all steps"


def test_a_low_noise_network_without_a_lora_has_the_position_of_the_other(world: SimpleNamespace) -> None:
    graph = two_stages("bernini")
    graph["lora"]["inputs"]["strength_low"] = 0.0
    world.server.run(graph)
    wanted = world.server.result("edit.safetensors")["scaled"]
    graph["lora"]["inputs"]["lora_low"] = "none"
    world.server.run(graph)
    assert torch.equal(world.server.result("edit.safetensors")["scaled"], wanted)


def refusal(world: SimpleNamespace, graph: dict[str, dict[str, Any]]) -> str:
    with pytest.raises(Refused) as refused:
        world.server.run(graph)
    return str(refused.value)


def test_exchanged_halves_are_refused(world: SimpleNamespace) -> None:
    graph = two_stages("same")
    graph["lora"]["inputs"]["lora"] = "two_same_low_noise.safetensors"
    assert "is the low-noise half of a pair" in refusal(world, graph)


def test_a_half_that_is_missing_is_named(world: SimpleNamespace) -> None:
    loras = world.folder / "models/loras"
    (loras / "alone_high_noise.safetensors").write_bytes((loras / "two_same_high_noise.safetensors").read_bytes())
    graph = two_stages("same")
    graph["lora"]["inputs"]["lora"] = "alone_high_noise.safetensors"
    assert "(alone_low_noise.safetensors)" in refusal(world, graph)


def test_halves_of_two_pairs_are_refused(world: SimpleNamespace) -> None:
    graph = two_stages("same")
    graph["lora"]["inputs"]["lora_low"] = "two_bernini_low_noise.safetensors"
    assert "are no pair" in refusal(world, graph)


def test_a_clip_of_another_length_is_refused(world: SimpleNamespace) -> None:
    graph = edit_graph("wide.safetensors", "long.safetensors", "text.safetensors", steps=1, family=ONE)
    graph["empty"] = {"class_type": "TestLatent", "inputs": {"file": "empty.safetensors"}}
    graph["sample"]["inputs"]["latent_image"] = ["empty", 0]
    assert "the source clip has 5 latent frames, the clip being sampled 3" in refusal(world, graph)


def test_a_family_must_be_known(world: SimpleNamespace) -> None:
    """Without a card, Wan may be any of four, whose times differ."""
    graph = edit_graph("wide.safetensors", "source.safetensors", "text.safetensors", steps=1)
    assert "choose the family" in refusal(world, graph)


def test_models_without_source_are_left_as_they_were(world: SimpleNamespace) -> None:
    """Also Wan's rotation, which `same` replaces while it samples."""
    plain = edit_graph("wide.safetensors", None, "text.safetensors", steps=1, family=ONE, seed=1)
    world.server.run(plain)
    before = world.server.result("edit.safetensors")["scaled"]
    same = edit_graph("wide.safetensors", "source.safetensors", "text.safetensors", steps=1, family=ONE, seed=2)
    bernini = edit_graph("wide.safetensors", "source.safetensors", "text.safetensors", steps=1, family=ONE, seed=2, position="bernini")
    edits = []
    for graph in (bernini, same, bernini):
        world.server.run(graph | {"noise": {"class_type": "RandomNoise", "inputs": {"noise_seed": 10 + len(edits)}}})
        graph["noise"]["inputs"]["noise_seed"] = 2
        world.server.run(graph)
        edits.append(world.server.result("edit.safetensors")["scaled"])
    assert torch.equal(edits[0], edits[2]) and (edits[0] - edits[1]).abs().max() > 0.01
    plain["noise"]["inputs"]["noise_seed"] = 3
    world.server.run(plain)
    plain["noise"]["inputs"]["noise_seed"] = 1
    world.server.run(plain)
    assert torch.equal(world.server.result("edit.safetensors")["scaled"], before)


def test_a_second_model_of_a_guider_is_not_sampled_at_another_position(world: SimpleNamespace) -> None:
    """ComfyUI calls it with the first one's wrappers, and its network has not the first one's patches."""
    graph = edit_graph("wide.safetensors", "source.safetensors", "text.safetensors", steps=1, family=ONE)
    graph["other"] = {"class_type": "UNETLoader", "inputs": {"unet_name": "low.safetensors", "weight_dtype": "default"}}
    graph["negative"] = {"class_type": "TestConditioning", "inputs": {"file": "negative.safetensors"}}
    inputs = {"model": ["source", 0], "positive": ["text", 0], "cfg": 2.0, "model_negative": ["other", 0], "negative": ["negative", 0]}
    graph["guider"] = {"class_type": "DualModelGuider", "inputs": inputs}
    assert "use a guider of one model" in refusal(world, graph)
