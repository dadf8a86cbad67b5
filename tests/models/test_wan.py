"""The Wan family: positions, experts, time, text, pixels, sampler."""

from __future__ import annotations

import math
import os
from importlib.machinery import SourceFileLoader
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from byg_plugin import families, sampling, timesteps
from byg_plugin.families.wan import NEGATIVE
from byg_plugin.models import make_family
from byg_plugin.models.wan import HIGH, LOW, UniPC, WanFamily, diffusers_times, source_positions, to_wan_timestep, wan_times
from byg_plugin.timesteps import is_high
from tests.support.tiny_wan import A14B, T2V, TEXT_TOKENS, tiny_vae, tiny_wan, wan_config, wan_folder, wan_latents, wan_texts

CPU = torch.device("cpu")
T = torch.tensor([0.31, 0.77])


def family_of(tmp_path: Path, family: str = T2V, **sections: dict) -> WanFamily:
    made = make_family(wan_config(tmp_path, family, **sections))
    assert isinstance(made, WanFamily)
    return made


def pipeline(family: WanFamily, **parts: object) -> WanPipeline:
    """diffusers' own pipeline on the tiny folder's parts."""
    encoders = family.load_text_encoders(CPU)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0)
    pipe = WanPipeline(encoders.tokenizer, encoders.model, family.load_vae(CPU), scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- conditioning ---


@torch.no_grad()
def both_halves(network: torch.nn.Module, position: str, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The network's output for noisy and source frames."""
    with source_positions(network, position, first.shape[2], True):
        return network(torch.cat([first, second], dim=2), to_wan_timestep(T), wan_texts(2, 9)["umt5"], return_dict=False)[0]


def test_swapping_noisy_and_source_swaps_the_halves_of_the_output_at_the_same_positions():
    network, x, source = tiny_wan(), wan_latents(2, 1), wan_latents(2, 2)
    forward, backward = both_halves(network, "same", x, source), both_halves(network, "same", source, x)
    noisy, clean = forward.chunk(2, dim=2)
    assert (noisy - clean).abs().max() > 0.1
    assert (torch.cat([clean, noisy], dim=2) - backward).abs().max() <= 1e-5


@pytest.mark.parametrize("position", ["bernini", None])
def test_at_other_positions_a_swap_shows(position: str | None):
    """None: frames stacked without hook, whose positions go on counting."""
    network, x, source = tiny_wan(), wan_latents(2, 1), wan_latents(2, 2)
    if position is None:
        text = wan_texts(2, 9)["umt5"]
        with torch.no_grad():
            forward, backward = (
                network(torch.cat(pair, dim=2), to_wan_timestep(T), text, return_dict=False)[0] for pair in ((x, source), (source, x))
            )
    else:
        forward, backward = both_halves(network, position, x, source), both_halves(network, position, source, x)
    noisy, clean = forward.chunk(2, dim=2)
    assert (torch.cat([clean, noisy], dim=2) - backward).abs().max() > 1e-3


def angles(width: int, frame: int, row: int, column: int) -> list[float]:
    """Wan's rotation by hand: the head's pairs split among frame, row and column, each with its own frequencies."""
    side = 2 * (width // 6)
    out = []
    for index, share in ((frame, width - 2 * side), (row, side), (column, side)):
        out += [index * 10000 ** (-2 * pair / share) for pair in range(share // 2)]
    return out


@pytest.mark.parametrize("position", ["same", "bernini"])
def test_rotations_in_closed_form(position: str):
    network = tiny_wan()
    width, (frames, rows, columns) = 12, (2, 2, 3)
    with source_positions(network, position, frames, True):
        cos, sin = network.rope(torch.zeros(1, 16, 2 * frames, 2 * rows, 2 * columns))
    assert cos.shape == (1, 2 * frames * rows * columns, 1, width)
    token = 0
    for half in range(2):
        for index in [(f, r, c) for f in range(frames) for r in range(rows) for c in range(columns)]:
            for pair, angle in enumerate(angles(width, *index)):
                turned = angle + (10000 ** (-2 * pair / width) if half and position == "bernini" else 0.0)
                for channel in (2 * pair, 2 * pair + 1):
                    assert cos[0, token, 0, channel].item() == pytest.approx(math.cos(turned), abs=1e-6)
                    assert sin[0, token, 0, channel].item() == pytest.approx(math.sin(turned), abs=1e-6)
            token += 1


@torch.no_grad()
def test_velocity_is_the_first_half_of_the_output_and_leaves_the_network_as_it_was(tmp_path: Path):
    family, network = family_of(tmp_path), tiny_wan()
    x, source, text = wan_latents(2, 1), wan_latents(2, 2), wan_texts(2, 9)
    v = family.velocity(network, x, T, text, source)
    assert v.dtype == torch.float32 and v.shape == x.shape
    assert torch.equal(v, both_halves(network, "same", x, source)[:, :, :2])
    assert not network.rope._forward_hooks and not network.rope._forward_pre_hooks
    assert not network.condition_embedder.time_embedder._forward_hooks
    assert (family.velocity(network, x, T, text, wan_latents(2, 5)) - v).abs().max() > 1e-3
    plain = network(x, to_wan_timestep(T), text["umt5"], return_dict=False)[0]
    assert torch.equal(family.velocity(network, x, T, text, None), plain)
    with pytest.raises(ValueError, match="one shape"):
        family.velocity(network, x, T, text, source[:, :, :1])


def test_hooks_leave_after_an_error(tmp_path: Path):
    family, network = family_of(tmp_path), tiny_wan()
    with pytest.raises(RuntimeError):
        family.velocity(network, wan_latents(2, 1), T, {"umt5": torch.zeros(2, 3, 5)}, wan_latents(2, 2))
    assert not network.rope._forward_hooks and not network.condition_embedder.time_embedder._forward_hooks
    assert not torch.is_autocast_enabled("cpu")


@torch.no_grad()
def test_one_t_for_all_tokens_is_what_expanded_timesteps_of_one_t_give():
    network, x, text = tiny_wan(), wan_latents(2, 1), wan_texts(2, 9)["umt5"]
    expanded = to_wan_timestep(T)[:, None].expand(2, 2 * 2 * 3)
    one, many = (network(x, t, text, return_dict=False)[0] for t in (to_wan_timestep(T), expanded))
    assert (one - many).abs().max() <= 1e-5


@torch.no_grad()
def test_time_is_embedded_in_float32_under_autocast(tmp_path: Path):
    family, network = family_of(tmp_path), tiny_wan()
    seen = []
    handle = network.condition_embedder.time_embedder.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        family.velocity(network, wan_latents(2, 1), T, wan_texts(2, 9), wan_latents(2, 2))
        assert torch.is_autocast_enabled("cpu")
    handle.remove()
    exact = network.condition_embedder.time_embedder(network.condition_embedder.timesteps_proj(to_wan_timestep(T)))
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], exact)


def test_gradients_reach_the_source_and_are_the_same_with_checkpointing(tmp_path: Path):
    family, network = family_of(tmp_path), tiny_wan()
    gradients = []
    for recompute in (False, True):
        if recompute:
            network.enable_gradient_checkpointing()
        source = wan_latents(2, 2).requires_grad_()
        family.velocity(network, wan_latents(2, 1), T, wan_texts(2, 9), source).square().sum().backward()
        gradients.append(source.grad)
    assert gradients[0].abs().max() > 1e-3
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[0].abs().max()


# --- experts ---


def test_experts_by_t(tmp_path: Path):
    family = family_of(tmp_path, A14B)
    assert family.experts == (HIGH, LOW) and family.boundary == 0.875
    assert family.expert_of(torch.tensor([0.875, 1.0])) == HIGH
    assert family.expert_of(torch.tensor([0.8749999, 0.0])) == LOW
    with pytest.raises(AssertionError, match="split"):
        family.expert_of(torch.tensor([0.9, 0.1]))
    networks = dict(family.load_transformers(torch.float32))
    assert list(networks) == [HIGH, LOW] and not any(p.requires_grad for n in networks.values() for p in n.parameters())
    assert family_of(tmp_path).experts == (HIGH,) and family_of(tmp_path).expert_of(torch.tensor([0.9, 0.1])) == HIGH


def test_boundary_comes_from_configuration_checkpoint_or_publication(tmp_path: Path):
    import shutil

    copy = shutil.copytree(wan_folder(), tmp_path / "copy")
    index = copy / "model_index.json"
    index.write_text(index.read_text().replace("0.875", "0.9"), encoding="utf-8")
    assert family_of(tmp_path, A14B, model={"path": str(copy)}).boundary == 0.9
    assert family_of(tmp_path, A14B, model={"path": str(copy), "boundary": 0.5}).boundary == 0.5
    index.unlink()
    assert family_of(tmp_path, A14B, model={"path": str(copy)}).boundary == 0.875
    index.write_text('{"boundary_ratio": 900}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"model_index.json.*boundary_ratio = 900.*model.boundary"):
        _ = family_of(tmp_path, A14B, model={"path": str(copy)}).boundary


def test_one_file_given_twice_is_refused(tmp_path: Path):
    path = str(wan_folder() / "transformer")
    with pytest.raises(ValueError, match="hold the same weights"):
        list(family_of(tmp_path, A14B, model={"transformer": path, "transformer_2": path}).load_transformers(torch.float32))
    tiny_wan(num_layers=1).save_pretrained(tmp_path / "other")
    other = family_of(tmp_path, A14B, model={"transformer": path, "transformer_2": str(tmp_path / "other")})
    with pytest.raises(ValueError, match="not two experts of one model"):
        next(other.load_transformers(torch.float32))


# --- pixels and texts ---


def test_latents_are_normalised_and_come_back(tmp_path: Path):
    family = family_of(tmp_path)
    vae = family.load_vae(CPU)
    pixels = torch.rand(2, 3, 5, 32, 48) * 2 - 1
    latents = family.encode_pixels(vae, pixels)
    assert latents.shape == (2, 16, 2, 4, 6) and latents.dtype == torch.float32
    raw = tiny_vae().encode(pixels).latent_dist.mode()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(latents * std + mean, raw)
    decoded = family.decode_latents(vae, latents)
    assert decoded.shape == pixels.shape and decoded.abs().max() <= 1
    torch.testing.assert_close(decoded, tiny_vae().decode(raw).sample.detach(), rtol=1e-4, atol=1e-5)
    assert family.encode_pixels(vae, pixels[:, :, :1]).shape == (2, 16, 1, 4, 6)
    with pytest.raises(ValueError, match=r"4n \+ 1 frames, got 4"):
        family.encode_pixels(vae, pixels[:, :, :4])


def test_the_5b_has_a_coarser_vae_of_48_channels(tmp_path: Path):
    from tests.support.tiny_wan import write_wan

    write_wan(tmp_path / "5b", experts=1, in_channels=48, out_channels=48)
    statistics = {"latents_mean": [0.1] * 48, "latents_std": [2.0] * 48}
    shape = {"z_dim": 48, "decoder_base_dim": 4, "is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12}
    tiny_vae(**shape, **statistics, scale_factor_spatial=16).save_pretrained(tmp_path / "5b" / "vae")
    family = family_of(tmp_path, "wan2.2-ti2v-5b", model={"path": str(tmp_path / "5b")})
    assert family.pixel_multiple() == 32 and family.experts == (HIGH,)
    vae, pixels = family.load_vae(CPU), torch.rand(1, 3, 5, 32, 64) * 2 - 1
    latents = family.encode_pixels(vae, pixels)
    assert latents.shape == (1, 48, 2, 2, 4) and family.decode_latents(vae, latents).shape == pixels.shape
    network = dict(family.load_transformers(torch.float32))[HIGH]
    assert family.velocity(network, latents, T[:1], wan_texts(1, 9), latents).shape == latents.shape
    assert family.sequence_tokens(704, 1280, 121) == 2 * 31 * 22 * 40


def test_sizes(tmp_path: Path):
    family = family_of(tmp_path)
    assert family.pixel_multiple() == 16
    assert [family.clip_frames(n) for n in (1, 4, 5, 80, 81)] == [1, 1, 5, 77, 81]
    assert family.sequence_tokens(320, 576, 81) == 2 * 21 * 20 * 36 == 30_240


def test_tiling_is_part_of_the_fingerprint(tmp_path: Path):
    plain, tiled = (family_of(tmp_path, dataset={"vae_tiling": tiling}) for tiling in (False, True))
    assert plain.fingerprint("vae") != tiled.fingerprint("vae")
    assert tiled.load_vae(CPU).use_tiling and not plain.load_vae(CPU).use_tiling


def test_texts_are_those_of_the_published_pipeline(tmp_path: Path):
    family = family_of(tmp_path)
    encoders = family.load_text_encoders(CPU)
    texts = ["make the sky blue", "  red  dog &amp; cat in a house of snow on the beach"]
    ours = family.encode_texts(encoders, texts)["umt5"]
    pipe = pipeline(family, transformer=tiny_wan())
    theirs, _ = pipe.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS)
    assert ours.shape == (2, TEXT_TOKENS, 24) and torch.equal(ours, theirs)
    assert ours[0, 5:].abs().max() == 0 and ours[0, :5].abs().min(dim=1).values.max() > 0
    assert family.longer_than_limit(encoders, texts) == [False, True]


# --- sampling ---


def test_published_schedule(tmp_path: Path):
    nodes = timesteps.uniform_nodes(4)
    assert torch.allclose(family_of(tmp_path, A14B).shifted_nodes(nodes, (1, 16, 2, 4, 6)), 12 * nodes / (1 + 11 * nodes))
    spec = families.named(A14B)
    assert spec.defaults["sample"]["steps"] == 40 and spec.guidance_scales == (4.0, 3.0) and NEGATIVE.endswith("倒着走")
    times = UniPC(wan_times(40, 12.0)).times
    assert len(times) == 40 and times[0] > 0.998 and bool((times.diff() < 0).all())
    # The shift gives the high-noise expert 26 of the 40 steps.
    assert (times >= 0.875).sum() == 26


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0])
def test_unipc_has_the_times_of_wans_own_code(shift: float):
    for steps in (1, 2, 8, 20, 30, 40, 50):
        # As wan/utils/fm_solvers_unipc.py of Wan2.2 makes them, in its order of operations.
        sigmas = np.linspace(float(np.float32(1.0 - 0.001)), 0.0, steps + 1)[:-1]
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        solver = UniPC(wan_times(steps, shift))
        assert solver._scheduler.timesteps.tolist() == (sigmas * 1000).astype(np.int64).tolist()
        np.testing.assert_allclose(solver._scheduler.sigmas[:-1].numpy(), sigmas, rtol=1e-6)
        assert solver._scheduler.sigmas[-1] == 0
    assert round(1000 * UniPC(wan_times(40, 12.0)).times[-1].item()) == 235


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0, 12.0])
def test_by_option_unipc_has_diffusers_times(shift: float):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    for steps in (2, 8, 20, 40, 50):
        scheduler.set_timesteps(steps)
        solver = UniPC(diffusers_times(steps, shift))
        assert solver._scheduler.timesteps.tolist() == scheduler.timesteps.tolist()
        torch.testing.assert_close(solver._scheduler.sigmas, scheduler.sigmas, rtol=1e-6, atol=1e-7)
    ours, theirs = wan_times(40, 12.0), diffusers_times(40, 12.0)
    assert ((1000 * ours).long() != (1000 * theirs).long()).sum() == 19 and (1000 * theirs).long()[-1] == 242


