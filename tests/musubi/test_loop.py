"""Inside the real musubi-tuner: its loop trains, saves, resumes, on two processes, from its own caches."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from byg_plugin import train_network
from byg_plugin.data.rules import ROLES
from byg_plugin.lora import formats as lora_formats
from byg_plugin.musubi import cache as musubi_cache
from byg_plugin.musubi import host as musubi
from byg_plugin.musubi import trainer as musubi_trainer
from byg_plugin.musubi.family import TextEncoder, musubi_family
from byg_plugin.objectives.base import Batch, Plan
from tests.support import ROOT
from tests.support.musubi_host import (
    A14B,
    BLOCKS,
    CHECKOUT,
    SITE,
    T2V,
    WAN_TEXT,
    embedded_networks,
    host_config,
    latents,
    needs_host,
    open_tiny,
    write_weights,
)
from tests.support.musubi_images import QWEN
from tests.support.musubi_runs import FAMILIES, child_env, encoded, rig, run_here, write_config, write_work

pytestmark = needs_host


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hosts_loop_trains_and_saves(tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")
    write_work(tmp_path, family)
    config = write_config(tmp_path, family, save_every_n_steps=2, save_last_n_steps=2, save_state=True)
    saved = run_here(config)
    names = {path.name for path in saved.parent.iterdir() if path.is_file()}
    assert {"tiny.safetensors", "tiny-ema.safetensors", "tiny-step00000002.safetensors", "tiny-step00000002-ema.safetensors"} <= names
    engine = re.search(r"engine: plain, base held by rank 0: (\d+) of (\d+) bytes", caplog.text)
    assert engine is not None and engine[1] == engine[2] != "0"
    live, ema = load_file(saved), load_file(saved.with_name("tiny-ema.safetensors"))
    assert live.keys() == ema.keys() and any(not torch.equal(live[name], ema[name]) for name in live)
    assert any(value.abs().max() > 1e-4 for name, value in live.items() if "lora_up" in name)
    with safe_open(saved.with_name("tiny-ema.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["byg.weights"], metadata["byg.step"], metadata["byg.position"]) == ("ema", "4", "same")
    assert metadata["byg.family"] == family and metadata["ss_network_dim"] == "4" and str(tmp_path) not in json.dumps(metadata)
    with safe_open(saved, framework="pt") as file:
        assert file.metadata()["byg.weights"] == "live" and file.metadata()["byg.resolution"] == "39"
    for to in ("diffusers", "comfyui"):
        assert lora_formats.convert(live, to, family=family)
    state = next(path for path in saved.parent.iterdir() if path.is_dir() and (path / musubi_trainer.STATE).is_file())
    assert musubi_trainer.read_state(state)["step"] in (2, 4) and (state / musubi_trainer.STATE_TENSORS).is_file()


@pytest.mark.parametrize("family", [T2V, QWEN])
def test_resume_goes_on_at_its_step_with_its_ema(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    write_work(tmp_path, family, items=1)  # one item: the host's order of batches starts over, with one it is the same
    drawn: list[float] = []
    plain = musubi_trainer.draw_batch

    def draw(*inputs: Any, **options: Any) -> Batch:
        batch = plain(*inputs, **options)
        drawn.append(batch.t[0].item())
        return batch

    monkeypatch.setattr(musubi_trainer, "draw_batch", draw)
    whole = run_here(write_config(tmp_path, family, "whole"))
    uninterrupted, drawn[:] = list(drawn), []
    run_here(write_config(tmp_path, family, "half", max_train_steps=2, save_state=True))
    state = musubi_trainer.states(tmp_path / "half")[-1]
    second = write_config(tmp_path, family, "half", save_state=False)
    with pytest.raises(ValueError, match="go on with --resume"):
        run_here(second)
    with pytest.raises(ValueError, match="so name the folder: --resume"):
        run_here(second, "latest")
    monkeypatch.setattr(sys, "argv", ["train_network", "--config", str(second), "--dry-run", "--resume", str(state)])
    train_network.main()
    assert "goes on at step 2, in files called tiny-from000002" in capsys.readouterr().out
    saved = run_here(second, str(state))
    assert drawn == uninterrupted and len(set(drawn)) == 4
    resumed = saved.with_name("tiny-from000002.safetensors")
    for ending in ("", "-ema"):
        a, b = (load_file(path.with_name(f"{path.stem}{ending}.safetensors")) for path in (whole, resumed))
        assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a), ending
    with safe_open(resumed.with_name("tiny-from000002-ema.safetensors"), framework="pt") as file:
        assert file.metadata()["byg.step"] == "4"
    with pytest.raises(ValueError, match="is of an earlier run that went on from this state"):
        run_here(second, str(state))
    with pytest.raises(ValueError, match="raise it, nothing is left to do"):
        run_here(write_config(tmp_path, family, "half", max_train_steps=2), str(state))
    with pytest.raises(ValueError, match="no state of this plugin there"):
        run_here(second, str(tmp_path))


def test_a_role_missing_in_a_cache_stops_the_run(tmp_path: Path):
    write_work(tmp_path, T2V)
    path = tmp_path / "cache" / "photo1_wan_te.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    left = {name: value for name, value in load_file(path).items() if "reverse_instruction_umt5" not in name}
    save_file(left, path, metadata=metadata)
    with pytest.raises(ValueError, match="photo1_wan_te.safetensors: reverse_instruction is not cached: it has no umt5; remove it and run"):
        run_here(write_config(tmp_path, T2V))


def test_ranks_draw_different_noise(tmp_path: Path):
    it = rig(T2V)
    Accelerator(cpu=True)  # the autocast of those below asks for accelerate's state
    batch = {
        f"byg_{role}_{part}": value
        for role in ROLES
        for part, value in (("umt5", [torch.ones(3, WAN_TEXT)]), ("lengths", [torch.tensor([3])]))
    }
    seen = []
    it.trainer.byg_objective, kept = (
        type(
            "Spy",
            (),
            {"plan": lambda self, step, seed: Plan(), "step": lambda self, f, b, back: seen.append(b) or {"loss": torch.ones(())}},
        )(),
        it.trainer.byg_objective,
    )
    for rank in (0, 1):
        accelerator = type("Rank", (), {"device": torch.device("cpu"), "num_processes": 2, "process_index": rank, "scaler": None})()
        it.trainer.byg_progress.micro = 0
        it.trainer.process_batch(it.args, accelerator, it.transformer, it.network, batch, latents(T2V, 1, 1))
    it.trainer.byg_objective, it.trainer.byg_progress.micro = kept, 0
    assert not torch.equal(seen[0].noise, seen[1].noise) and seen[0].t != seen[1].t and seen[0].identity_step == seen[1].identity_step


@pytest.mark.timeout(1800)  # three interpreters start
def test_two_processes_train_one_lora_on_different_noise(tmp_path: Path):
    write_work(tmp_path, T2V, items=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SITE / "one_rank.py")]
    command += [str(write_config(tmp_path, T2V, max_train_steps=3)), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_env(BYG_TINY_HOST="1"), check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert len(one["t"]) == len(other["t"]) == 3 and not set(one["t"]) & set(other["t"])
    assert one["weights"] == other["weights"] and any(abs(v) > 1e-4 for name, v in one["weights"].items() if "lora_up" in name)


@pytest.mark.timeout(1800)  # three interpreters start
def test_accelerate_launch_of_the_command(tmp_path: Path):
    write_work(tmp_path, T2V)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--mixed_precision", "no"]
    command += [str(ROOT / "byg_plugin/train_network.py"), "--config", str(write_config(tmp_path, T2V))]
    environment = child_env(BYG_TINY_HOST="1")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "tiny-ema.safetensors").is_file() and f"LoRA: {tmp_path / 'out' / 'tiny.safetensors'}" in done.stdout


@pytest.mark.timeout(1800)  # three interpreters start
def test_the_pages_commands_lead_to_a_preview(tmp_path: Path):
    """As printed, in a folder with the recipe's files: tiny weights, one picture, two steps."""
    models = open_tiny("flux").module("flux.flux_models")
    for name in ("models", "data/images"):
        (tmp_path / name).mkdir(parents=True)
    write_weights(tmp_path, "flux")
    (tmp_path / "dit.safetensors").rename(tmp_path / "models/flux1-dev.safetensors")
    torch.manual_seed(0)
    save_file(models.AutoEncoder(models.configs_flux_dev_context.ae_params).state_dict(), tmp_path / "models/ae.safetensors")
    for name in ("t5xxl_fp16", "clip_l"):
        save_file({}, tmp_path / f"models/{name}.safetensors")
    Image.new("RGB", (64, 48), (40, 90, 200)).save(tmp_path / "data/images/parrots.jpg")
    (tmp_path / "data/images/parrots.txt").write_text("not used", encoding="utf-8")
    tuples = {"source": "images/parrots.jpg", **{role: f"{role} of parrots" for role in ROLES}}
    (tmp_path / "data/tuples.jsonl").write_text(json.dumps(tuples), encoding="utf-8")
    directories = "".join(f'{key} = "data/images"\n' for key in ("image_directory", "control_directory"))
    general = '[general]\nresolution = [64, 48]\nbatch_size = 1\ncaption_extension = ".txt"\n'
    (tmp_path / "data/musubi_dataset.toml").write_text(
        f'{general}[[datasets]]\n{directories}cache_directory = "data/cache"\n', encoding="utf-8"
    )

    text = (ROOT / "docs/musubi.md").read_text(encoding="utf-8").partition("for FLUX.1-dev:")[2]
    commands = [shlex.split(line, comments=True) for line in text.partition("```bash\n")[2].partition("```")[0].splitlines()]
    assert len(commands) <= 6 and commands.pop(0)[:2] == ["pip", "install"]
    short = [f"--set=musubi.{word}" for word in ("max_train_steps=2", "sample_every_n_steps=1", "gradient_accumulation_steps=1")]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    for words in commands:
        words = [word.replace("../byg_plugin", str(ROOT)) for word in words]
        if words[0] == "cp":
            text = Path(words[1]).read_text(encoding="utf-8")
            (tmp_path / words[2]).write_text(text.replace("[musubi]\n", "[musubi]\nmax_data_loader_n_workers = 0\n"), encoding="utf-8")
            continue
        if words[0] == "echo":
            assert words[2:] == [">", "data/preview_prompts.txt"]
            (tmp_path / words[3]).write_text(words[1].replace("--w 512 --h 512 --s 20", "--w 64 --h 48 --s 2") + "\n", encoding="utf-8")
            continue
        if words[0] == "accelerate":
            words = ["python", *launch, *words[2:], *short]
        if not (ROOT / words[1]).exists() and words[1].startswith("flux"):
            words[1] = str(Path(CHECKOUT) / words[1])
        environment = child_env(BYG_TINY_HOST="1")
        done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
        assert done.returncode == 0, f"{words}: {done.stdout[-1500:]} {done.stderr[-3000:]}"
    previews = sorted((tmp_path / "out/musubi_flux/sample").iterdir())
    assert len(previews) >= 3, "before the first step and after each"
    with Image.open(previews[0]) as picture:
        assert picture.size == (64, 48)
    assert (tmp_path / "out/musubi_flux/byg_flux-ema.safetensors").is_file()


