"""Editing with a LoRA that the trainer wrote, on tiny random models in a real diffusers folder."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from tiny import fill_caches, make_trainer, model_folder, run_config, tiny_config, tiny_texts, wake, workspace

from byg_plugin import EditPipeline, _cli, convert_lora, edit, sampling
from byg_plugin.data.buckets import crop_to_bucket, to_tensor
from byg_plugin.data.media import load_image
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.lora.formats import read_lora, write_lora
from byg_plugin.models import flux_files
from byg_plugin.models.flux import FluxFamily
from byg_plugin.sampling import sample, sampling_nodes, seeded_noise
from byg_plugin.training import preview

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by the trainer, with a LoRA that is awake."""
    trainer = make_trainer(run_config(tmp_path_factory.mktemp("lora") / "out", train={"steps": 1}))
    wake(trainer.host)
    return trainer.run()


def pipeline(lora: Path, **options: Any) -> EditPipeline:
    return EditPipeline.from_lora(lora, model=str(model_folder()), **({"dtype": "float32", "device": "cpu"} | options))


def photo(index: int = 0) -> Path:
    return workspace() / f"photo{index}.png"


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(pixels(a) - pixels(b)).max())


# --- the pipeline ---


@torch.no_grad()
def by_hand(lora: Path | None, source: Path, instruction: str, *, steps: int, seed: int) -> torch.Tensor:
    """Edited pixels from the parts, without `EditPipeline` and without the host's LoRA code: diffusers' own loader."""
    family = FluxFamily(tiny_config(Path("unused"), model={"path": str(model_folder())}))
    network = flux_files.load_flux_transformer(model_folder(), dtype=torch.float32)
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
    network = flux_files.load_flux_transformer(model_folder(), dtype=torch.float32)
    parts = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    FluxPipeline(**parts, transformer=network).load_lora_weights(str(path))
    rng = torch.Generator().manual_seed(0)
    noisy, source = (torch.randn(2, 16, 1, 8, 8, generator=rng) for _ in range(2))
    call = (noisy, torch.tensor([0.3, 0.8]), tiny_texts(2, 1), source)
    with trainer.host.live() as velocity, torch.no_grad():
        torch.testing.assert_close(trainer.family.velocity(network, *call), velocity(*call), rtol=1e-4, atol=1e-5)
        plain = flux_files.load_flux_transformer(model_folder(), dtype=torch.float32)
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
    host.config, host.device, host._residency = pipe.config, device, None
    host.networks = {"transformer": Network(events)}
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
    width, height = pipe.prepare_size(tmp_path / "turned.png")
    assert width < height
    with Image.open(tmp_path / "turned.png") as image:
        assert difference(pipe._prepare(image), pipe._prepare(tmp_path / "turned.png")) == 0


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


# --- errors ---


def foreign(change: Callable[[dict[str, str]], dict[str, str]], lora: Path, path: Path) -> Path:
    tensors, metadata = read_lora(lora)
    write_lora(path, tensors, change(metadata))
    return path


