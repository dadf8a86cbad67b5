"""diffusers' pipelines with a source: their edits are `edit.py`'s, and everything else is as diffusers has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from byg_plugin import EditPipeline, families
from tests.support.pipelines import CONTRACTS, edited, image, image_folder, opened, wan_saved, write_card_lora
from tests.support.tiny_wan import A14B, T2V, wan_config

PROMPTS = ["add snow", "remove the dog"]
CASES = [(name, position) for name in CONTRACTS for position in families.named(CONTRACTS[name].name).positions]


def lora_of(name: str, folder: Path, position: str = "same", **card: Any) -> Path:
    contract = CONTRACTS[name]()
    config = contract.config(folder, conditioning={"position": position}, dataset={"resolution": 48})
    return write_card_lora(config, folder / "lora.safetensors", **card)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize(("name", "position"), CASES)
def test_edits_are_those_of_edit_py(name: str, position: str, tmp_path: Path):
    """Three steps of a batch with the family's guidance: with the LoRA, and without it, which is the base with a source."""
    lora = lora_of(name, tmp_path, position)
    editor = EditPipeline.from_lora(lora, model=str(image_folder(name)), dtype="float32", device="cpu")
    clips = [[image(0)], [image(1)]]
    pipe = opened(name)
    pipe.load_lora_weights(lora)
    found = []
    for strength in (1.0, 0.0):
        if not strength:
            pipe.unload_lora_weights()
            editor._host.set_strength(0.0)
        wanted = edited(editor, clips, PROMPTS, steps=3, seeds=[4, 5]) / 2 + 0.5
        call = {"image": [clip[0] for clip in clips], "prompt": list(PROMPTS), "num_inference_steps": 3}
        ours = pipe(**call, generator=generators(4, 5), output_type="pt").images
        assert (ours - wanted[:, :, 0]).abs().max() <= 1e-5
        found.append(ours)
    assert (found[0] - found[1]).abs().max() > 1e-2, "the LoRA changes nothing"


# --- Wan ---


def wan_lora(folder: Path, family: str, position: str = "same", **sections: Any) -> Path:
    config = wan_config(folder, family, conditioning={"position": position}, **sections)
    return write_card_lora(config, folder / "lora.safetensors")


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize(("family", "position"), [(A14B, "same"), (A14B, "bernini"), (T2V, "same")])
def test_wan_edits_are_those_of_edit_py(family: str, position: str, frames: int, tmp_path: Path):
    """Four steps, of two experts the last by the second; both LoRAs are read from the name of one."""
    lora = wan_lora(tmp_path, family, position)
    more = {"model": str(wan_saved(family)), "dtype": "float32", "device": "cpu", "solver": "unipc_diffusers"}
    editor = EditPipeline.from_lora(lora, resolution=48, **more)
    pipe = opened("WanBygPipeline", wan_saved(family))
    pipe.load_lora_weights(lora)
    clip = [image(seed, (48, 48)) for seed in range(frames)]
    source = {"image": clip[0]} if frames == 1 else {"video": clip}
    found = []
    for strength in (1.0, 0.0):
        if not strength:
            pipe.unload_lora_weights()
            editor._host.set_strength(0.0)
        wanted = edited(editor, [clip], PROMPTS[:1], steps=4, seeds=[4])[0] / 2 + 0.5
        ours = pipe(**source, prompt=PROMPTS[0], num_inference_steps=4, generator=generators(4)[0], output_type="pt").frames[0]
        assert (ours.transpose(0, 1) - wanted).abs().max() <= 1e-5
        found.append(ours)
    assert (found[0] - found[1]).abs().max() > 1e-2, "the LoRA changes nothing"
