"""What model browsers show of a LoRA: musubi-tuner's values, and hashes of the tensors that are in the file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from base64 import b64decode
from datetime import datetime
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from byg_plugin import convert_lora, families
from byg_plugin.lora.card import LoraCard, has_card
from byg_plugin.lora.files import HASHES, hashed, read_lora, write_lora
from byg_plugin.lora.modelspec import metadata_of
from byg_plugin.training import preview
from byg_plugin.training.loop import Trainer
from tests.support.musubi_host import CHECKOUT, needs_host
from tests.support.tiny import make_trainer, run_config, tiny_config

DATE = "2026-01-02T03:04:05"


def content_hash(path: Path) -> str:
    """SHA-256 of what follows a file's header."""
    written = path.read_bytes()
    return hashlib.sha256(written[8 + int.from_bytes(written[:8], "little") :]).hexdigest()


@pytest.mark.parametrize("family", families.SPECS)
def test_every_family_has_the_keys_that_browsers_need(family: str):
    card = LoraCard(family=family, position="same", version="1", base="base", rank=4, resolution=512, weights="ema", step=3)
    found = metadata_of(card, "my_lora-ema", date=DATE)
    assert not has_card(found) and all(isinstance(value, str) for value in found.values())
    assert found["modelspec.sai_model_spec"] == "1.0.0" and found["modelspec.title"] == "my_lora-ema"
    assert found["modelspec.architecture"].endswith("/lora") and found["modelspec.implementation"].startswith("https://github.com/")
    assert found["modelspec.resolution"] == "512x512" and found["modelspec.date"] == DATE
    assert "rank 4, ema weights after 3 steps" in found["modelspec.description"] and "modelspec.thumbnail" not in found
    assert "ComfyUI needs a node: ByG Source" in found["modelspec.usage_hint"] and "BygPipeline" in found["modelspec.usage_hint"]


def test_an_expert_is_said():
    card = LoraCard(family="wan2.2-t2v-a14b", position="bernini", expert="low_noise", resolution=512)
    found = metadata_of(card, "x", date=DATE, thumbnail="data:image/jpeg;base64,AA==")
    assert "LoRA of the low-noise expert on" in found["modelspec.description"] and found["modelspec.thumbnail"].endswith("AA==")
    assert found["modelspec.architecture"] == "wan2.1/lora"


@needs_host[0]
@needs_host[1]
def test_the_values_are_musubi_tuners():
    text = (Path(CHECKOUT) / "src/musubi_tuner/utils/sai_model_spec.py").read_text(encoding="utf-8")
    known = set(re.findall(r'^(?:ARCH|IMPL)_\w+ = "([^"]+)"', text, re.MULTILINE))
    assert {value for spec in families.SPECS.values() for value in spec.modelspec or ("none",)} <= known


def test_hashes_are_of_the_bytes_after_the_header(tmp_path: Path):
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones(400_000, dtype=torch.bfloat16)}
    metadata = dict.fromkeys(HASHES, "") | {"ss_steps": "3", "other": "x"}
    write_lora(tmp_path / "x.safetensors", tensors, metadata)
    _, found = read_lora_metadata(tmp_path / "x.safetensors")
    digest = content_hash(tmp_path / "x.safetensors")
    assert found["modelspec.hash_sha256"] == f"0x{digest}" and found["sshs_model_hash"] == digest
    # As sd-webui's extension: 64 KiB from 1 MiB on, of a file with the ss_ keys alone; here less than 1 MiB.
    assert found["sshs_legacy_hash"] == hashlib.sha256(b"").hexdigest()[:8] and found["other"] == "x"
    assert hashed(tensors, {"other": "x"}) == {"other": "x"}, "what has no hash gets none"


def read_lora_metadata(path: Path) -> tuple[int, dict[str, str]]:
    written = path.read_bytes()
    size = int.from_bytes(written[:8], "little")
    return size, json.loads(written[8 : 8 + size])["__metadata__"]


def test_what_training_writes_and_what_is_converted_have_their_own_hashes(tmp_path: Path):
    config = run_config(tmp_path / "out", train={"steps": 1}, sample={"every": 1, "items": 1, "steps": 1}, output={"thumbnail": True})
    path = make_trainer(config).run()
    tensors, metadata = read_lora(path)
    assert metadata["sshs_model_hash"] == content_hash(path) and metadata["modelspec.title"] == "byg_lora"
    assert abs((datetime.fromisoformat(metadata["modelspec.date"]) - datetime.now()).total_seconds()) < 3600
    kind, _, data = metadata["modelspec.thumbnail"].partition(",")
    picture = Image.open(BytesIO(b64decode(data)))
    assert kind == "data:image/jpeg;base64" and picture.size == (64 + 4 + 64, 64)
    convert_lora.main([str(path), "--to", "musubi", "--out", str(tmp_path / "musubi.safetensors")])
    _, converted = read_lora(tmp_path / "musubi.safetensors")
    assert converted["sshs_model_hash"] == content_hash(tmp_path / "musubi.safetensors") != metadata["sshs_model_hash"]
    assert converted["modelspec.hash_sha256"] == f"0x{converted['sshs_model_hash']}"
    assert {key: value for key, value in converted.items() if key not in HASHES} == {k: v for k, v in metadata.items() if k not in HASHES}


def test_the_thumbnail_is_the_last_preview_in_512_pixels(tmp_path: Path):
    output = tiny_config(tmp_path).output
    assert preview.thumbnail(output) is None
    for step, colour in ((9, "red"), (1_000_000, "blue"), (999_999, "green")):
        preview.folder(output, step).mkdir(parents=True)
        Image.new("RGB", (1024, 400), colour).save(preview.folder(output, step) / "000.png")
    found = preview.thumbnail(output)
    assert found is not None
    picture = Image.open(BytesIO(b64decode(found.partition(",")[2])))
    red, _, blue = picture.getpixel((0, 0))
    assert picture.size == (512, 200) and blue > 200 > 50 > red


def test_a_thumbnail_without_previews_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"output.thumbnail needs previews: set sample.every"):
        tiny_config(tmp_path, output={"thumbnail": True})


def test_the_last_preview_is_in_the_lora_that_a_run_leaves(tmp_path: Path):
    """A step is saved before its preview; what a file manager copies beside them hinders nothing."""
    config = run_config(tmp_path / "out", train={"steps": 2}, sample={"every": 2, "items": 1, "steps": 1}, output={"thumbnail": True})
    trainer = make_trainer(config)

    def copied(trainer: Trainer) -> None:
        if trainer.step == 1:
            shutil.copytree(preview.folder(config.output, 0), tmp_path / "out/previews/step-000000 - Copy")

    trainer.on_step = copied
    tensors, metadata = read_lora(trainer.run())
    assert metadata["modelspec.thumbnail"] == preview.thumbnail(config.output)
    saved, before = read_lora(tmp_path / "out/checkpoints/step-000002/byg_lora.safetensors")
    assert before["modelspec.thumbnail"] != metadata["modelspec.thumbnail"] and before.keys() == metadata.keys()
    assert saved.keys() == tensors.keys() and all(torch.equal(value, tensors[name]) for name, value in saved.items())


def test_a_preview_that_cannot_be_read_is_no_thumbnail(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    output = tiny_config(tmp_path).output
    preview.folder(output, 3).mkdir(parents=True)
    (preview.folder(output, 3) / "000.png").write_bytes(b"no picture")
    assert preview.thumbnail(output) is None and "is left out" in caplog.text