def test_a_wrong_option_stops_before_anything_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from byg_plugin.config.loading import load_config

    write_work(tmp_path, T2V)
    monkeypatch.setattr(musubi, "make_trainer", lambda *_: pytest.fail("the run went on"))
    for setting, says in (("learning_rat=1", "did you mean musubi.learning_rate"), ("mixed_precision=bf-16", "did you mean 'bf16'")):
        with pytest.raises(ValueError, match=says):
            musubi.train(load_config(write_config(tmp_path, T2V), [f"musubi.{setting}"]))


@pytest.mark.parametrize("family", [A14B, "flux"])
def test_edit_of_the_embedded_host_takes_the_lora(tmp_path: Path, family: str):
    from byg_plugin.edit import EditPipeline
    from tests.support.tiny import model_folder

    embedded_networks(family)  # skips where there is no embedded host
    if family == "flux":
        model = model_folder()
    else:
        from tests.support.tiny_wan import write_wan

        model = write_wan(tmp_path / "model", 2, num_layers=BLOCKS)
    write_work(tmp_path, family)
    saved = run_here(write_config(tmp_path, family)).with_name("tiny-ema.safetensors")
    Image.new("RGB", (64, 64), (20, 90, 160)).save(tmp_path / "photo.png")
    edits = []
    for strength in (1.0, 0.0):
        options = {"device": "cpu", "dtype": "float32", "resolution": 64, "strength": strength}
        pipeline = EditPipeline.from_lora(saved, model=str(model), **options)
        edits.append(pipeline(tmp_path / "photo.png", "make the sky red", steps=2))
    assert edits[0].size == (64, 64) and edits[0].tobytes() != edits[1].tobytes()


