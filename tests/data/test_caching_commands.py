"""The caching commands as processes: kills, Ctrl-C, several processes, the tiny FLUX's real encoders, real photos."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from byg_plugin import caching
from byg_plugin.config.sections import Config
from byg_plugin.data import buckets
from byg_plugin.data.cache import Keys, cache_latents, cache_texts, latent_store
from byg_plugin.data.dataset import BucketBatches, CachedTuples, collate
from byg_plugin.data.media import load_image
from byg_plugin.data.rules import ROLES
from byg_plugin.data.tuples import read_tuples
from byg_plugin.models import make_family
from tests.support import ROOT
from tests.support.data_fakes import CPU, FakeFamily, data_set, entries, record, write_tuples
from tests.support.processes import patience_of
from tests.support.tiny import tiny_config

BASE = ROOT / "byg_plugin" / "demo" / "base"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def toml(config: Config, path: Path) -> Path:
    """The configuration's sections that caching reads, as a file."""
    lines = []
    for section in ("model", "dataset", "conditioning", "train", "output"):
        lines.append(f"[{section}]")
        for key, value in config.model_dump(mode="json", exclude_none=True)[section].items():
            # JSON's strings, numbers and lists of numbers are TOML's too.
            lines.append(f"{key} = {json.dumps(value)}")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_entries_that_are_not_pruned_are_said(tmp_path: Path) -> None:
    config = data_set(tmp_path, images=3)
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"max_lost": 0.5})})
    (tmp_path / "2.png").write_bytes(b"no image")
    file = toml(config, tmp_path / "c.toml")
    command = [sys.executable, str(ROOT / "tests" / "support" / "data_fakes.py"), "latents", "0", str(file), "--prune"]
    for left_out in (True, False):
        done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=True)
        assert ("1 are left out" in done.stdout) == ("not pruned: entries of what is left out" in done.stdout) == left_out, done.stdout
        write_tuples(tmp_path / "tuples.jsonl", [record("0.png")])
    assert "1 unused entries removed" in done.stdout


