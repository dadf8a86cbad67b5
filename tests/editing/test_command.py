"""The edit command: images, folders and tuples, wrong options, and real photos from the cache to the edit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from byg_plugin.sampling import seeded_noise
from tests.support.editing import CPU, command, difference, photo, pipeline
from tests.support.tiny import fill_caches, make_trainer, model_folder, run_config, workspace


def test_one_image(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = ["--steps", 3, "--seed", 4, "--strength", 0.8, "--guidance", 2]
    command(monkeypatch, lora, "--source", photo(), "--instruction", "add the snow", "--out", tmp_path / "out", *options)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["edits.jsonl", "photo0.png", "photo0_side_by_side.png"]
    with Image.open(tmp_path / "out/photo0.png") as image, Image.open(tmp_path / "out/photo0_side_by_side.png") as pair:
        settings = json.loads(image.text["byg"])
        assert settings == {
            "method": "lora",
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
    names = sorted(p.name for p in (tmp_path / "one").glob("*.png"))
    assert names == sorted(f"photo{i}{end}.png" for i in range(4) for end in ("", "_side_by_side"))
    for index in range(4):
        one, two = (Image.open(tmp_path / name / f"photo{index}.png") for name in ("one", "two"))
        assert json.loads(one.text["byg"]) == json.loads(two.text["byg"])
        assert json.loads(one.text["byg"])["seed"] == index
        assert difference(one, two) <= 1
    sizes = {Image.open(tmp_path / "one" / f"photo{i}.png").size for i in range(4)}
    assert len(sizes) > 1, "buckets"


def test_a_tuples_file(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command(monkeypatch, lora, "--tuples", workspace() / "tuples.jsonl", "--out", tmp_path, "--steps", 1)
    edits = sorted(p for p in tmp_path.glob("*.png") if "side" not in p.name)
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
        (["--source", "{work}/photo0.png", "--instruction", "add", "--out", "{tmp}/mine"], "photo0.png is there, .* no edit of edit.py's"),
        (["--source", "{work}/photo1.png", "--instruction", "add", "--out", "{tmp}/mine"], "photo1_side_by_side.png is there"),
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
    (tmp_path / "mine").mkdir()
    for name in ("photo0.png", "photo1_side_by_side.png"):
        (tmp_path / "mine" / name).write_text("not an edit")
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
        ("--cfg-high", "101", "'101' is not a number from 0 to 100"),
        ("--cfg-low", "1e39", "'1e39' is not a number from 0 to 100"),
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
    assert [(path.name, path.stat().st_size) for path in (tmp_path / "out").iterdir()] == [("edits.jsonl", 0)]


def test_seeded_noise_does_not_depend_on_the_batch():
    shape = (1, 16, 1, 4, 4)
    assert torch.equal(seeded_noise(shape, 3, CPU), seeded_noise(shape, 3, CPU))
    assert not torch.equal(seeded_noise(shape, 3, CPU), seeded_noise(shape, 4, CPU))


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
