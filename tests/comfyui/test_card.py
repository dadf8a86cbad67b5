"""Reading LoRA files in the ComfyUI nodes: cards that the trainer writes, and what is told of a file that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from byg_plugin.lora.card import LoraCard
from comfyui import card as cards
from comfyui import loader
from comfyui.families import family_named


def saved(folder: Path, metadata: dict[str, str] | None = None, name: str = "a.safetensors") -> Path:
    tensors = {"transformer.x.lora_A.weight": torch.zeros(4, 6), "transformer.x.lora_B.weight": torch.zeros(8, 4)}
    save_file(tensors, folder / name, metadata)
    return folder / name


def test_the_card_is_what_the_trainer_wrote(tmp_path: Path) -> None:
    written = LoraCard(
        family="wan2.2-t2v-a14b",
        position="bernini",
        guidance=3.5,
        schedule="uniform",
        resolution=320,
        boundary=0.9,
        expert="low_noise",
        step=70,
    )
    metadata, shapes = cards.read_header(saved(tmp_path, {**written.to_metadata(), "byg.base": "w.safetensors", "other": "x"}))
    card = cards.card_of(metadata, "a.safetensors")
    assert card == cards.Card(
        family="wan2.2-t2v-a14b",
        position="bernini",
        guidance=3.5,
        schedule="uniform",
        resolution=320,
        boundary=0.9,
        expert="low_noise",
        step=70,
        base="w.safetensors",
    )
    assert shapes == {"transformer.x.lora_A.weight": (4, 6), "transformer.x.lora_B.weight": (8, 4)}


def test_a_file_without_a_card_is_named(tmp_path: Path) -> None:
    metadata, _ = cards.read_header(saved(tmp_path))
    with pytest.raises(ValueError, match="a.safetensors has no ByG card"):
        cards.card_of(metadata, "a.safetensors")


def test_a_few_step_editor_says_its_sampler_and_steps() -> None:
    written = LoraCard(family="flux", position="same", sampler="stochastic", steps=4)
    card = cards.card_of(written.to_metadata(), "a")
    assert (card.sampler, card.steps, card.guided) == ("stochastic", 4, False) and cards.SAMPLERS[card.sampler] == "lcm"
    fit = loader.Fit(loaded=("a",), missing=(), sizes={})
    assert "a few-step editor: sampler lcm, 4 steps, cfg 1" in loader.report(card, family_named("flux"), "f", fit, 1.0)
    plain = cards.card_of(LoraCard(family="flux", position="same").to_metadata(), "b")
    assert plain.guided and "few-step" not in loader.report(plain, family_named("flux"), "f", fit, 1.0)
    with pytest.raises(ValueError, match=r"f \(flux, same\) does not go with .*before it \(flux, same, stochastic sampler\)"):
        loader.check_mixture(card, plain, "f")


def test_a_sampler_that_the_nodes_have_not_is_named() -> None:
    with pytest.raises(ValueError, match=r"a edits in 3 heun steps, which these nodes do not make: update them"):
        cards.card_of({"byg.family": "flux", "byg.position": "same", "byg.sampler": "heun", "byg.steps": "3"}, "a")


def test_a_damaged_number_is_named() -> None:
    with pytest.raises(ValueError, match="byg.resolution = 'x' is no number"):
        cards.card_of({"byg.family": "flux", "byg.position": "same", "byg.resolution": "x"}, "a")


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"\xff" * 64, b'\x05\x00\x00\x00\x00\x00\x00\x00{"a"', b"<html>not found</html>"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "b.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="b.safetensors is no safetensors file"):
        cards.read_header(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("key", "layer"),
    [
        ("transformer.blocks.0.attn.to_q.lora_A.weight", "transformer.blocks.0.attn.to_q"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight", "lora_unet_double_blocks_0_img_attn_qkv"),
        ("lora_unet_blocks_0.alpha", "lora_unet_blocks_0"),
        ("diffusion_model.x.lora_B.default.weight", "diffusion_model.x"),
    ],
)
def test_layers_of_keys(key: str, layer: str) -> None:
    assert cards.layer_of(key) == layer


def test_partners_of_a_pair() -> None:
    assert cards.partner_of("sub/wan_high_noise-ema.safetensors") == "sub/wan_low_noise-ema.safetensors"
    assert cards.partner_of("wan.safetensors") is None


CARD = cards.Card(family="flux", position="same", base="flux1-dev.safetensors", step=1000)
SHAPES = {"a.lora_A.weight": (4, 6), "a.lora_B.weight": (8, 4), "b.lora_A.weight": (4, 6), "b.lora_B.weight": (8, 4), "b.alpha": ()}


def test_what_fits_is_counted() -> None:
    """A part of a fused weight has its own rows."""
    fit = loader.fit_of(SHAPES, {"a": "k.weight", "b": ("q.weight", (0, 8, 8))}, {"k.weight": (8, 6), "q.weight": (24, 6)})
    assert fit == loader.Fit(loaded=("a", "b"), missing=(), sizes={})
    loader.check_fit(fit, CARD, "f")
    text = loader.report(CARD, family_named("flux"), "f", fit, 0.5)
    assert "2 of 2 layers loaded, strength 0.5" in text and "after 1000 steps, base flux1-dev.safetensors" in text
    assert "WITHOUT EFFECT" not in text


def test_the_length_of_flux_texts_is_told() -> None:
    fit = loader.Fit(loaded=("a",), missing=(), sizes={})
    told = "texts were padded to 256 tokens: min_length of T5TokenizerOptions"
    flux = cards.card_of(LoraCard(family="flux", position="same", max_text_tokens=256).to_metadata(), "a")
    assert told in loader.report(flux, family_named("flux"), "f", fit, 1.0)
    other = cards.card_of(LoraCard(family="z-image", position="same", max_text_tokens=256).to_metadata(), "a")
    assert "padded" not in loader.report(other, family_named("z-image"), "f", fit, 1.0)
    assert "padded" not in loader.report(CARD, family_named("flux"), "f", fit, 1.0)


def test_strength_0_is_told() -> None:
    fit = loader.Fit(loaded=("a",), missing=(), sizes={})
    assert "WITHOUT EFFECT" in loader.report(CARD, family_named("flux"), "f", fit, 0.0)


def test_layers_that_the_model_has_not_are_named() -> None:
    fit = loader.fit_of(SHAPES, {"a": "k.weight"}, {"k.weight": (8, 6)})
    with pytest.raises(ValueError, match="f: 1 of its 2 layers are not in the connected model and would be left out: b. "):
        loader.check_fit(fit, CARD, "f")


def test_layers_of_another_size_are_named() -> None:
    fit = loader.fit_of(SHAPES, {"a": "k.weight", "b": "k.weight"}, {"k.weight": (16, 6)})
    with pytest.raises(
        ValueError, match=r"2 of its 2 layers do not fit, e.g. a is 8 x 6 and the model's 16 x 6.*\(flux1-dev.safetensors\)"
    ):
        loader.check_fit(fit, CARD, "f")


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(ValueError, match="f has no tensors"):
        loader.check_fit(loader.fit_of({}, {}, {}), CARD, "f")


def test_another_family_is_refused() -> None:
    assert loader.check_family(CARD, "flux", "f").name == "flux"
    with pytest.raises(ValueError, match="f was trained for flux, and the connected model is of another kind"):
        loader.check_family(CARD, "wan", "f")
    with pytest.raises(ValueError, match="its card names position 'bernini', flux has same, kontext"):
        loader.check_family(cards.Card(family="flux", position="bernini"), "flux", "f")


def test_exchanged_halves_are_refused() -> None:
    card = cards.Card(family="wan2.2-t2v-a14b", position="same", expert="low_noise")
    loader.check_experts(card, "f", "low_noise")
    with pytest.raises(ValueError, match="f is the low-noise half of a pair and is loaded for the high-noise network"):
        loader.check_experts(card, "f", "high_noise")
    loader.check_experts(cards.Card(family="wan2.2-t2v-a14b", position="same", expert="both"), "f", "high_noise")
    half = cards.Card(family="wan2.2-t2v-a14b", position="same", expert="high_noise")
    fit = loader.Fit(loaded=("a",), missing=(), sizes={})
    assert "high-noise half" in loader.report(half, family_named("wan2.2-t2v-a14b"), "f", fit, 1.0)


@pytest.mark.parametrize(
    "shapes",
    [
        {"b.lora_A.weight": (4, 64)},
        {"b.lora_up.weight": (32, 4), "b.alpha": ()},
        {"b.lora_A.weight": (4, 64), "b.lora_B.weight": (32, 8)},
    ],
)
def test_a_layer_of_one_matrix_or_of_two_that_cannot_be_multiplied_is_not_loaded_by_half(shapes: dict[str, tuple[int, ...]]) -> None:
    whole = {"a.lora_A.weight": (4, 64), "a.lora_B.weight": (32, 4), "a.alpha": (), "c.diff": (32, 64)}
    key_map = {name: f"{name}.weight" for name in "abc"}
    weights = {f"{name}.weight": (32, 64) for name in "abc"}
    loader.check_fit(loader.fit_of(whole, key_map, weights), CARD, "f.safetensors")
    with pytest.raises(ValueError, match="^f.safetensors is damaged: of 1 of its layers one of the two .* e.g. b. Download or convert"):
        loader.check_fit(loader.fit_of(whole | shapes, key_map, weights), CARD, "f.safetensors")
