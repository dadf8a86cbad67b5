"""The tiny Wan base: its command at a tiny budget, what survives a kill, and the shipped one's figures."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.bases import resumable, wan
from byg_plugin.config.loading import parse_config
from byg_plugin.demo import video_metrics, video_world
from byg_plugin.demo.video import BASE
from byg_plugin.models import make_family

LITTLE = wan.Budget(vae_share=1e-4, vae_batch=1, clips=6, flow_steps=3, high_steps=3, low_steps=3, flow_batch=2)
# What the shipped base has to reach: share of samples that follow their caption, in colours, shapes and ways.
COLOURS, SHAPES, WAYS = 0.9, 0.55, 0.95  # of 32 samples; figures.json has 0.96, 0.72, 1.00 of 192


@pytest.fixture(scope="module", autouse=True)
def few_clips_for_the_statistics():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "STATISTICS_BATCHES", 1)
        yield


def config_of(base: Path, folder: Path):
    return parse_config(
        {
            "model": {"family": wan.FAMILY, "path": str(base), "dtype": "float32", "device": "cpu"},
            "dataset": {
                "tuples": str(folder),
                "cache_dir": str(folder),
                "resolution": 64,
                "frames": video_world.FRAMES,
                "fps": video_world.FPS,
            },
            "conditioning": {"max_text_tokens": wan.TEXT_TOKENS},
            "train": {"steps": 1, "mixed_precision": "no"},
            "output": {"dir": str(folder)},
        }
    )


def work(folder: Path, budget=LITTLE, minutes: float = 0.0) -> wan.Work:
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    return wan.Work(folder, budget, 0, minutes, lambda stage, step, values: None)


def build(setup: wan.Work):
    vae = wan.train_vae(setup)
    return vae, *wan.train_flow(vae, setup)


def tensors(built) -> dict[str, torch.Tensor]:
    vae, experts, encoder = built
    modules = {"vae": vae, **experts, "text": encoder}
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A base after a few steps of everything, never interrupted."""
    return build(work(tmp_path_factory.mktemp("straight")))


def dying(function, at: int):
    """A function that is interrupted at its `at`-th call."""
    calls = itertools.count(1)

    def counted(*args, **kwargs):
        if next(calls) == at:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return counted


def test_a_killed_training_goes_on_and_ends_the_same(built, tmp_path, monkeypatch):
    """Killed in a stage of the VAE, in the shared training and in an expert's."""
    setup = work(tmp_path)
    whole = tensors(built)
    for name, at in (("_vae_losses", 3), ("_flow_loss", 2), ("_flow_loss", 7)):
        with monkeypatch.context() as patch:
            patch.setattr(wan, name, dying(getattr(wan, name), at))
            with pytest.raises(KeyboardInterrupt):
                build(setup)
    again = tensors(build(setup))
    assert again.keys() == whole.keys()
    # Not to the bit: fresh tensors lie elsewhere in memory, and kernels may take another path.
    assert all(torch.allclose(again[name], value, atol=1e-5) for name, value in whole.items())


def test_states_of_other_settings_are_refused(tmp_path):
    setup = work(tmp_path)
    wan.train_vae(setup)
    with pytest.raises(ValueError, match=r"vae-0.safetensors was made with other settings; delete it"):
        wan.train_vae(work(tmp_path, replace(LITTLE, vae_batch=2)))


def test_experts_part_from_one_network(built):
    _, experts, _ = built
    high, low = (experts[name].state_dict() for name in ("transformer", "transformer_2"))
    assert any(not torch.equal(high[name], low[name]) for name in high)
    assert all(torch.isfinite(value).all() for value in tensors(built).values())


def test_each_side_is_trained_on_its_own_times():
    rng = torch.Generator().manual_seed(0)
    high, low = (times(4096, rng) for times in (wan._high_times, wan._low_times))
    assert high.min() >= wan.BOUNDARY > low.max() and high.max() < 1 and low.min() >= 0
    # Uniform above; below, some at small t, as the images' times.
    assert high.mean() == pytest.approx((1 + wan.BOUNDARY) / 2, abs=1e-3)
    assert 0.08 < (low < 0.1).float().mean() < 0.3


def test_guided_targets_lean_away_from_no_caption():
    """With a network whose answer is its text's mean, the gradient's direction is told by the leaning alone."""
    flow = wan.Flow()
    seen = []

    def answer(network, noisy, t, text):
        seen.append(text)
        return torch.full_like(noisy, float(len(seen)), requires_grad=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "velocity", answer)
        noisy = torch.zeros(2, 16, 2, 8, 8)
        loss = wan._flow_loss(flow, noisy, torch.rand(2), ["make the circle red", ""], noisy, 0.5)
    # v = 1, without caption 2: the target 0 + 0.5 (1 - 2) = -0.5.
    assert loss.item() == pytest.approx(1.5**2)
    assert torch.equal(seen[1][0], seen[0][1]) and not torch.equal(seen[1][0], seen[0][0])