@pytest.mark.parametrize("family", [T2V, "flux"])
def test_the_cache_step_adds_roles_to_the_hosts_items(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    write_work(tmp_path, family)
    architecture = "fk" if family == "flux" else "wan"
    for path in (tmp_path / "cache").glob("*_te.safetensors"):
        path.unlink()
    for name in ("t5", "clip"):
        save_file({}, tmp_path / f"{name}.safetensors")
    encoders = {"text_encoder1": "t5", "text_encoder2": "clip"} if family == "flux" else {"t5": "t5"}
    options = {option: str(tmp_path / f"{name}.safetensors") for option, name in encoders.items()}
    config = host_config(tmp_path, family, musubi=options)
    open_tiny(family)
    asked: list[str] = []

    def encode(text: str) -> Any:
        asked.append(text)
        return encoded(family, text)

    monkeypatch.setattr(musubi, "load_text_encoder", lambda *_: TextEncoder(encode=encode, length=len))
    musubi.cache_texts(config)
    assert len(asked) == 12 and "3 items' texts cached, 0 were current" in capsys.readouterr().out
    assert musubi_cache.check(tmp_path / "dataset.toml", musubi_family(family), musubi.training_tuples(config.dataset)) == 3

    # The host's own caching, before or after, and ours leave each other's tensors.
    from musubi_tuner.dataset import cache_io
    from musubi_tuner.dataset.image_video_dataset import ItemInfo

    item = ItemInfo("photo0", "theirs", (48, 32))
    item.text_encoder_output_cache_path = str(tmp_path / "cache" / f"photo0_{architecture}_te.safetensors")
    if family == "flux":
        cache_io.save_text_encoder_output_cache_flux_kontext(item, torch.ones(8, 24), torch.ones(20))
    else:
        cache_io.save_text_encoder_output_cache_wan(item, torch.ones(3, WAN_TEXT))
    asked.clear()
    text = (tmp_path / "tuples.jsonl").read_text(encoding="utf-8").replace("instruction 0", "another 0", 1)
    (tmp_path / "tuples.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"texts that have changed since they were cached \(photo0\)"):
        musubi.prepare(host_config(tmp_path, family, musubi=options))
    musubi.cache_texts(config)
    assert len(asked) == 4, "only the changed item's texts"
    written = load_file(item.text_encoder_output_cache_path)
    assert any(name.startswith("varlen_byg_") for name in written) and any("t5" in name and "byg" not in name for name in written)
