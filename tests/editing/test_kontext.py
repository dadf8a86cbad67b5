"""Stock FLUX.1 Kontext by edit.py, on a tiny pipeline of diffusers' own class."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
from PIL import Image

from byg_plugin import edit
from byg_plugin.editing.manifest import read_manifest
from tests.support.clip_files import encode, shades
from tests.support.editing import difference, photo
from tests.support.tiny import kept, model_folder, workspace, write_model


def write_kontext(folder: Path) -> Path:
    """The tiny FLUX with the scheduler and the index that diffusers' pipeline wants."""
    write_model(folder)
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    parts = {
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "tokenizer_2": ["transformers", "PreTrainedTokenizerFast"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "image_encoder": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": "FluxKontextPipeline", "_diffusers_version": "0.35.0", **parts}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def kontext() -> Path:
    return kept("tiny-kontext", write_kontext)


def run(monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    fixed = ["--method", "kontext", "--dtype", "float32", "--device", "cpu", "--resolution", 64]
    monkeypatch.setattr(sys, "argv", ["edit.py", *map(str, [*fixed, *words])])
    edit.main()


def test_it_is_diffusers_own_pipeline_at_the_sources_sizes(kontext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(monkeypatch, "--model", kontext, "--tuples", workspace() / "tuples.jsonl", "--steps", 2, "--seed", 7, "--out", tmp_path)
    edits = sorted(read_manifest(tmp_path), key=lambda one: one.edit.name)
    assert len(edits) == 5 and len({one.size for one in edits}) > 1
    assert all(Image.open(one.edit).size == one.size for one in edits)
    one = edits[3]
    assert one.settings | {"version": ""} == {
        **{"method": "kontext", "steps": 2, "guidance": 2.5, "base": kontext.name, "dtype": "float32", "version": ""}
    }
    pipe = FluxKontextPipeline.from_pretrained(kontext)
    width, height = one.size
    with Image.open(one.side_by_side) as pair:
        source = pair.crop((0, 0, width, height))
    wanted = pipe(
        image=source,
        prompt=one.instruction,
        width=width,
        height=height,
        max_area=width * height,
        _auto_resize=False,
        num_inference_steps=2,
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(7 + 3),
        output_type="np",
    ).images[0]
    assert np.abs(np.asarray(Image.open(one.edit)) - 255 * wanted).max() <= 1
    assert difference(Image.open(one.edit), source) > 1


def test_guidance_and_instruction_reach_it(kontext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = {}
    for name, words in {"one": ("add the snow", 2.5), "words": ("make a cat", 2.5), "guidance": ("add the snow", 40)}.items():
        given = ("--source", photo(0), "--instruction", words[0], "--guidance", words[1], "--steps", 1)
        run(monkeypatch, "--model", kontext, *given, "--out", tmp_path / name)
        made[name] = Image.open(tmp_path / name / "photo0.png")
    assert min(difference(made["one"], made[name]) for name in ("words", "guidance")) > 0


def test_what_it_cannot_edit_with_or_edit(kontext: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    given = ("--source", photo(0), "--instruction", "add", "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="is of FluxPipeline; --method kontext takes a diffusers folder of FluxKontextPipeline"):
        run(monkeypatch, "--model", model_folder(), *given)
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="bare: has no model_index.json"):
        run(monkeypatch, "--model", tmp_path / "bare", *given)
    clip = encode(tmp_path / "in.mp4", shades(6, (64, 64)))
    with pytest.raises(ValueError, match="in.mp4: a clip, and FLUX.1 Kontext edits images"):
        run(monkeypatch, "--model", kontext, "--source", clip, *given[2:])
    monkeypatch.setattr(sys, "argv", ["edit.py", "--method", "kontext", "--model", str(kontext), *map(str, given)])
    with pytest.raises(ValueError, match="--method kontext: give --config, for the sizes .* or --resolution"):
        edit.main()