def test_each_text_is_read_once_by_a_frozen_encoder():
    flow = wan.Flow()
    texts = ["make the circle red", "", "make the circle red"]
    wanted = flow.encoder(texts)
    assert not any(parameter.requires_grad for parameter in flow.encoder.parameters())
    assert torch.allclose(flow.read(texts), wanted, atol=1e-5)
    flow.encoder = None  # never asked again
    assert torch.allclose(flow.read(texts[1:]), wanted[1:], atol=1e-5)


def test_a_word_tells_its_neighbours_and_nothing_of_what_is_further_away():
    encoder = wan.TextEncoder()

    def word(text: str, number: int) -> torch.Tensor:
        return encoder([text])[0, number]

    red = word("a red circle on a blue background", 1)
    for other in ("a red square on a blue background", "the red circle on a blue background"):
        assert (word(other, 1) - red).norm() > 0.1 * red.norm(), other
    assert (word("a red circle on a green background", 1) - red).norm() < 1e-3 * red.norm()


def test_the_matrix_that_reads_the_text_has_a_rate_of_its_own():
    network = wan.make_transformer()
    groups = [group for each in wan._optimizers(network, LITTLE) for group in each.param_groups]
    wide = network.condition_embedder.text_embedder.linear_1.weight
    assert [group["lr"] for group in groups if any(p is wide for p in group["params"])] == [LITTLE.text_rate]
    # Every weight in exactly one.
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, network.parameters()))


def test_every_sentence_fits_and_ends_in_zeros():
    encoder = wan.TextEncoder()
    edits = video_world.sample_split(200, 0, "sentences", video_world.EDIT_TYPES)
    texts = sorted({text for e in edits for text in (e.src_caption, e.tgt_caption, e.instruction, e.reverse_instruction)})
    ids = [encoder.tokenizer(text).input_ids for text in texts]
    assert max(map(len, ids)) <= wan.TEXT_TOKENS and len({tuple(one) for one in ids}) == len(texts)
    assert not any(encoder.tokenizer.unk_token_id in one for one in ids)
    with torch.no_grad():
        out = encoder(texts[:4])
    assert out.shape == (4, wan.TEXT_TOKENS, wan.TEXT_WIDTH)
    for one, length in zip(out, map(len, ids[:4]), strict=True):
        assert (one[length:] == 0).all() and (one[:length].abs().sum(-1) > 0).all()


def test_pixels_there_and_back():
    clips = np.stack([video_world.render(*clip) for clip in wan.sample_clips(np.random.default_rng(0), 2)])
    assert (wan.to_clips(wan.to_pixels(clips)) == clips).all()


def test_the_unclamped_decoder_is_the_decoder():
    vae = fresh_vae()
    latents = 0.1 * torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = wan._decode_unclamped(vae, latents), vae.decode(latents).sample
        assert theirs.abs().max() <= 1 and torch.allclose(ours.clamp(-1, 1), theirs, atol=1e-6)
        assert wan._decode_unclamped(vae, 100 * latents).abs().max() > 1


def fresh_vae():
    torch.manual_seed(0)
    return wan.AutoencoderKLWan(**wan.VAE_CONFIG).eval()


@torch.no_grad()
def test_the_convolution_of_training_is_the_stock_one():
    """Of a first frame, of the chunk after it, and of what the decoder upsamples in time."""
    vae, clip = fresh_vae(), a_clip()
    latents = vae.encode(clip).latent_dist.mode()
    pixels = vae.decode(latents).sample
    wan._for_training(vae)
    assert any(type(module) is wan._Convolution for module in vae.modules())
    assert torch.allclose(vae.encode(clip).latent_dist.mode(), latents, atol=1e-5)
    assert torch.allclose(vae.decode(latents).sample, pixels, atol=1e-5)


def a_clip() -> torch.Tensor:
    return wan.to_pixels(video_world.render(*video_world.sample_clip(np.random.default_rng(0)))[None])


@torch.no_grad()
def test_clips_start_as_pictures():
    """The second latent is that of the last frame alone, and is decoded as a picture, four times."""
    vae, clip = fresh_vae(), a_clip()
    wan._start_still(vae)
    latents = vae.encode(clip).latent_dist.mode()
    last = vae.encode(clip[:, :, -1:]).latent_dist.mode()
    assert torch.allclose(latents[:, :, 1:], last, atol=1e-5) and not torch.allclose(latents[:, :, :1], last, atol=1e-2)
    assert torch.allclose(vae.decode(latents).sample[:, :, 1:], vae.decode(last).sample.expand(-1, -1, 4, -1, -1), atol=1e-5)


