"""The card of a LoRA file: equal to what every version wrote, read back whole, and the one place of its keys."""

from __future__ import annotations

import ast
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from byg_plugin import convert_lora
from byg_plugin.lora.card import KEYS, LoraCard, base_name, has_card
from byg_plugin.lora.files import read_lora
from byg_plugin.models import make_family
from tests.support.tiny import tiny_config
from tests.support.tiny_wan import wan_config

ROOT = Path(__file__).parents[2]
# What the first version wrote, as it wrote it.
FLUX = {
    "byg.version": "0.1.0",
    "byg.family": "flux",
    "byg.position": "kontext",
    "byg.guidance": "2.5",
    "byg.max_text_tokens": "8",
    "byg.rank": "4",
    "byg.alpha": "4",
    "byg.base": "model",
    "byg.resolution": "64",
    "byg.schedule": "shifted",
    "byg.targets": "",
    "byg.weights": "ema",
    "byg.step": "3",
}


def test_the_header_is_the_one_that_was_always_written(tmp_path: Path):
    config = tiny_config(tmp_path, conditioning={"position": "kontext", "guidance": 2.5})
    found = LoraCard.of(config, 3, "ema").to_metadata()
    assert found == FLUX | {"byg.objective": config.objective.model_dump_json(), "byg.version": found["byg.version"]}
    assert list(found)[:3] == ["byg.version", "byg.family", "byg.position"]


def test_clips_and_experts_say_more(tmp_path: Path):
    config = wan_config(tmp_path)
    family = make_family(config)
    found = LoraCard.of(config, 3, "live", family, "_low_noise").to_metadata()
    assert {key: found[f"byg.{key}"] for key in ("boundary", "expert", "frames", "fps")} == {
        "boundary": "0.875",
        "expert": "low_noise",
        "frames": "5",
        "fps": "16",
    }
    assert LoraCard.of(config, 3, "live", family).expert == "both"


@pytest.mark.parametrize(
    "metadata",
    [
        FLUX,
        # musubi-tuner's: no step, the host's own alpha, which may be a whole number or not.
        {key: value for key, value in FLUX.items() if key != "byg.step"} | {"byg.alpha": "1.0", "byg.host": "musubi"},
        FLUX | {"byg.alpha": "1", "byg.boundary": "0.875", "byg.expert": "both", "byg.frames": "81", "byg.fps": "16.0"},
        {},
    ],
)
def test_a_header_comes_back_as_it_was(metadata: dict[str, str]):
    assert LoraCard.from_metadata(metadata).to_metadata() == metadata
    assert has_card(metadata) == bool(metadata)


def test_what_a_file_does_not_say_is_none_and_other_keys_are_passed_over():
    card = LoraCard.from_metadata({"byg.family": "flux", "byg.later": "x", "ss_steps": "3", "format": "pt"})
    assert card == LoraCard(family="flux")
    assert not has_card({"ss_steps": "3"})


@pytest.mark.parametrize("key", ["boundary", "frames", "fps", "guidance", "max_text_tokens", "rank", "alpha", "resolution", "step"])
def test_a_number_that_is_none_names_its_key(key: str):
    with pytest.raises(ValueError, match=f"its metadata are damaged: byg.{key} = 'much', expected a (whole )?number; train it"):
        LoraCard.from_metadata(FLUX | {f"byg.{key}": "much"})


def test_every_field_has_a_reader():
    assert set(KEYS) == {field.name for field in fields(LoraCard)}
    said = dict.fromkeys(KEYS.values(), "3")
    assert LoraCard.from_metadata(said).to_metadata() == {key: "3.0" if value is None else value for key, value in said.items()}


@pytest.mark.parametrize("path", ["org/FLUX.1-dev", "C:\\models\\FLUX.1-dev\\", "FLUX.1-dev", "/a/b/FLUX.1-dev/"])
def test_a_base_is_named_without_its_folders(path: str):
    assert base_name(path) == "FLUX.1-dev"


def test_converting_keeps_keys_that_no_card_has(tmp_path: Path):
    layer = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(4, 3072), f"{layer}.lora_B.weight": torch.ones(3072, 4)}
    metadata = FLUX | {"byg.later": "x", "ss_training_comment": "mine"}
    save_file(tensors, tmp_path / "in.safetensors", metadata=metadata)
    convert_lora.main([str(tmp_path / "in.safetensors"), "--to", "musubi", "--out", str(tmp_path / "out.safetensors")])
    assert read_lora(tmp_path / "out.safetensors")[1] == metadata


def keys_in(path: Path) -> list[str]:
    """Texts of a module that begin as the card's keys do, docstrings and sentences left out."""
    texts = [node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)]
    return [text for text in texts if isinstance(text, str) and text.startswith("byg.") and " " not in text]


def test_the_keys_stand_in_one_place():
    found = {
        path.relative_to(ROOT).as_posix(): keys_in(path)
        for room in ("byg_plugin", "dataset_tools", "benchmarks")
        for path in (ROOT / room).rglob("*.py")
    }
    # The text caches of musubi-tuner are no LoRA files.
    assert {file: keys for file, keys in found.items() if keys} == {
        "byg_plugin/lora/card.py": ["byg."],
        "byg_plugin/musubi/cache.py": ["byg.texts", "byg.encoder"],
    }