def test_loras_that_cannot_be_used(lora: Path, tmp_path: Path):
    cases: list[tuple[Callable[[dict[str, str]], dict[str, str]], str]] = [
        (lambda m: {}, "metadata lacks byg.family, .*not made by byg_plugin"),
        (lambda m: {k: v for k, v in m.items() if k != "byg.position"}, "metadata lacks byg.position"),
        (lambda m: m | {"byg.family": "wan"}, "was trained for 'wan', which is unknown here"),
        (lambda m: m | {"byg.guidance": "much"}, "its metadata are damaged: byg.guidance = .much., expected a number"),
        (lambda m: m | {"byg.position": "elsewhere"}, "conditioning.position = 'elsewhere'"),
    ]
    for index, (change, message) in enumerate(cases):
        with pytest.raises(ValueError, match=message):
            pipeline(foreign(change, lora, tmp_path / f"{index}.safetensors"))
    with pytest.raises(ValueError, match="no such file"):
        pipeline(tmp_path / "missing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="not a readable .safetensors file"):
        pipeline(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="not a .safetensors file"):
        pipeline(photo())
    with pytest.raises(ValueError, match="--model"):
        EditPipeline.from_lora(lora)


def test_a_lora_of_other_widths_is_refused(lora: Path, tmp_path: Path):
    tensors, metadata = read_lora(lora)
    name = next(n for n in tensors if n.endswith("attn.to_q.lora_A.weight"))
    write_lora(tmp_path / "wide.safetensors", tensors | {name: torch.zeros(4, 64)}, metadata)
    with pytest.raises(ValueError, match=r"wide.safetensors: .* has shape .*the model it was trained on"):
        pipeline(tmp_path / "wide.safetensors")(photo(), "add the snow", steps=1)


def test_bad_calls(lora: Path, tmp_path: Path):
    pipe = pipeline(lora)
    with pytest.raises(ValueError, match="instruction is empty"):
        pipe(photo(), "  ")
    with pytest.raises(ValueError, match="missing.png: no such file"):
        pipe(tmp_path / "missing.png", "add the snow", steps=1)
    with pytest.raises(ValueError, match="one size"):
        pipe.batch([photo(0), photo(2)], ["add", "add"], steps=1, seeds=[0, 1])
    with pytest.raises(ValueError, match="as many instructions and seeds as sources"):
        pipe.batch([photo(0), photo(1)], ["add", "add"], steps=1, seeds=[0])
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"seed = {seed} is out of range"):
            pipe(photo(), "add", steps=1, seed=seed)
    for strength in (float("nan"), 1e300, -101.0):
        with pytest.raises(ValueError, match=rf"strength = {re.escape(str(strength))} is not a number from -100 to 100; 1 = as trained"):
            pipeline(lora, strength=strength)
    with pytest.raises(ValueError, match="nowhere"):
        EditPipeline.from_lora(lora, model=str(tmp_path / "nowhere"))(photo(), "add", steps=1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["latents", "pixels"])
def test_an_edit_that_is_no_number_is_an_error(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], where: str, value: float
):
    """One element of the sampled latents, or of what the VAE makes of them."""

    def spoilt(made: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **options: Any) -> torch.Tensor:
            out = made(*args, **options).clone()
            out.view(-1)[-1] = value
            return out

        return make

    if where == "latents":
        monkeypatch.setattr(sampling, "sample", spoilt(sample))
    else:
        monkeypatch.setattr(FluxFamily, "decode_latents", spoilt(FluxFamily.decode_latents))
    arguments = ["--source", photo(), "--instruction", "add the snow", "--out", tmp_path / "out", "--steps", 1]
    with pytest.raises(SystemExit) as stop:
        _cli.run(lambda: command(monkeypatch, lora, *arguments))
    assert stop.value.code == 2 and not list((tmp_path / "out").iterdir())
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and where in said and "not finite" in said and "strength" in said


@pytest.mark.parametrize("what", ["the latents of the edit", "the decoded pixels"])
def test_a_preview_that_is_no_number_is_told_and_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
):
    if what == "the latents of the edit":
        monkeypatch.setattr(sampling, "sample", lambda *args: torch.full_like(args[1], float("nan")))
    else:
        monkeypatch.setattr(FluxFamily, "decode_latents", lambda self, vae, latents: torch.full((1, 3, 1, 64, 64), float("nan")))
    config = run_config(tmp_path / "out", sample={"items": 1, "steps": 1})
    trainer = make_trainer(config)
    with caplog.at_level("WARNING"):
        preview.write(config, trainer.family, trainer.host, trainer.data, 3, trainer.accelerator)
    assert f"preview at step 3 failed and training goes on: FloatingPointError: {what} are not finite" in caplog.text
    assert not list(tmp_path.rglob("*.png"))


def test_overflow_of_float16_is_named(lora: Path):
    pipe = pipeline(lora, dtype="float16")
    with pytest.raises(FloatingPointError, match='the latents .*model.dtype = "float16" overflows beyond 65504: use bfloat16'):
        sampling.finite(pipe.config, torch.tensor([1.0, float("inf")]), "the latents of the edit")


