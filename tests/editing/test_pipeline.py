"""Editing with a LoRA that the trainer wrote, on tiny random models in a real diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from byg_plugin import EditPipeline, sampling
from byg_plugin.data.buckets import crop_to_bucket, to_tensor
from byg_plugin.data.media import load_image
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.hosts.merged import MergedRollout
from byg_plugin.hosts.sharding import Sharding
from byg_plugin.lora.files import read_lora, write_lora
from byg_plugin.models import flux_files
from byg_plugin.models.flux import FluxFamily
from byg_plugin.sampling import sample, sampling_nodes
from tests.support.editing import CPU, difference, photo, pipeline, pixels
from tests.support.tiny import make_trainer, model_folder, run_config, tiny_config, tiny_texts, wake


@torch.no_grad()
def by_hand(lora: Path | None, source: Path, instruction: str, *, steps: int, seed: int) -> torch.Tensor:
    """Edited pixels from the parts, without `EditPipeline` and without the host's LoRA code: diffusers' own loader."""
    family = FluxFamily(tiny_config(Path("unused"), model={"path": str(model_folder())}))
    network = flux_files.TRANSFORMER.load(model_folder(), dtype=torch.float32)
    if lora is not None:
        parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
        FluxPipeline(**parts, transformer=network).load_lora_weights(str(lora))
    vae = family.load_vae(CPU)
    latents = family.encode_pixels(vae, to_tensor(crop_to_bucket(load_image(source), (64, 64)))[None, :, None])
    text = family.encode_texts(family.load_text_encoders(CPU), [instruction])
    nodes = sampling_nodes(family, steps, "shifted", tuple(latents.shape))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    edited = sample(lambda x, t, c, s: family.velocity(network, x, t, c, s), noise, text, latents, nodes)
    return family.decode_latents(vae, edited)[0, :, 0]


def test_an_edit_is_what_diffusers_own_loader_gives(lora: Path):
    result = pipeline(lora)(photo(), "add the snow", steps=3, seed=4)
    assert result.size == (64, 64)
    wanted = ((by_hand(lora, photo(), "add the snow", steps=3, seed=4) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(pixels(result) - wanted).max() <= 1.01
    without = ((by_hand(None, photo(), "add the snow", steps=3, seed=4) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(pixels(result) - without).max() > 3, "the LoRA changes nothing"


def test_strength_0_is_the_base_with_source_tokens(lora: Path):
    result = pipeline(lora, strength=0.0)(photo(), "add the snow", steps=3, seed=4)
    wanted = ((by_hand(None, photo(), "add the snow", steps=3, seed=4) + 1) * 127.5).permute(1, 2, 0).numpy()
    assert np.abs(pixels(result) - wanted).max() <= 1.01


def test_the_trainers_file_in_diffusers_reproduces_our_velocity(tmp_path: Path):
    trainer = make_trainer(run_config(tmp_path / "out", train={"steps": 1}, lora={"alpha": 2.0}))
    wake(trainer.host)
    path = trainer.run()
    network = flux_files.TRANSFORMER.load(model_folder(), dtype=torch.float32)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    FluxPipeline(**parts, transformer=network).load_lora_weights(str(path))
    rng = torch.Generator().manual_seed(0)
    noisy, source = (torch.randn(2, 16, 1, 8, 8, generator=rng) for _ in range(2))
    call = (noisy, torch.tensor([0.3, 0.8]), tiny_texts(2, 1), source)
    with trainer.host.live() as velocity, torch.no_grad():
        torch.testing.assert_close(trainer.family.velocity(network, *call), velocity(*call), rtol=1e-4, atol=1e-5)
        plain = flux_files.TRANSFORMER.load(model_folder(), dtype=torch.float32)
        assert not torch.allclose(trainer.family.velocity(plain, *call), velocity(*call), atol=1e-2)


def test_a_batch_of_two_is_two_of_one(lora: Path, monkeypatch: pytest.MonkeyPatch):
    latents: list[torch.Tensor] = []

    def keep(*args: Any) -> torch.Tensor:
        latents.append(sample(*args))
        return latents[-1]

    monkeypatch.setattr(sampling, "sample", keep)
    pipe, texts = pipeline(lora), ["add the snow", "remove the sky"]
    together = pipe.batch([photo(0), photo(1)], texts, steps=3, seeds=[1, 2])
    for i in (0, 1):
        alone = pipe.batch([photo(i)], [texts[i]], steps=3, seeds=[i + 1])
        torch.testing.assert_close(latents[0][i : i + 1], latents[-1], rtol=1e-5, atol=1e-5)
        assert difference(alone[0][0], together[i][0]) == 0 and difference(alone[0][1], together[i][1]) <= 1
    assert not torch.allclose(latents[0][0], latents[0][1], atol=1e-2)


def test_what_changes_an_edit_and_what_does_not(lora: Path):
    pipe = pipeline(lora)
    usual = pipe(photo(), "add the snow", steps=3, seed=4)
    assert difference(pipe(photo(), "add the snow", steps=3, seed=4), usual) == 0
    changed = {
        "seed": pipe(photo(), "add the snow", steps=3, seed=5),
        "steps": pipe(photo(), "add the snow", steps=5, seed=4),
        "schedule": pipe(photo(), "add the snow", steps=3, seed=4, schedule="uniform"),
        "instruction": pipe(photo(), "remove the dog", steps=3, seed=4),
        "source": pipe(photo(1), "add the snow", steps=3, seed=4),
        "strength": pipeline(lora, strength=0.3)(photo(), "add the snow", steps=3, seed=4),
        "guidance": pipeline(lora, guidance=0.0)(photo(), "add the snow", steps=3, seed=4),
    }
    for name, image in changed.items():
        assert difference(image, usual) >= 1, name


def test_conditioning_comes_from_the_metadata(lora: Path, tmp_path: Path):
    tensors, metadata = read_lora(lora)
    kontext = metadata | {"byg.position": "kontext", "byg.guidance": "2.5", "byg.resolution": "32", "byg.schedule": "uniform"}
    write_lora(tmp_path / "kontext.safetensors", tensors, kontext)
    pipe = pipeline(tmp_path / "kontext.safetensors")
    conditioning = pipe.config.conditioning
    assert (conditioning.position, conditioning.guidance, pipe.config.dataset.resolution) == ("kontext", 2.5, 32)
    assert pipe.config.sample.schedule == "uniform" and pipe.config.conditioning.max_text_tokens == 8
    assert pipe(photo(), "add the snow", steps=1).size == (32, 32)
    assert pipeline(tmp_path / "kontext.safetensors", resolution=48, guidance=1.0).config.conditioning.guidance == 1.0


def test_a_configuration_gives_the_model_and_options_override_it(lora: Path):
    config = run_config(Path("unused-output"), train={"mixed_precision": "no"})
    pipe = EditPipeline.from_lora(lora, config=config)
    assert pipe.config.model.path == str(model_folder()) and pipe.config.model.dtype == "float32"
    assert pipe.config.train.mixed_precision == "no"
    mixed = run_config(Path("unused-output"), train={"mixed_precision": "bf16"})
    for dtype, precision in ((None, "bf16"), ("float32", "no"), ("bfloat16", "bf16")):
        assert EditPipeline.from_lora(lora, config=mixed, dtype=dtype).config.train.mixed_precision == precision
    changed = EditPipeline.from_lora(lora, config=config, quantization="fp8")
    assert changed.config.model.quantization == "fp8"
    same, stored = (p(photo(), "add the snow", steps=2) for p in (pipe, changed))
    assert difference(same, stored) >= 1


def test_converted_loras_edit_alike(lora: Path, tmp_path: Path):
    from byg_plugin.lora.formats import convert

    tensors, metadata = read_lora(lora)
    write_lora(tmp_path / "musubi.safetensors", convert(tensors, "musubi"), metadata)
    one, two = (pipeline(path)(photo(), "add the snow", steps=2) for path in (lora, tmp_path / "musubi.safetensors"))
    assert difference(one, two) <= 1


def test_texts_are_encoded_once_and_encoders_are_not_kept(lora: Path, monkeypatch: pytest.MonkeyPatch):
    pipe, calls = pipeline(lora), []
    load = pipe.family.load_text_encoders
    monkeypatch.setattr(pipe.family, "load_text_encoders", lambda device: (calls.append(1), load(device))[1])
    pipe.encode(["add the snow", "add the snow", "remove the sky"])
    pipe(photo(), "add the snow", steps=1)
    assert len(calls) == 1
    assert "TextEncoders" not in {type(value).__name__ for value in vars(pipe).values()}


class Network:
    """Notes where it is sent."""

    def __init__(self, events: list[str]):
        self.events = events

    def to(self, device: Any) -> None:
        self.events.append(f"network on {device}")


def host_on(device: torch.device, pipe: EditPipeline, events: list[str]) -> DiffusersHost:
    """A host that is a device and a network that tells where it goes."""
    host = DiffusersHost.__new__(DiffusersHost)
    host.sharding = Sharding()
    host.config, host.device, host._residency = pipe.config, device, None
    host.networks = {"transformer": Network(events)}
    host.merged = MergedRollout([], "edit")
    host.merged.linears = [torch.nn.Linear(1, 1)]
    return host


@pytest.mark.parametrize(
    ("device", "quantization", "wanted"),
    [
        ("cuda", "none", ["network on cpu", "encoders come", "encoders go", "network on cuda"]),
        ("cuda", "fp8", ["network on cpu", "encoders come", "encoders go", "network on cuda"]),
        ("cuda", "nf4", ["encoders come", "encoders go"]),
        ("cpu", "none", ["encoders come", "encoders go"]),
    ],
)
def test_a_new_instruction_does_not_hold_network_and_encoders_at_once(
    lora: Path, monkeypatch: pytest.MonkeyPatch, device: str, quantization: str, wanted: list[str]
):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    pipe, events = pipeline(lora, quantization=quantization, dtype="bfloat16"), []

    class Encoders:
        def __del__(self) -> None:
            events.append("encoders go")

    def load(where: torch.device) -> Encoders:
        events.append("encoders come")
        return Encoders()

    monkeypatch.setattr(pipe.family, "load_text_encoders", load)
    monkeypatch.setattr(pipe.family, "encode_texts", lambda encoders, texts: {"t5": torch.zeros(1, 8, 32)})
    pipe._host = host_on(torch.device(device), pipe, events)
    pipe.encode(["add the snow"])
    pipe.encode(["add the snow"])
    assert events == wanted
    assert (pipe._host.merged.linears == []) == ("network on cpu" in wanted), "the rollout's copy gives its memory back too"


def test_the_network_is_back_when_encoding_fails(lora: Path, monkeypatch: pytest.MonkeyPatch):
    pipe, events = pipeline(lora), []

    def fail(where: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(pipe.family, "load_text_encoders", fail)
    pipe._host = host_on(torch.device("cuda"), pipe, events)
    with pytest.raises(torch.OutOfMemoryError):
        pipe.encode(["add the snow"])
    assert events == ["network on cpu", "network on cuda"]


def test_a_load_that_fails_leaves_nothing_half_loaded(lora: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = pipeline(lora)
    usual = pipeline(lora)(photo(), "add the snow", steps=2, seed=4)

    def fail(*args: Any) -> None:
        raise OSError("once")

    for owner, name in ((DiffusersHost, "load_lora"), (pipe.family, "load_vae")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(OSError, match="once"):
                pipe(photo(), "add the snow", steps=2, seed=4)
        assert pipe._host is None and pipe._vae is None
    assert difference(pipe(photo(), "add the snow", steps=2, seed=4), usual) == 0


def test_an_image_in_memory_is_turned_as_its_file_would_be(lora: Path, tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    with Image.open(photo()) as image:
        image.convert("RGB").crop((0, 0, 64, 32)).save(tmp_path / "turned.png", exif=exif)
    pipe = pipeline(lora)
    width, height = pipe.sources.size(tmp_path / "turned.png")
    assert width < height
    with Image.open(tmp_path / "turned.png") as image:
        assert difference(pipe.sources.image(image), pipe.sources.image(tmp_path / "turned.png")) == 0


def test_the_loras_schedule_wins_over_the_configurations(lora: Path, tmp_path: Path):
    tensors, metadata = read_lora(lora)
    config = run_config(Path("unused-output"), sample={"schedule": "shifted", "steps": 7})
    write_lora(tmp_path / "uniform.safetensors", tensors, metadata | {"byg.schedule": "uniform"})
    sample_section = EditPipeline.from_lora(tmp_path / "uniform.safetensors", config=config).config.sample
    assert (sample_section.schedule, sample_section.steps) == ("uniform", 7)
    silent = {key: value for key, value in metadata.items() if key != "byg.schedule"}
    write_lora(tmp_path / "silent.safetensors", tensors, silent)
    config = run_config(Path("unused-output"), sample={"schedule": "uniform"})
    assert EditPipeline.from_lora(tmp_path / "silent.safetensors", config=config).config.sample.schedule == "uniform"
