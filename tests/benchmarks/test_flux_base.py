"""The tiny FLUX base: its command at a tiny budget, and the shipped one's figures."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.bases import common, flux
from byg_plugin.demo import metrics, world
from byg_plugin.demo.__main__ import BASE

# What the shipped base has to reach: share of samples that follow their caption in colours and in shapes at once. One of 64
# may fail: another machine rounds otherwise.
BASE_SAMPLES, BASE_FOLLOWS = 64, 0.98
VAE_ERROR = 0.01  # mean absolute error of the shipped VAE's pictures, colours in 0..1


@pytest.fixture(scope="module")
def edits():
    return world.sample_split(60, 3, "eval", tuple(world.EDIT_TYPES))


def test_every_word_has_its_own_token_and_no_sentence_is_cut():
    clip, t5 = flux.make_tokenizers()
    sentences = flux.sentences(0)
    for text in sentences:
        for tokenizer in (clip, t5):
            ids = tokenizer(text).input_ids
            assert len(ids) <= tokenizer.model_max_length and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.unk_token_id not in ids
    assert len({tuple(t5(text).input_ids) for text in sentences}) == len(sentences)


def test_clip_pools_at_the_end_of_the_sentence():
    torch.manual_seed(0)
    encoders = flux.TextEncoders().eval()
    ids = encoders.clip_tokenizer("make the circle blue", padding="max_length", return_tensors="pt").input_ids
    out = encoders.clip(ids)
    assert torch.equal(out.pooler_output[0], out.last_hidden_state[0, 5])


def test_training_times_cover_small_t():
    t = common.sample_times(4096, torch.Generator().manual_seed(0))
    assert t.min() >= 0 and t.max() < 1
    assert 0.09 < (t < 0.1).float().mean() < 0.2
    assert (t > 0.9).float().mean() > 0.05


def test_the_command_writes_a_base_that_the_pipeline_loads(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(flux, "measure", functools.partial(flux.measure, n=16))
    folders = ["--out", f"{tmp_path}/base", "--report", f"{tmp_path}/report"]
    flux.main([*folders, "--vae-share", "0.0004", "--flow-steps", "0"])
    assert not (tmp_path / "base").exists() and (tmp_path / "report/curve.json").is_file()
    with pytest.raises(SystemExit):
        flux.main([*folders, "--vae", f"{tmp_path}/report/vae", "--flow-steps", "0"])
    flux.main([*folders, "--vae", f"{tmp_path}/report/vae", "--flow-steps", "2", "--scenes", "100"])
    assert str(tmp_path) not in (tmp_path / "base/vae/config.json").read_text()  # where the VAE lay is nobody's business
    pipe = diffusers.FluxPipeline.from_pretrained(tmp_path / "base")
    assert abs(json.loads((tmp_path / "base/figures.json").read_text())["latent_std"] - 1) < 0.5
    assert pipe.vae.config.latent_channels == 16 and pipe.transformer.config.in_channels == 64
    assert (tmp_path / "report/samples.png").is_file() and (tmp_path / "report/curve.json").is_file()


@pytest.fixture(scope="module")
def pipeline():
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.FluxPipeline.from_pretrained(BASE)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_vae_that_is_not_the_bases_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    channels = flux.VAE_CONFIG["block_out_channels"]
    flux.AutoencoderKL(**flux.VAE_CONFIG | {"block_out_channels": [2 * n for n in channels]}).save_pretrained(tmp_path / "wide")
    for vae in ("wide", "nowhere"):
        with pytest.raises(SystemExit):
            flux.main(["--out", f"{tmp_path}/base", "--report", f"{tmp_path}/report", "--vae", f"{tmp_path}/{vae}"])
        assert f"--vae {tmp_path}/{vae}: not a VAE of VAE_CONFIG" in capsys.readouterr().err


def test_shipped_base_is_small_and_holds_no_pickle():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 5_800_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


@pytest.fixture(scope="module")
def samples(pipeline):
    """Scenes, and pictures that the stock pipeline makes of their captions."""
    rng = np.random.default_rng(11)
    scenes = [world.sample_scene(rng, int(rng.choice(3, p=(0.1, 0.4, 0.5)))) for _ in range(BASE_SAMPLES)]
    images = pipeline(
        [world.caption(scene) for scene in scenes], height=world.SIZE, width=world.SIZE, num_inference_steps=20,
        guidance_scale=flux.GUIDANCE, max_sequence_length=flux.TEXT_TOKENS, output_type="np",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return list(zip(scenes, (images * 255).round().astype(np.uint8), strict=True))


def test_shipped_base_follows_captions_through_the_stock_pipeline(samples):
    seen = np.array([metrics.follows_caption(image, scene) for scene, image in samples])
    assert seen.all(1).mean() >= BASE_FOLLOWS, seen.mean(0)


def test_shipped_base_knows_every_word(pipeline):
    for tokenizer, unlike in zip((pipeline.tokenizer, pipeline.tokenizer_2), flux.make_tokenizers(), strict=True):
        assert tokenizer.get_vocab() == unlike.get_vocab()
        assert tokenizer.model_max_length == unlike.model_max_length


def test_shipped_vae_reconstructs_the_world(pipeline, edits):
    pixels = flux.to_pixels(np.stack([world.render(e.before) for e in edits[:16]]))
    latents = flux.encode(pipeline.vae, pixels)
    decoded = flux.decode(pipeline.vae, latents)
    assert np.abs(decoded / 255.0 - flux.to_images(pixels) / 255.0).mean() < VAE_ERROR
    assert 0.9 < latents.std() < 1.1 and abs(latents.mean()) < 0.1