@pytest.mark.parametrize("key", ["lora_A.weight", "lora_B.weight"])
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_lora_that_no_training_makes_is_refused_before_a_model_is_loaded(lora: Path, tmp_path: Path, key: str, value: float):
    tensors, metadata = read_lora(lora)
    name = next(n for n in tensors if n.endswith(key))
    tensors[name].view(-1)[0] = value
    write_lora(tmp_path / "bad.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'bad.safetensors'))}: tensor {name}"):
        EditPipeline.from_lora(tmp_path / "bad.safetensors", model=str(tmp_path / "nowhere"))


def test_layers_of_others_in_a_lora_name_a_way_out_that_exists(lora: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """The advice of the message, followed."""
    tensors, metadata = read_lora(lora)
    text_encoder = {f"lora_te1_text_model.lora_{kind}.weight": torch.ones(1, 1) for kind in ("down", "up")}
    path, clean = tmp_path / "mixed.safetensors", tmp_path / "clean.safetensors"
    write_lora(path, tensors | text_encoder, metadata)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: diffusers would lose 1 of .*lora_te1_text_model") as refusal:
        pipeline(path)
    (advice,) = re.findall(r"convert_lora.py (FILE --to \w+ --allow-loss --out NEW)", str(refusal.value))
    convert_lora.main([{"FILE": str(path), "NEW": str(clean)}.get(word, word) for word in advice.split()])
    assert difference(pipeline(clean)(photo(), "add the snow", steps=1), pipeline(lora)(photo(), "add the snow", steps=1)) == 0


# --- the command ---


def command(monkeypatch: pytest.MonkeyPatch, lora: Path | None, *arguments: Any, model: bool = True) -> None:
    fixed = ["--lora", str(lora)] + (["--model", str(model_folder()), "--dtype", "float32", "--device", "cpu"] if model else [])
    monkeypatch.setattr(sys, "argv", ["edit.py", *fixed, *map(str, arguments)])
    edit.main()


def test_one_image(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = ["--steps", 3, "--seed", 4, "--strength", 0.8, "--guidance", 2]
    command(monkeypatch, lora, "--source", photo(), "--instruction", "add the snow", "--out", tmp_path / "out", *options)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["photo0.png", "photo0_side_by_side.png"]
    with Image.open(tmp_path / "out/photo0.png") as image, Image.open(tmp_path / "out/photo0_side_by_side.png") as pair:
        settings = json.loads(image.text["byg"])
        assert settings == {
            "lora": lora.name,
            "steps": 3,
            "schedule": "shifted",
            "guidance": 2.0,
            "strength": 0.8,
            "instruction": "add the snow",
            "seed": 4,
            "size": [64, 64],
        }
        assert json.loads(pair.text["byg"]) == settings
        again = pipeline(lora, strength=0.8, guidance=2.0)(photo(), "add the snow", steps=3, seed=4)
        assert difference(image, again) == 0, "the settings in the file make the file"
        assert pair.size == (64 + 4 + 64, 64)
        assert difference(pair.crop((0, 0, 64, 64)), Image.open(photo()).convert("RGB")) == 0
        assert difference(pair.crop((68, 0, 132, 64)), image) == 0


def test_a_folder_in_batches(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    common = ["--source", workspace(), "--instruction", "add the snow", "--steps", 2]
    command(monkeypatch, lora, *common, "--out", tmp_path / "one")
    command(monkeypatch, lora, *common, "--out", tmp_path / "two", "--batch-size", 2)
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert names == sorted(f"photo{i}{end}.png" for i in range(4) for end in ("", "_side_by_side"))
    for index in range(4):
        one, two = (Image.open(tmp_path / place / f"photo{index}.png") for place in ("one", "two"))
        assert json.loads(one.text["byg"]) == json.loads(two.text["byg"])
        assert json.loads(one.text["byg"])["seed"] == index
        assert difference(one, two) <= 1
    sizes = {Image.open(tmp_path / "one" / f"photo{i}.png").size for i in range(4)}
    assert len(sizes) > 1, "buckets"


def test_a_tuples_file(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command(monkeypatch, lora, "--tuples", workspace() / "tuples.jsonl", "--out", tmp_path, "--steps", 1)
    edits = sorted(p for p in tmp_path.iterdir() if "side" not in p.name)
    assert [p.name for p in edits] == ["00000_photo0.png", "00001_photo0.png", *(f"0000{i + 1}_photo{i}.png" for i in (1, 2, 3))]
    assert json.loads(Image.open(edits[1]).text["byg"])["instruction"] == "add the sky"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "{work}/photo0.png"], "give --source IMAGE_OR_FOLDER and --instruction TEXT"),
        (["--source", "{work}/photo0.png", "--instruction", "  "], "--instruction is empty"),
        (["--source", "{tmp}/none.png", "--instruction", "add"], "none.png: no such file or folder"),
        (["--source", "{tmp}/empty", "--instruction", "add"], "no image or clip in this folder"),
        (["--source", "{tmp}/twins", "--instruction", "add"], "a.bmp and a.png would both become a.png"),
        (["--source", "{tmp}/twins/a.png", "--instruction", "add", "--out", "{tmp}/twins"], "a.png would overwrite a source"),
        (["--source", "{work}/photo0.png", "--instruction", "add", "--out", "{tmp}/file"], "--out .*file: cannot be written"),
        (["--tuples", "{work}/tuples.jsonl", "--source", "x"], "leave out --source"),
        (["--tuples", "{tmp}/none.jsonl"], "none.jsonl"),
        (["--source", "{tmp}/text.png", "--instruction", "add"], "text.png: not an image"),
        (["--source", "{work}/photo0.png", "--instruction", "add", "--set", "sample.steps=3"], "--set overrides a key of --config"),
    ],
)
def test_wrong_commands(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "twins").mkdir()
    for name in ("a.png", "a.bmp"):
        Image.new("RGB", (64, 64)).save(tmp_path / "twins" / name)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "text.png").write_text("no image")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    given = [a.format(work=workspace(), tmp=tmp_path) for a in arguments]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        command(monkeypatch, lora, *given)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--strength", "nan", "'nan' is not a number from -100 to 100"),
        ("--strength", "1e300", "'1e300' is not a number from -100 to 100"),
        ("--strength", "-100.5", "'-100.5' is not a number from -100 to 100"),
        ("--guidance", "inf", "'inf' is not a number from 0 to 1000"),
        ("--guidance", "much", "'much' is not a number"),
        ("--seed", "-1", "'-1' is not a whole number from 0 to 9223372036854775807"),
        ("--seed", str(2**63), "is not a whole number from 0 to"),
        ("--seed", "1.5", "'1.5' is not a whole number from 0 to"),
        ("--steps", "0", "'0' is not a whole number from 1 to 1000"),
        ("--steps", "1001", "'1001' is not a whole number from 1 to 1000"),
        ("--steps", "9" * 5000, "...' is not a whole number from 1 to 1000"),
        ("--frames", "10001", "is not a whole number from 1 to 10000"),
        ("--cfg-high", "0.5", "'0.5' is not a number from 1 to 100"),
        ("--cfg-low", "1e39", "'1e39' is not a number from 1 to 100"),
        ("--model", "", "is empty: leave the option out"),
        ("--tuples", " ", "is empty: leave the option out"),
        ("--config", "", "is empty: leave the option out"),
        ("--out", "", "is empty: leave the option out"),
        ("--batch-size", "two", "'two' is not a whole number from 1 to 1024"),
        ("--resolution", "-5", "'-5' is not a whole number from 16 to 4096"),
    ],
)
def test_wrong_numbers(
    lora: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, value: str, message: str
):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, lora, "--source", photo(), "--instruction", "add", f"{option}={value}")
    assert stop.value.code == 2
    assert f"argument {option}: " in (said := capsys.readouterr().err) and message in said