def faked(what: str, seconds: float, config: Path, *launcher: str) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, str(ROOT / "tests" / "support" / "data_fakes.py"), what, str(seconds), str(config)]
    return subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_entries(config: Config, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(list(Path(config.dataset.cache_dir).glob("latents/*.safetensors"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_processes_wait_for_shares_that_take_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toml(data_set(tmp_path), tmp_path / "c.toml")
    assert patience_of(lambda: caching.run("latents", str(config), [], prune=False), monkeypatch) >= timedelta(hours=3)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows cannot send these signals to a process")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_stopped_in_the_middle_and_run_again(tmp_path: Path, name: str) -> None:
    how = signal.Signals[name]
    config = data_set(tmp_path, images=12)
    process = faked("latents", 0.3, toml(config, tmp_path / "c.toml"))
    wait_for_entries(config, 3, process)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -how), errors
    assert "Traceback" not in errors
    before = {name: data for name, data in entries(config).items() if "partial" not in name}
    assert 3 <= len(before) < 12
    if how == signal.SIGINT:
        assert len(entries(config)) == len(before)
    family = FakeFamily()
    summary = cache_latents(config, family, read_tuples(config.dataset), CPU)
    assert family.images == 12 - len(before) and summary.kept == len(before)
    assert before.items() <= entries(config).items()
    cache_texts(config, family, read_tuples(config.dataset), CPU)
    assert len(CachedTuples(config, family)) == 12  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun on Windows needs libuv builds")
def test_two_processes_make_the_cache_that_one_makes(tmp_path: Path) -> None:
    config = data_set(tmp_path, images=7)
    family = FakeFamily()
    cache_latents(config, family, read_tuples(config.dataset), CPU)
    one = entries(config)
    shutil.rmtree(tmp_path / "cache")
    path = toml(config, tmp_path / "c.toml")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = faked("latents", 0.05, path, *launcher)
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert said.count("7 images encoded, 0 were cached already") == 1  # said once
    assert entries(config) == one
    (tmp_path / "3.png").write_bytes(b"broken")
    process = faked("latents", 0, path, *launcher)
    said, errors = process.communicate(timeout=240)
    assert process.returncode != 0 and errors.count("1 image(s) of dataset.tuples cannot be used") == 1, errors
    assert entries(config) == one


# --- the tiny FLUX's own VAE, T5 and CLIP, and real photos ---


def photos(folder: Path) -> list[Path]:
    """Photos that scikit-image's wheel ships, as JPEG, PNG, a turned JPEG and a greyscale PNG."""
    data = pytest.importorskip("skimage.data", reason="scikit-image brings the photos")
    folder.mkdir(parents=True, exist_ok=True)
    astronaut, coffee, chelsea = (Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee", "chelsea"))
    astronaut.save(folder / "astronaut.jpg", quality=92)
    coffee.save(folder / "coffee.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    chelsea.transpose(Image.Transpose.ROTATE_90).save(folder / "chelsea.jpg", exif=exif, quality=92)
    Image.fromarray(data.camera()).save(folder / "camera.png")
    return [folder / name for name in ("astronaut.jpg", "coffee.png", "chelsea.jpg", "camera.png")]


def flux_config(folder: Path, **dataset: Any) -> Config:
    if not (BASE / "vae").is_dir():
        pytest.skip("the demo's base model is not in this tree")
    return tiny_config(folder, model={"path": str(BASE)}, dataset={"tuples": str(folder / "t.jsonl"), "resolution": 64, **dataset})


def test_real_photos_through_the_commands_into_batches(tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos")
    config = flux_config(tmp_path, cache_batch_size=2)
    write_tuples(tmp_path / "t.jsonl", [record(f"photos/{path.name}", k, src_caption="a photo") for path in paths for k in range(2)])
    file = toml(config, tmp_path / "c.toml")
    said = []
    # The two ways a command is started: as a module, and as a file of the clone from another folder.
    for start in (["-m", "byg_plugin.cache_latents"], [str(ROOT / "byg_plugin" / "cache_text_encoder_outputs.py")]):
        environment = ENVIRONMENT | ({"PYTHONPATH": ""} if start[0] != "-m" else {})
        done = subprocess.run(
            [sys.executable, *start, "--config", str(file)], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert "4 images encoded, 0 were cached already" in said[0] and "25 texts encoded" in said[1]
    assert re.search(r"note: \d+ texts are longer than conditioning.max_text_tokens = 8 tokens and were cut, e.g. '\w+ \d of", said[1]), (
        said
    )
    family = make_family(config)
    data = CachedTuples(config, family)
    sizes = {data.tuples[i].source.name: data.bucket(i) for i in range(len(data))}
    assert sizes["astronaut.jpg"] == sizes["camera.png"] == (64, 64)
    assert sizes["coffee.png"][0] > sizes["coffee.png"][1] and sizes["chelsea.jpg"][0] > sizes["chelsea.jpg"][1]
    vae = family.load_vae(CPU)
    for index in (0, 2, 4, 6):
        width, height = data.bucket(index)
        latents = data[index]["source"]
        assert latents.shape[1:] == (1, height // 4, width // 4) and latents.isfinite().all()
        # The latents are of this photo, upright: decoded, they are nearer to it than to itself turned over.
        photo = np.asarray(buckets.crop_to_bucket(load_image(data.tuples[index].source), (width, height)), dtype=float)
        decoded = (family.decode_latents(vae, latents[None])[0, :, 0].permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(decoded - photo).mean() < np.abs(decoded - photo[::-1]).mean()
        again = family.encode_pixels(vae, buckets.to_tensor(Image.fromarray(photo.astype(np.uint8)))[None, :, None])[0]
        assert torch.allclose(latents, again, atol=1e-4)
    for batch in BucketBatches(data, 2, seed=0).batches(0):
        collated = collate([data[index] for index in batch])
        assert collated["source"].ndim == 5
        for role in ROLES:
            assert collated[role]["t5"].shape[:2] == (2, 8) and collated[role]["pooled"].ndim == 2


def test_another_vae_of_the_same_shape_is_another_model(tmp_path: Path) -> None:
    (path, *_) = photos(tmp_path)
    config = flux_config(tmp_path)
    write_tuples(tmp_path / "t.jsonl", [record(path.name)])
    family = make_family(config)
    cache_latents(config, family, read_tuples(config.dataset), CPU)
    cache_texts(config, family, read_tuples(config.dataset), CPU)
    assert len(CachedTuples(config, family)) == 1
    before = entries(config)
    shutil.copytree(BASE / "vae", tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    first = next(iter(state))
    state[first] = state[first] * 1.5
    save_file(state, weights)
    other = config.model_copy(update={"model": config.model.model_copy(update={"vae": str(tmp_path / "vae")})})
    with pytest.raises(ValueError, match=r"1 of 1 images are not cached .* run python -m byg_plugin\.cache_latents") as caught:
        CachedTuples(other, make_family(other))
    assert "text_encoder" not in str(caught.value)
    cache_latents(other, make_family(other), read_tuples(other.dataset), CPU)
    assert len(CachedTuples(other, make_family(other))) == 1 and before.items() <= entries(config).items()
    keys = [Keys(c, make_family(c)).source(read_tuples(c.dataset)[0]).key for c in (config, other)]
    assert keys[0] != keys[1] and latent_store(config.dataset).has(keys[0])


def test_a_bad_tuple_stops_before_anything_is_loaded(tmp_path: Path) -> None:
    config = data_set(tmp_path, images=2)
    cache_latents(config, FakeFamily(), read_tuples(config.dataset), CPU)
    before = entries(config)
    write_tuples(tmp_path / "tuples.jsonl", [record("0.png"), record("1.png", instruction="")])
    process = faked("latents", 0, toml(config, tmp_path / "c.toml"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in errors
    assert f"error: {tmp_path}" in errors and "line 2: instruction is empty" in errors
    assert entries(config) == before