def test_pictures_are_frames_of_clips():
    draw = functools.partial(wan._vae_pixels, batch=2)
    assert draw(np.random.default_rng(0), 1).shape == (4, 3, 1, 64, 64)
    assert draw(np.random.default_rng(0), video_world.FRAMES).shape == (2, 3, video_world.FRAMES, 64, 64)


def test_the_command_writes_a_base_that_pipeline_and_family_load(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(wan, "measure", functools.partial(wan.measure, n=4))
    monkeypatch.setattr(wan, "Budget", lambda **changes: replace(LITTLE, **changes))
    out = tmp_path / "base"
    words = ["--out", f"{out}", "--work", f"{tmp_path}/work", "--vae-share", "0.0001", "--flow-steps", "1", "--high-steps", "1"]
    wan.main([*words, "--low-steps", "1", "--clips", "6"])
    pipe = diffusers.WanPipeline.from_pretrained(out)
    assert pipe.config.boundary_ratio == 0.875 and pipe.transformer_2 is not None
    assert pipe.transformer.config.text_dim == pipe.text_encoder.config.d_model == 4096
    assert pipe.transformer.config.in_channels == pipe.vae.config.z_dim == 16 and tuple(pipe.transformer.config.patch_size) == (1, 2, 2)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000 and {path.suffix for path in files} <= {".json", ".safetensors"}
    figures = json.loads((out / "figures.json").read_text())
    assert figures["samples"] == 4 and figures["clips"] == 6 and abs(figures["latent_std"] - 1) < 0.5
    assert (tmp_path / "work/samples.png").is_file()
    assert "--low-steps 1" in json.loads((out / "history.json").read_text())["command"]

    family = make_family(config_of(out, tmp_path))
    assert family.boundary == 0.875 and family.pixel_multiple() == 16 and family.clip_frames(7) == 5
    encoders = family.load_text_encoders(torch.device("cpu"))
    ours = wan.TextEncoder()
    ours.umt5.load_state_dict(encoders.model.state_dict())
    text = "a red circle top left moving right on a green background"
    with torch.no_grad():
        assert torch.allclose(family.encode_texts(encoders, [text])["umt5"], ours([text]), atol=1e-4)
        vae = family.load_vae(torch.device("cpu"))
        pixels = a_clip()
        assert torch.allclose(family.encode_pixels(vae, pixels), wan.encode(vae, pixels), atol=1e-4)
        networks = dict(family.load_transformers(torch.float32))
        noisy, t = torch.randn(1, 16, 2, 8, 8), torch.tensor([0.9])
        v = family.velocity(networks["transformer"], noisy, t, {"umt5": ours([text])}, None)
        assert torch.allclose(v, wan.velocity(networks["transformer"], noisy, t, ours([text])), atol=1e-5)


def test_the_curve_forgets_what_is_made_again(tmp_path):
    log = resumable.curve_log(tmp_path / "curve.jsonl")
    for step, value in ((100, 1.0), (200, 0.5)):
        log("flow", step, {"flow": value})
    with open(tmp_path / "curve.jsonl", "a", encoding="utf-8") as file:
        file.write('{"stage": "fl')
    resumable.curve_log(tmp_path / "curve.jsonl")("flow", 200, {"flow": 0.4})
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [(row["step"], row["flow"]) for row in rows] == [(100, 1.0), (200, 0.4)]
    found = wan.history(tmp_path / "curve.jsonl", LITTLE, 3)
    assert found["parts"] == [{"what": "flow", "columns": ["step", "flow"], "curve": [[100, 1.0], [200, 0.4]]}]
    assert "--seed 3" in found["command"] and "--clips 6" in found["command"]


# --- the shipped base ---

shipped = pytest.mark.skipif(not BASE.is_dir(), reason="the video demo's base is not there yet")


@shipped
def test_the_shipped_base_is_small_and_holds_no_pickle():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


@shipped
def test_the_shipped_base_follows_captions_through_the_stock_pipeline():
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.WanPipeline.from_pretrained(BASE)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=1.0)
    pipe.set_progress_bar_config(disable=True)
    clips = wan.sample_clips(np.random.default_rng(11), 32)
    made = pipe(
        [video_world.caption(*clip) for clip in clips], height=64, width=64, num_frames=video_world.FRAMES, num_inference_steps=20,
        guidance_scale=1.0, max_sequence_length=wan.TEXT_TOKENS, output_type="np", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    seen = [video_metrics.follows_caption((one * 255).round().astype(np.uint8), *clip) for one, clip in zip(made, clips, strict=True)]
    colours, shapes, ways = np.mean(seen, 0)
    assert colours >= COLOURS and shapes >= SHAPES and ways >= WAYS, (colours, shapes, ways)


@shipped
def test_the_shipped_weights_are_of_this_architecture():
    for expert in ("transformer", "transformer_2"):
        weights = load_file(BASE / expert / "diffusion_pytorch_model.safetensors")
        wanted = wan.make_transformer().state_dict()
        assert {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in wanted.items()}