def test_tuples_start_from_the_configurations_image_root(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = {"source": "photo1.png", "src_caption": "a", "tgt_caption": "b", "instruction": "add", "reverse_instruction": "remove"}
    (tmp_path / "tuples.jsonl").write_text(json.dumps(record), encoding="utf-8")
    toml = tmp_path / "run.toml"
    sections = {
        "model": {"path": str(model_folder()), "dtype": "float32", "device": "cpu"},
        "dataset": {"tuples": "unused", "cache_dir": "unused", "image_root": str(workspace()), "resolution": 64},
        "train": {"steps": 1},
        "output": {"dir": "unused"},
    }
    lines = [f"[{name}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in values.items()) for name, values in sections.items()]
    toml.write_text("\n".join(lines), encoding="utf-8")
    given = ["--config", toml, "--tuples", tmp_path / "tuples.jsonl", "--out", tmp_path / "out", "--steps", 1]
    command(monkeypatch, lora, *given, model=False)
    assert (tmp_path / "out" / "00000_photo1.png").is_file()
    with pytest.raises(ValueError, match=r"dataset.image_root = .*nowhere: no such folder"):
        command(monkeypatch, lora, *given, "--set", f"dataset.image_root={tmp_path}/nowhere", model=False)
    # A folder of tuples has its images beside them.
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "folder" / "one.png")
    (tmp_path / "folder" / "one.json").write_text(json.dumps({k: v for k, v in record.items() if k != "source"}), encoding="utf-8")
    given[3] = tmp_path / "folder"
    command(monkeypatch, lora, *given, model=False)
    assert (tmp_path / "out" / "00000_one.png").is_file()


def test_a_crop_of_much_is_told(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (300, 64)).save(tmp_path / "in" / "wide.png")
    Image.new("RGB", (70, 64)).save(tmp_path / "in" / "square.png")
    given = ["--source", tmp_path / "in", "--instruction", "add", "--out", tmp_path / "out", "--steps", 1]
    command(monkeypatch, lora, *given)
    said = capsys.readouterr()
    (line,) = [line for line in said.err.splitlines() if "cut off" in line]
    with Image.open(tmp_path / "out" / "wide.png") as image:
        kept = image.width / image.height * 64 / 300
        assert f"wide.png: {1 - kept:.0%} of its 300 x 64 pixels are cut off for an edit of {image.width} x {image.height}" in line
    assert "raise dataset.max_aspect" in line and "cut off" not in said.out


def test_a_disk_that_fills_up_while_saving(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match="cannot write photo0: No space left on device"):
        command(monkeypatch, lora, "--source", photo(), "--instruction", "add", "--out", tmp_path / "out", "--steps", 1)
    assert not list((tmp_path / "out").iterdir())


def test_seeded_noise_does_not_depend_on_the_batch():
    shape = (1, 16, 1, 4, 4)
    assert torch.equal(seeded_noise(shape, 3, CPU), seeded_noise(shape, 3, CPU))
    assert not torch.equal(seeded_noise(shape, 3, CPU), seeded_noise(shape, 4, CPU))


# --- real photos, from files to edits ---


def test_real_photos_are_cached_trained_on_and_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = pytest.importorskip("skimage.data")
    shipped = Path(data.__file__).parent
    photos = [shipped / name for name in ("astronaut.png", "coffee.png", "chelsea.png", "camera.png") if (shipped / name).is_file()]
    if len(photos) < 2:
        pytest.skip("this scikit-image ships too few photos")
    texts = {"src_caption": "photo of a cat", "tgt_caption": "photo of a dog", "instruction": "make a dog"}
    lines = [json.dumps({"source": str(p), **texts, "reverse_instruction": "make a cat"}) for p in photos]
    (tmp_path / "tuples.jsonl").write_text("\n".join(lines), encoding="utf-8")
    dataset = {"tuples": str(tmp_path / "tuples.jsonl"), "cache_dir": str(tmp_path / "cache"), "resolution": 96}
    config = run_config(tmp_path / "out", dataset=dataset, train={"steps": 4})
    fill_caches(config)
    trainer = make_trainer(config)
    buckets = {trainer.data.bucket(i) for i in range(len(photos))}
    assert len(buckets) >= 2, "photos of several shapes"
    path = trainer.run()
    command(monkeypatch, path, "--tuples", tmp_path / "tuples.jsonl", "--out", tmp_path / "edits", "--steps", 2, "--batch-size", 4)
    for index, source in enumerate(photos):
        with Image.open(tmp_path / "edits" / f"{index:05d}_{source.stem}.png") as image:
            assert image.size == trainer.data.bucket(index) and image.mode == "RGB"
            assert np.asarray(image).std() > 0