@pytest.mark.musubi
@pytest.mark.skipif("MUSUBI_TUNER" not in os.environ, reason="MUSUBI_TUNER names no musubi-tuner checkout")
def test_sampling_is_that_of_wans_own_scheduler():
    """musubi-tuner carries Wan's own file."""
    path = Path(os.environ["MUSUBI_TUNER"]) / "src/musubi_tuner/wan/utils/fm_solvers_unipc.py"
    theirs = SourceFileLoader("wans_unipc", str(path)).load_module().FlowUniPCMultistepScheduler(shift=1, use_dynamic_shifting=False)
    theirs.set_timesteps(12, device="cpu", shift=12.0)
    ours, x = UniPC(wan_times(12, 12.0)), torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    y = x.clone()
    for index, t in enumerate(theirs.timesteps):
        assert round(1000 * ours.times[index].item()) == t
        x = ours.step(index, torch.sin(3 * x) + x * ours.times[index], x)
        y = theirs.step(torch.sin(3 * y) + y * ours.times[index], t, y, return_dict=False)[0]
    assert (x - y).abs().max() <= 1e-6 * y.abs().max()


@torch.no_grad()
def test_unipc_with_both_experts_is_diffusers_own_pipeline(tmp_path: Path):
    family = family_of(tmp_path, A14B)
    pipe = pipeline(family, transformer=tiny_wan(0), transformer_2=tiny_wan(7), boundary_ratio=0.875)
    text, x = wan_texts(1, 9), wan_latents(1, 1)
    options = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 8, "guidance_scale": 1.0, "output_type": "latent"}
    theirs = pipe(prompt_embeds=text["umt5"], latents=x.clone(), **options).frames
    networks, solver = dict(family.load_transformers(torch.float32)), family.solver(8, "shifted", "unipc_diffusers")
    used = []
    for index, t in enumerate(solver.times):
        expert = family.expert_of(t[None])
        used.append(expert)
        x = solver.step(index, family.velocity(networks[expert], x, t[None], text, None), x)
    assert set(used) == {HIGH, LOW} and used == sorted(used)
    torch.testing.assert_close(x, theirs, rtol=1e-5, atol=1e-5)


