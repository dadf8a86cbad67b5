"""The memory sum of a critic: shapes alone, beside what autograd keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from byg_plugin.critics.decode import Decoder
from byg_plugin.critics.memory import CriticMemory, critic_memory, decoder_graph
from byg_plugin.critics.vlm import describe
from byg_plugin.models import make_family
from byg_plugin.training.memory import MemoryLine, with_critic
from tests.support.critic_runs import flux, latents, vae
from tests.support.memory import most_saved
from tests.support.tiny import tiny_config
from tests.support.tiny_critics import critic_config, critic_folder, tiny_critic_vlm
from tests.support.tiny_flux2 import flux2_folder


def test_the_decoders_graph_is_what_autograd_saves():
    family, x = flux(), latents(12, 12, 1, torch.float32)
    decoder = Decoder(family, vae(torch.float32), recompute=False)
    measured, _ = most_saved(lambda: decoder.pull_back(x, torch.ones(1, 3, 96, 96)))
    assert decoder_graph(family, family.meta_vae(), 96, 96, None, recompute=False) == pytest.approx(measured, rel=0.05)


def test_recomputing_keeps_the_inputs_and_one_block():
    family, x = flux(), latents(12, 12, 1, torch.float32)
    decoder = Decoder(family, vae(torch.float32))
    inputs, _ = most_saved(lambda: decoder.pull_back(x, torch.ones(1, 3, 96, 96)))  # a recomputed block is not seen by it
    plain = decoder_graph(family, family.meta_vae(), 96, 96, None, recompute=False)
    kept = decoder_graph(family, family.meta_vae(), 96, 96, None, recompute=True)
    assert inputs < kept < 0.6 * plain
    assert decoder_graph(family, family.meta_vae(), 96, 96, 48, recompute=True) == pytest.approx(kept / 4, rel=0.05)


@pytest.mark.parametrize("tile", [24, 40, 44, 95, 97, 200])
def test_a_tile_has_whole_latents(tile: int, tmp_path: Path):
    """FLUX.2's are of 16 pixels: its autoencoder's, packed."""
    family = make_family(tiny_config(tmp_path, model={"family": "flux2-klein-4b", "path": str(flux2_folder())}))
    whole = min(tile // 16 * 16, 96)
    found, same = (decoder_graph(family, family.meta_vae(), 96, 96, side, recompute=False) for side in (tile, whole))
    assert found == same


def test_the_towers_width_is_that_of_its_patches():
    config = critic_config(critic_folder("qwen3_vl"))
    described = describe(config)
    before = critic_memory(config, described, flux(), 64, 48).answer
    vision = described.config.vision_config
    # As Qwen2-VL has it, whose tower's hidden_size is the language model's.
    vision.embed_dim, vision.hidden_size = vision.hidden_size, 50 * vision.hidden_size
    assert critic_memory(config, described, flux(), 64, 48).answer == before


@pytest.mark.parametrize("kind", ["qwen3_vl", "internvl", "llava_onevision"])
def test_the_weights_are_the_models(kind: str):
    config, family = critic_config(critic_folder(kind)), flux()
    model = tiny_critic_vlm(kind).model
    found = critic_memory(config, describe(config), family, 64, 48)
    assert found.model == sum(p.numel() * 4 for p in model.parameters())
    assert found.vae == sum(p.numel() * 4 for p in vae().parameters())
    assert found.weights == found.model + found.vae and found.graph == max(found.answer, found.decoder)
    more = critic_memory(critic_config(critic_folder(kind), gradient_checkpointing=False), describe(config), family, 64, 48)
    assert more.answer > found.answer and more.decoder > found.decoder


def test_four_bits_are_an_eighth_and_its_scales():
    config = critic_config(critic_folder("qwen3_vl"), dtype="bfloat16", quantization="nf4")
    plain = critic_config(critic_folder("qwen3_vl"), dtype="bfloat16")
    four, sixteen = (critic_memory(each, describe(each), flux(), 64, 48).model for each in (config, plain))
    assert 0.3 < four / sixteen < 0.9


def lines(graph: float) -> list[MemoryLine]:
    return [MemoryLine(name="weights", bytes=10, exact=True), MemoryLine(name="passes", bytes=graph, exact=False)]


CRITIC = CriticMemory(model=7, vae=2, answer=20, decoder=30)


@pytest.mark.parametrize(("graph", "larger"), [(50.0, 50.0), (3.0, 30.0)])
def test_of_the_two_graphs_the_larger_one_counts(graph: float, larger: float):
    assert sum(line.bytes for line in with_critic(lines(graph), CRITIC, elsewhere=False)) == 10 + 7 + 2 + larger
    assert [line.bytes for line in with_critic(lines(graph), CRITIC, elsewhere=True)] == [10, graph]
