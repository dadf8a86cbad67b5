"""Edits that cannot be: foreign LoRAs, bad calls, numbers that are none."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from byg_plugin import EditPipeline, _cli, convert_lora, sampling
from byg_plugin.lora.formats import read_lora, write_lora
from byg_plugin.models.flux import FluxFamily
from byg_plugin.sampling import sample
from byg_plugin.training import preview
from tests.support.editing import command, difference, photo, pipeline
from tests.support.tiny import make_trainer, run_config


def foreign(change: Callable[[dict[str, str]], dict[str, str]], lora: Path, path: Path) -> Path:
    tensors, metadata = read_lora(lora)
    write_lora(path, tensors, change(metadata))
    return path


def test_loras_that_cannot_be_used(lora: Path, tmp_path: Path):
    cases: list[tuple[Callable[[dict[str, str]], dict[str, str]], str]] = [
        (lambda m: {}, "metadata lacks byg.family, .*not made by byg_plugin"),
        (lambda m: {k: v for k, v in m.items() if k != "byg.position"}, "metadata lacks byg.position"),
        (lambda m: m | {"byg.family": "wan"}, "was trained for 'wan', which is unknown here"),
        (lambda m: m | {"byg.guidance": "much"}, "metadata is damaged"),
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
