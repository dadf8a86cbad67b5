"""What a run names is there, or is told at once: by its key, and only what this family and command need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from byg_plugin import places
from byg_plugin.config.loading import parse_config
from byg_plugin.config.sections import Config, ModelConfig

EVERY = (*places.NETWORKS, "vae", *places.ENCODERS)


def config(folder: Path, family: str = "flux", **model: Any) -> Config:
    (folder / "there").mkdir(exist_ok=True)
    (folder / "file.safetensors").touch()
    section = {"family": family, **{key: value.replace("~", str(folder)) for key, value in model.items()}}
    output = {"dataset": {"tuples": "t", "cache_dir": "c"}, "train": {"steps": 1}, "output": {"dir": "o"}}
    return parse_config({"model": section, **output})


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("flux", {"path": "~/there"}),
        ("flux", {"path": "black-forest-labs/FLUX.1-dev"}),
        ("flux", dict.fromkeys(("transformer", "vae", "t5", "clip"), "~/file.safetensors")),
        ("wan2.1-t2v-1.3b", dict.fromkeys(("transformer", "vae", "t5"), "~/file.safetensors")),
        ("wan2.2-t2v-a14b", dict.fromkeys(("transformer", "transformer_2", "vae", "t5"), "~/file.safetensors")),
    ],
)
def test_what_is_there_or_can_be_a_hub_id_passes(tmp_path: Path, family: str, model: dict[str, str]):
    places.check_model(config(tmp_path, family, **model).model, *EVERY)


@pytest.mark.parametrize(
    ("family", "model", "says"),
    [
        ("flux", {"path": "~/gone"}, r"model\.path = .*gone: no such file or folder; give one that is there, or a hub id"),
        ("flux", {"path": "a/b/c"}, r"model\.path = a/b/c: no such"),
        ("flux", {"path": "~/there", "vae": "models/ae.safetensors"}, r"model\.vae = models/ae.safetensors: no such"),
        ("flux", {"transformer": "~/file.safetensors"}, r"model\.vae is not set"),
        ("wan2.2-t2v-a14b", {"path": "a/b", "transformer_2": "~/gone.safetensors"}, r"model\.transformer_2 = .*gone"),
    ],
)
def test_what_is_nowhere_is_named_by_its_key(tmp_path: Path, family: str, model: dict[str, str], says: str):
    with pytest.raises(ValueError, match=says):
        places.check_model(config(tmp_path, family, **model).model, *EVERY)


def test_a_command_needs_its_own_parts_alone(tmp_path: Path):
    """Latents can be cached where the network is not."""
    places.check_model(config(tmp_path, transformer="~/gone", vae="~/there").model, "vae")


@pytest.mark.parametrize("name", ["l.safetensors", "p_high_noise.safetensors", "p_low_noise.safetensors", "p.safetensors", "p"])
def test_a_lora_is_a_file_or_what_a_pair_is_called(tmp_path: Path, name: str):
    for file in ("l.safetensors", "p_high_noise.safetensors", "p_low_noise.safetensors"):
        (tmp_path / file).touch()
    places.check_lora(str(tmp_path / name), "--lora ")


def test_a_lora_that_is_nowhere(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^lora\.init_from = .*q\.safetensors: no such file; give a LoRA"):
        places.check_lora(str(tmp_path / "q.safetensors"), "lora.init_from = ")


DISTILLED = [
    ("krea2", "models/krea2-turbo.safetensors"),
    ("krea2", "someone/Krea-2-Turbo"),
    ("qwen-image", "models/Qwen-Image-Lightning-8steps.safetensors"),
    ("z-image", "Tongyi-MAI/Z-Image-Turbo"),
    ("flux2-klein-4b", "black-forest-labs/FLUX.2-klein-4B"),
    ("z-image", "models/Z-Image-Turbo/transformer"),
    ("z-image", "models/Z-Image-Turbo/transformer/diffusion_pytorch_model.safetensors"),
    ("z-image", "hub/models--Tongyi-MAI--Z-Image-Turbo/snapshots/5f4b9cbb"),
]
BASES = [
    ("krea2", "models/krea2.safetensors"),
    ("qwen-image", "Qwen/Qwen-Image"),
    ("z-image", "Tongyi-MAI/Z-Image"),
    ("flux2-klein-9b", "black-forest-labs/FLUX.2-klein-base-9B"),
    ("flux", "turbo/flux1-dev"),
    ("flux2-klein-4b", "models/base-klein-4b.safetensors"),
    ("krea2", "krea/Krea-2-Raw"),
    ("krea2", "undistilled_krea2.safetensors"),
    ("z-image", "ostris/Z-Image-De-Turbo"),
]


@pytest.mark.parametrize(("family", "place"), DISTILLED)
@pytest.mark.parametrize("key", ["path", "transformer"])
def test_distilled_weights_are_told_by_their_name(family: str, place: str, key: str):
    with pytest.raises(ValueError, match=rf"model.{key} = {place}: distilled weights \(by its name, .*--allow-distilled"):
        places.check_not_distilled(ModelConfig.model_validate({"family": family, key: place}))


@pytest.mark.parametrize(("family", "place"), BASES)
def test_bases_are_not_taken_for_distilled(family: str, place: str):
    places.check_not_distilled(ModelConfig.model_validate({"family": family, "path": place}))
    beside = {"family": family, "path": "a/distilled-turbo-lightning", "transformer": place}
    places.check_not_distilled(ModelConfig.model_validate(beside))


@pytest.mark.parametrize("part", ["", "transformer"])
def test_distilled_weights_are_told_by_their_index(tmp_path: Path, part: str):
    folder = tmp_path / "krea2" / part
    folder.mkdir(parents=True)
    index = tmp_path / "krea2" / "model_index.json"
    model = ModelConfig.model_validate({"family": "krea2", "transformer" if part else "path": str(folder)})
    index.write_text('{"is_distilled": false}', encoding="utf-8")
    places.check_not_distilled(model)
    index.write_text('{"is_distilled": true}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"model_index.json says is_distilled"):
        places.check_not_distilled(model)
    index.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"model_index.json: cannot be read as JSON"):
        places.check_not_distilled(model)


def test_distilled_weights_are_told_by_their_scheduler(tmp_path: Path):
    """Z-Image's index says nothing; its own shift is 6, Turbo's is 3."""
    folder = tmp_path / "zit"
    (folder / "scheduler").mkdir(parents=True)
    (folder / "transformer").mkdir()
    file = folder / "scheduler" / "scheduler_config.json"
    for place in (folder, folder / "transformer"):
        model = ModelConfig.model_validate({"family": "z-image", "path": str(place)})
        file.write_text('{"shift": 6.0}', encoding="utf-8")
        places.check_not_distilled(model)
        file.write_text('{"shift": 3.0}', encoding="utf-8")
        with pytest.raises(ValueError, match=r"scheduler_config.json has shift 3.0, the base has 6.0"):
            places.check_not_distilled(model)
    klein = ModelConfig.model_validate({"family": "flux2-klein-4b", "path": str(folder)})
    places.check_not_distilled(klein)  # its own is no number


def test_an_index_counts_for_more_than_a_name(tmp_path: Path):
    """Who keeps the base in a folder that is named as the family is trains it."""
    folder = tmp_path / "flux2-klein-4b"
    folder.mkdir()
    model = ModelConfig.model_validate({"family": "flux2-klein-4b", "path": str(folder)})
    with pytest.raises(ValueError, match="by its name, flux2-klein-4b"):
        places.check_not_distilled(model)
    (folder / "model_index.json").write_text('{"_class_name": "Flux2KleinPipeline"}', encoding="utf-8")
    with pytest.raises(ValueError, match="by its name, flux2-klein-4b"):
        places.check_not_distilled(model)
    (folder / "model_index.json").write_text('{"is_distilled": false}', encoding="utf-8")
    places.check_not_distilled(model)