def test_guidance_has_each_experts_scale_and_the_source_in_both_branches(tmp_path: Path):
    config = wan_config(tmp_path, A14B, sample={"cfg_low_noise": 1.0})
    family, calls = make_family(config), []

    def field(noisy: torch.Tensor, t: torch.Tensor, text: dict[str, torch.Tensor], source: torch.Tensor | None) -> torch.Tensor:
        assert source is not None and len(text["umt5"]) == len(noisy) == 2
        calls.append(float(t[0]))
        return noisy * text["umt5"].mean() + source

    x, source, text, negative = wan_latents(2, 1), wan_latents(2, 2), wan_texts(2, 9), wan_texts(1, 5)
    guided = sampling.guided(field, negative, lambda t: config.cfg_at(bool(is_high(t, family.boundary))), family)
    for value, scale, count in ((0.875, 4.0, 2), (0.8, 1.0, 1)):
        calls.clear()
        t = torch.full((2,), value)
        plain, away = field(x, t, text, source), x * negative["umt5"].mean() + source
        calls.clear()
        torch.testing.assert_close(guided(x, t, text, source), away + scale * (plain - away))
        assert len(calls) == count


def test_solver_by_configuration(tmp_path: Path):
    x, source, text = wan_latents(1, 1), wan_latents(1, 2), wan_texts(1, 9)
    times: dict[str, list[float]] = {}
    for solver in ("auto", "euler", "unipc", "unipc_diffusers"):
        config = wan_config(tmp_path, A14B, sample={"solver": solver})
        seen = times[solver] = []

        def field(noisy: torch.Tensor, t: torch.Tensor, text: object, source: object, seen: list[float] = seen) -> torch.Tensor:
            seen.append(float(t[0]))
            return torch.ones_like(noisy)

        out = sampling.sample_as_configured(config, make_family(config), field, x, text, source, steps=5, schedule="shifted")
        # A constant velocity is integrated exactly by every solver, from t = 1 (UniPC: 0.999 in its own clock) to 0.
        torch.testing.assert_close(out, x - 1, rtol=0, atol=2e-3)
    assert times["auto"] == times["unipc"] and len(times["euler"]) == 5
    assert len({tuple(seen) for seen in times.values()}) == 3
    assert times["euler"][0] == 1.0 and times["unipc"][0] == pytest.approx(0.999, abs=1e-3)
