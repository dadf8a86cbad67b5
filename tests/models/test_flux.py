"""FLUX: packing, positions, exact times, the sampler's shift and the VAE's units, against diffusers' own code."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from byg_plugin.models import files, flux, flux_files
from byg_plugin.models.base import Family
from byg_plugin.models.flux import FluxFamily
from byg_plugin.models.tokens import pack, position_ids, unpack
from tests.models.contract import FamilyContract
from tests.support.tiny import model_folder, tiny_config, tiny_flux, tiny_texts

CPU = torch.device("cpu")
H, W = 4, 6


def family(position: str = "same", guidance: float = 3.5) -> FluxFamily:
    conditioning = {"position": position, "guidance": guidance}
    return FluxFamily(tiny_config(Path("unused"), model={"path": str(model_folder())}, conditioning=conditioning))


def latents(seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 16, 1, H, W, generator=torch.Generator().manual_seed(seed))


class TestContract(FamilyContract):
    name = "flux"
    head = "proj_out"
    sinusoids = "time_text_embed.time_proj"
    moved = "kontext"
    full_size = (11_901_408_320, 19 * 12 + 38 * 5)

    def folder(self) -> Path:
        return model_folder()

    def pipeline(self, family: Family, network: nn.Module) -> FluxPipeline:
        encoders = family.load_text_encoders(CPU)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(files.shipped_config("flux_dev/scheduler"))
        texts = (encoders.clip, encoders.clip_tokenizer, encoders.t5, encoders.t5_tokenizer)
        return FluxPipeline(scheduler, family.load_vae(CPU), *texts, network)

    def run(self, pipe: Any, *, steps: int, latents: Tensor, output_type: str, prompt: list[str]) -> Tensor:
        sizes = {"height": 8 * H, "width": 8 * W, "max_sequence_length": 8, "num_inference_steps": steps}
        out = pipe(prompt, latents=pack(latents), guidance_scale=3.5, output_type=output_type, **sizes).images
        return unpack(out, H, W) if output_type == "latent" else out

    def native(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return flux_files.to_native_layout(state)

    def full_network(self) -> nn.Module:
        with torch.device("meta"):
            return FluxTransformer2DModel.from_config(files.shipped_config("flux_dev/transformer"))


# --- packing and positions ---


def test_pack_is_diffusers_packing_and_unpack_inverts_it():
    x = latents(0)
    tokens = pack(x)
    assert torch.equal(tokens, FluxKontextPipeline._pack_latents(x[:, :, 0], 2, 16, H, W))
    assert torch.equal(unpack(tokens, H, W), x)
    assert not torch.equal(unpack(tokens, W, H)[:, :, :, :H, :H], x[:, :, :, :H, :H]), "height and width are not exchangeable"


@pytest.mark.parametrize("shape", [(1, 16, 2, 4, 4), (1, 16, 1, 5, 4), (1, 16, 1, 4, 5)])
def test_pack_refuses_frames_and_odd_sides(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="one frame and even latent sides"):
        pack(torch.zeros(shape))


@pytest.mark.parametrize("first", [0, 1])
def test_position_ids_are_the_kontext_pipelines(first: int):
    theirs = FluxKontextPipeline._prepare_latent_image_ids(1, H // 2, W // 2, CPU, torch.float32)
    theirs[..., 0] = first
    assert torch.equal(position_ids(H, W, first, CPU), theirs)


def ids_of_call(position: str, source: Tensor | None) -> Tensor:
    network, seen = tiny_flux(), []
    network.pos_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    family(position).velocity(network, latents(0), torch.tensor([0.3, 0.8]), tiny_texts(2, 1), source)
    return seen[0][8:]  # after the 8 text tokens


def test_source_positions():
    own = position_ids(H, W, 0, CPU)
    assert torch.equal(ids_of_call("same", latents(1)), torch.cat([own, own]))
    assert torch.equal(ids_of_call("kontext", latents(1)), torch.cat([own, position_ids(H, W, 1, CPU)]))
    assert torch.equal(ids_of_call("kontext", None), own)


# --- the velocity ---


def by_hand(network: nn.Module, noisy: Tensor, t: Tensor, texts: dict[str, Tensor], source: Tensor | None, first: float) -> Tensor:
    """A call of the transformer written from the Kontext pipeline, with loops instead of reshapes."""

    def tokens(x: Tensor) -> Tensor:
        patches = [x[:, :, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(1) for i in range(H // 2) for j in range(W // 2)]
        return torch.stack(patches, dim=1)

    grid = [[0.0, float(i), float(j)] for i in range(H // 2) for j in range(W // 2)]
    ids = grid if source is None else grid + [[first, i, j] for _, i, j in grid]
    hidden = tokens(noisy) if source is None else torch.cat([tokens(noisy), tokens(source)], dim=1)
    out = network(
        hidden_states=hidden,
        timestep=t,
        guidance=torch.full((len(t),), 3.5),
        encoder_hidden_states=texts["t5"],
        pooled_projections=texts["pooled"],
        txt_ids=torch.zeros(8, 3),
        img_ids=torch.tensor(ids),
        return_dict=False,
    )[0][:, : len(grid)]
    result = torch.zeros_like(noisy)
    for k, (_, i, j) in enumerate(grid):
        i, j = int(i), int(j)
        result[:, :, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = out[:, k].reshape(len(t), 16, 2, 2)
    return result


@torch.no_grad()
@pytest.mark.parametrize(("position", "first"), [("same", 0.0), ("kontext", 1.0)])
@pytest.mark.parametrize("with_source", [True, False])
def test_velocity_is_the_hand_made_call(position: str, first: float, with_source: bool):
    network, t, texts = tiny_flux(), torch.tensor([0.25, 0.8]), tiny_texts(2, 1)
    source = latents(1) if with_source else None
    ours = family(position).velocity(network, latents(0), t, texts, source)
    torch.testing.assert_close(ours, by_hand(network, latents(0), t, texts, source, first), rtol=1e-5, atol=1e-6)
    assert ours.dtype == torch.float32 and ours.std() > 0.01
    if with_source:
        other = "kontext" if position == "same" else "same"
        assert not torch.allclose(ours, family(other).velocity(network, latents(0), t, texts, source), atol=1e-4)


def test_schnell_has_no_guidance():
    network = tiny_flux(guidance_embeds=False)
    out = family().velocity(network, latents(0), torch.tensor([0.3, 0.8]), tiny_texts(2, 1), latents(1))
    assert torch.isfinite(out).all()


# --- exact times ---


def times_of_call(dtype: torch.dtype, autocast: bool) -> list[Tensor]:
    """What enters the sinusoidal embeddings of t and guidance."""
    network, seen = tiny_flux().to(dtype), []
    network.time_text_embed.time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        family().velocity(network, latents(0), torch.tensor([0.77, 0.3301]), tiny_texts(2, 1), latents(1))
    return seen


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_times_and_guidance_are_exact_in_16_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, autocast: bool):
    wanted = [torch.tensor([0.77, 0.3301]) * 1000, torch.tensor([3500.0, 3500.0])]
    for got, exact in zip(times_of_call(dtype, autocast), wanted, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, exact)
    # Without the hook diffusers rounds: this test would notice its loss.
    monkeypatch.setattr(flux, "first_arguments", lambda *args: nullcontext())
    assert not all(torch.equal(g.float(), w) for g, w in zip(times_of_call(dtype, autocast), wanted, strict=True))


# --- the sampler's shift ---


@pytest.mark.parametrize("side", [64, 128])
def test_shifted_nodes_are_the_schedulers(side: int):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(files.shipped_config("flux_dev/scheduler"))
    nodes = torch.linspace(1, 0, 21)
    tokens = (side // 2) ** 2
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=nodes[:-1].tolist(), mu=mu)
    ours = family().shifted_nodes(nodes, (1, 16, 1, side, side))
    torch.testing.assert_close(ours, scheduler.sigmas, rtol=1e-5, atol=1e-6)
    assert ours[0] == 1 and ours[-1] == 0 and (ours[1:-1] > nodes[1:-1]).all()


# --- texts ---


def test_texts_are_padded_to_one_length():
    together = TestContract().texts(["add snow", "remove the blue dog"])
    assert together["t5"].shape == (2, 8, 24) and together["pooled"].shape == (2, 20)


def test_the_tokenizers_own_warning_is_not_shown(caplog: pytest.LogCaptureFixture):
    encoders = family().load_text_encoders(CPU)
    assert family().longer_than_limit(encoders, [" ".join(["snow"] * 7), " ".join(["snow"] * 8)]) == [False, True]  # one more: T5's end
    assert "longer than the specified maximum" not in caplog.text


def test_sizes():
    flux_family = family()
    assert flux_family.pixel_multiple() == 16
    assert flux_family.sequence_tokens(64, 96) == 2 * 4 * 6 + 8
    assert flux_family.expert_of(torch.tensor([0.1, 0.9])) in flux_family.meta_transformers()
