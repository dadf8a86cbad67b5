"""Training and editing with Wan: sides, idle experts, resume, two processes' shares, previews, and the edit command on a clip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from byg_plugin import EditPipeline, edit, timesteps
from byg_plugin.config.sections import Config
from byg_plugin.data import cache, clips
from byg_plugin.data.tuples import read_tuples
from byg_plugin.editing import jobs
from byg_plugin.lora import files as lora_files
from byg_plugin.lora import formats as lora_formats
from byg_plugin.models import make_family
from byg_plugin.models.wan import HIGH, LOW
from byg_plugin.objectives.draws import law_of_t
from byg_plugin.randomness import coin
from byg_plugin.train_network import dry_run
from byg_plugin.training import checkpoint, loop, preview
from byg_plugin.training.loop import Trainer
from tests.support import ROOT
from tests.support.data_fakes import CPU, write_tuples
from tests.support.tiny import curve, wake
from tests.support.tiny_wan import A14B, T2V, wan_folder
from tests.support.wan_runs import run_config, workspace


def make_trainer(config: Config, resume: str | None = None) -> Trainer:
    return Trainer(config, make_family(config), Accelerator(cpu=True), resume)


def sides(trainer: Trainer, steps: int) -> list[bool | None]:
    return [trainer._side(step) for step in range(steps)]


def test_the_expert_that_a_step_does_not_train_is_unchanged_to_the_last_bit(tmp_path: Path):
    trainer = make_trainer(run_config(tmp_path, objective={"ema_decay": 0.9}, train={"steps": 8, "save_every": 0}))
    wake(trainer.host)
    seen: list[bool | None] = []

    def state() -> dict[str, Any]:
        moments = {
            name: {key: value.clone() for key, value in trainer.engine.optimizers["edit"].state.get(p, {}).items()}
            for name, p in trainer.host.parameters.items()
        }
        live = {name: p.detach().clone() for name, p in trainer.host.parameters.items()}
        return {name: (live[name], trainer.host.ema_weights.state()[name].clone(), moments[name]) for name in live}

    before = state()

    def check(of: Trainer) -> None:
        nonlocal before
        high, after = of._side(of.step - 1), state()
        seen.append(high)
        for name in after:
            trained = name.startswith(f"{HIGH}.") == high
            same = torch.equal(before[name][0], after[name][0])
            assert same != trained, (of.step, name)
            if not trained:
                assert torch.equal(before[name][1], after[name][1])
                assert before[name][2].keys() == after[name][2].keys()
                assert all(torch.equal(before[name][2][key], after[name][2][key]) for key in after[name][2])
        before = after

    trainer.on_step = check
    trainer.run()
    assert set(seen) == {True, False} and seen == sides(trainer, 8)
    log = curve(tmp_path)
    assert [bool(line["high_noise_step"]) for line in log] == seen


def test_the_side_is_a_function_of_seed_and_step_alone_and_has_the_laws_probability(tmp_path: Path):
    trainer = make_trainer(run_config(tmp_path))
    share = timesteps.probability_above(0.875, distribution="logit_normal", s=12.0)
    assert trainer.high_share == share
    tosses = [coin(0, step, share, "expert") for step in range(4000)]
    assert sum(tosses) / 4000 == pytest.approx(share, abs=0.02) and sides(trainer, 50) == tosses[:50]
    assert tosses != [coin(0, step, share) for step in range(4000)]


def test_t_of_a_run_has_the_configured_law_whatever_the_processes(tmp_path: Path):
    """Two processes of one micro-batch draw together what one process with two draws."""
    config = run_config(tmp_path)
    one, two = make_trainer(config), make_trainer(config)
    examples = loop.collate([one.data[0]])

    def drawn(trainer: Trainer, step: int, micro: int, rank: int, world: int) -> torch.Tensor:
        micro_index = (step * (2 // world) + micro) * world + rank
        return trainer._batch(examples, loop.generator(0, "noise", micro_index), high=trainer._side(step)).t

    alone = torch.cat([drawn(one, step, micro, 0, 1) for step in range(300) for micro in range(2)])
    together = torch.cat([drawn(two, step, 0, rank, 2) for step in range(300) for rank in range(2)])
    assert torch.equal(alone, together)
    by_step = timesteps.is_high(alone, 0.875).view(300, 2)
    assert torch.equal(by_step[:, 0], by_step[:, 1])
    law = law_of_t(config.objective)
    grid = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98]
    for point in grid:
        assert (alone >= point).float().mean().item() == pytest.approx(timesteps.probability_above(point, **law), abs=0.07)


def write_toml(path: Path, config: Config) -> Path:
    """A configuration as a file: JSON's values are TOML's too."""
    sections = config.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()) for name, values in sections.items()
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_two_processes_draw_one_side_and_train_what_one_process_trains(tmp_path: Path):
    # A small rate: Adam's first steps turn a rounding difference in a tiny gradient into one of the rate's size.
    sections: dict[str, Any] = {"objective": {"ema_decay": 0.9}, "train": {"steps": 3, "lr": 3e-4, "save_every": 0}, "sample": {"every": 0}}
    alone = make_trainer(run_config(tmp_path / "one", **sections))
    assert set(sides(alone, 3)) == {True, False}
    alone.run()
    toml = write_toml(tmp_path / "run.toml", run_config(tmp_path / "two", **sections))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(27000 + os.getpid() % 2000)]
    command = [*launch, str(ROOT / "byg_plugin/train_network.py"), "--config", str(toml)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(names) == 4 and names == sorted(path.name for path in (tmp_path / "two").glob("*.safetensors"))
    for name in names:
        (one, _), (two, _) = (lora_files.read_lora(tmp_path / folder / name) for folder in ("one", "two"))
        assert max((one[key] - two[key]).abs().max().item() for key in one) <= 1e-5, name
        assert max(value.abs().max().item() for key, value in one.items() if "lora_B" in key) > 1e-4, name
    first, second = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert [line["high_noise_step"] for line in first] == [line["high_noise_step"] for line in second]


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path):
    options: dict[str, Any] = {"objective": {"ema_decay": 0.9}}
    whole = make_trainer(run_config(tmp_path / "whole", **options)).run()
    make_trainer(run_config(tmp_path / "parts", **options, train={"steps": 2})).run()
    resumed = make_trainer(run_config(tmp_path / "parts", **options), "latest")
    names = {side: resumed.family.experts[not side] for side in sides(resumed, 2)}
    assert resumed._steps_of == {("edit", name): sides(resumed, 2).count(side) for side, name in names.items()}
    last = resumed.run()
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    for name in sorted(path.name for path in whole.parent.glob("*.safetensors")):
        assert (whole.parent / name).read_bytes() == (last.parent / name).read_bytes() or _same_tensors(
            whole.parent / name, last.parent / name
        )
    assert sorted(path.name for path in last.parent.glob("*.safetensors")) == [
        f"byg_lora{kind}_{side}.safetensors" for kind in ("-ema", "") for side in ("high_noise", "low_noise")
    ]
    assert whole.name == "byg_lora_high_noise.safetensors"
    for path, expert in ((whole, "high_noise"), (whole.with_name("byg_lora_low_noise.safetensors"), "low_noise")):
        _, metadata = lora_files.read_lora(path)
        assert metadata["byg.expert"] == expert and metadata["byg.boundary"] == "0.875" and metadata["byg.family"] == A14B
        assert metadata["byg.frames"] == "5" and metadata["byg.fps"] == "16"


def _same_tensors(a: Path, b: Path) -> bool:
    (first, _), (second, _) = lora_files.read_lora(a), lora_files.read_lora(b)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_other_experts_or_boundary_cannot_be_resumed(tmp_path: Path):
    make_trainer(run_config(tmp_path, train={"steps": 2})).run()
    for change in ({"lora": {"experts": "shared"}}, {"model": {"boundary": 0.9}}):
        with pytest.raises(ValueError, match="lora.experts|model.boundary"):
            make_trainer(run_config(tmp_path, **change), "latest")


def test_a_range_of_t_without_one_expert_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"t_max = 0.8 .*boundary t = 0.875: the high-noise expert would never be trained"):
        make_trainer(run_config(tmp_path, objective={"t_max": 0.8}))
    with pytest.raises(ValueError, match=r"t_min = 0.9 .*the low-noise expert would never be trained"):
        make_trainer(run_config(tmp_path, objective={"t_min": 0.9}))


@pytest.mark.parametrize("experts", ["shared", "low_noise"])
def test_shared_and_lone_experts_train(tmp_path: Path, experts: str):
    sections: dict[str, Any] = {"lora": {"experts": experts}, "train": {"steps": 2}}
    if experts == "low_noise":
        sections["lora"]["other_expert"] = str(make_trainer(run_config(tmp_path / "first", train={"steps": 2})).run())
    trainer = make_trainer(run_config(tmp_path / "out", **sections))
    assert trainer.high_share == (0.0 if experts == "low_noise" else pytest.approx(0.705, abs=1e-3))
    path = trainer.run()
    assert path.is_file() and path.name == ("byg_lora.safetensors" if experts == "shared" else "byg_lora_high_noise.safetensors")
    tensors, card = lora_formats.read_named(path, A14B)
    assert {name.partition(".")[0] for name in tensors} == ({HIGH} if experts == "shared" else {HIGH, LOW})
    assert card.expert == ("both" if experts == "shared" else "high_noise")


@pytest.mark.parametrize("key", ["init_from", "other_expert"])
def test_a_lora_to_start_from_is_read_before_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str):
    def loaded(*args: Any, **options: Any) -> None:
        raise AssertionError("models were loaded first")

    monkeypatch.setattr(loop, "make_host", loaded)
    alone = {"experts": "low_noise"} if key == "other_expert" else {}
    with pytest.raises(ValueError, match="nowhere.safetensors: no such file"):
        make_trainer(run_config(tmp_path, lora={**alone, key: str(tmp_path / "nowhere.safetensors")}))


def test_the_share_of_steps_of_each_expert_is_told_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO"):
        make_trainer(run_config(tmp_path))
    assert "boundary t = 0.875: the high-noise expert trains 70.5 % of the steps, the low-noise expert 29.5 %" in caplog.text


@pytest.mark.parametrize(
    ("lora", "modules"),
    [
        ({}, 40),
        ({"experts": "shared"}, 20),
        ({"experts": "low_noise", "other_expert": "unread.safetensors"}, 20),
    ],
    ids=["separate", "shared", "alone"],
)
def test_dry_run_counts_what_is_trained_at_the_largest_bucket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lora: dict[str, Any], modules: int
):
    config = run_config(tmp_path, lora=lora)
    dry_run(config, make_family(config), CPU)
    said = capsys.readouterr().out
    assert f"rank 4, {modules} modules" in said
    # 2 latent frames of 3 x 2 tokens, noisy and source; dataset.resolution alone would say 40 x 40.
    assert "longest sequence, at 48 x 32, 5 frames: 24 tokens (noisy + source)" in said


def test_the_paired_objective_trains_both_experts_on_clips(tmp_path: Path):
    """A pair of clips: the second is the first one's edit."""
    clip = workspace() / "clip0.mp4"
    lines = [
        {
            "source": str(clip),
            "target": str(workspace() / "clip1.mp4"),
            "src_caption": "photo of a dog",
            "tgt_caption": "photo of a blue",
            "instruction": "make the dog blue",
            "reverse_instruction": "make the blue dog",
        }
    ]
    write_tuples(tmp_path / "pairs.jsonl", lines)
    sections: dict[str, Any] = {
        "dataset": {"resolution": 40, "bucket_step": 16, "tuples": str(tmp_path / "pairs.jsonl"), "cache_dir": str(tmp_path / "cache")},
        "objective": {"name": "paired"},
        "train": {"steps": 6, "global_batch_size": 1},
    }
    config = run_config(tmp_path / "out", **sections)
    cache.cache_latents(config, make_family(config), read_tuples(config.dataset), CPU)
    cache.cache_texts(config, make_family(config), read_tuples(config.dataset), CPU)
    trainer = make_trainer(config)
    before = {name: value.detach().clone() for name, value in trainer.host.parameters.items()}
    trainer.run()
    assert set(sides(trainer, 6)) == {True, False} and all(line["loss"] > 0 for line in curve(tmp_path / "out"))
    moved = {name for name, value in trainer.host.parameters.items() if not torch.equal(value, before[name])}
    assert {name.partition(".")[0] for name in moved} == {HIGH, LOW}


def test_the_ablations_run_on_clips(tmp_path: Path):
    for switch in ({"routing": False}, {"bootstrap": False}, {"cycle": False}, {"directional": False}, {"prior": False}):
        folder = tmp_path / next(iter(switch))
        make_trainer(run_config(folder, T2V, objective=switch, train={"steps": 1, "global_batch_size": 1})).run()
        assert curve(folder)[0]["loss"] > 0


def test_checkpoints_hold_both_experts(tmp_path: Path):
    trainer = make_trainer(run_config(tmp_path, train={"steps": 2}))
    trainer.run()
    state = checkpoint.load(checkpoint.checkpoints(tmp_path / "checkpoints")[-1])
    assert state.adapters["edit"].lora.keys() == trainer.host.parameters.keys() and len(state.adapters["edit"].lora) == 80


# --- previews and editing ---


def test_previews_of_clips_and_images(tmp_path: Path):
    config = run_config(tmp_path, sample={"every": 1, "items": 3, "steps": 3}, train={"steps": 1, "global_batch_size": 1})
    trainer = make_trainer(config)
    wake(trainer.host)
    trainer._preview_if_due()
    folder = tmp_path / "previews" / "step-000000"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000.mp4", "000.png", "001.mp4", "001.png", "002.png"]
    clip = clips.clip_info(folder / "000.mp4")
    width, height = trainer.data.bucket(0)[:2]
    assert clip.frames == 5 and clip.fps == pytest.approx(16) and clip.size == (3 * width + 8, height)
    with Image.open(folder / "000.png") as strip, Image.open(folder / "002.png") as still:
        assert strip.size == (5 * width + 16, 3 * height + 8) and still.size == (3 * width + 8, height)


def test_the_guided_edit_of_a_preview_comes_before_the_edit_at_scale_1(tmp_path: Path):
    def columns(name: str, **scales: float) -> list[np.ndarray]:
        config = run_config(tmp_path / name, sample={"every": 1, "items": 3, "steps": 2, **scales})
        trainer = make_trainer(config)
        wake(trainer.host)
        edits = preview._edits(
            config, trainer.family, trainer.host, preview._inputs(config, trainer.host, trainer.data, config.sample.items)
        )
        (rendered,) = preview.decoded(config.model.dtype, trainer.family, trainer.host, edits[2:])  # the still image: no codec
        return [np.asarray(frames[0]).astype(int) for frames in rendered]

    source, guided, plain = columns("guided")
    other_source, unguided = columns("plain", cfg_high_noise=1.0, cfg_low_noise=1.0)
    assert np.array_equal(source, other_source) and np.array_equal(plain, unguided) and not np.array_equal(guided, unguided)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer = make_trainer(run_config(tmp_path_factory.mktemp("lora") / "out", train={"steps": 1}, conditioning={"position": "bernini"}))
    wake(trainer.host)
    return trainer.run()


def pipeline(lora: Path, **options: Any) -> EditPipeline:
    return EditPipeline.from_lora(lora, model=str(wan_folder()), dtype="float32", device="cpu", **options)


def test_metadata_decide_how_a_clip_is_edited(lora: Path):
    pipe = pipeline(lora.with_name("byg_lora_low_noise.safetensors"))
    assert pipe.config.model.family == A14B and pipe.config.model.boundary == 0.875 and pipe.config.conditioning.position == "bernini"
    assert pipe.config.sample.steps == 40 and (pipe.config.cfg_at(True), pipe.config.cfg_at(False)) == (4.0, 3.0)
    assert pipe.config.dataset.resolution == 632 and pipe.config.lora.experts == "separate"


def test_a_clip_keeps_its_rate_and_guidance_changes_it(lora: Path, tmp_path: Path):
    frames = [Image.new("RGB", (48, 32), (9 * k, 90, 100)) for k in range(11)]
    clips.write_clip(tmp_path / "in.mp4", frames, 25)
    pipe = pipeline(lora, resolution=40)
    source, plain, fps = pipe.clip(tmp_path / "in.mp4", "make the dog blue", steps=3, seed=3)
    assert len(source) == len(plain) == 9 and fps == pytest.approx(25) and source[0].size == plain[0].size == (48, 32)
    again = pipe.clip(tmp_path / "in.mp4", "make the dog blue", steps=3, seed=3)[1]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(plain, again, strict=True))
    alone = pipeline(lora, resolution=40, cfg_high_noise=1.0, cfg_low_noise=1.0)
    assert alone.config.negative is None
    other = alone.clip(tmp_path / "in.mp4", "make the dog blue", steps=3, seed=3, frames=5)[1]
    assert len(other) == 5 and other[0].tobytes() != plain[0].tobytes()
    with pytest.raises(ValueError, match="has 11 frames, 20 are asked for"):
        pipe.clip(tmp_path / "in.mp4", "make the dog blue", frames=20)


def test_the_command_writes_the_edit_and_both_beside_each_other(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = ["--steps", "2", "--resolution", "40", "--frames", "5", "--cfg-high", "1", "--cfg-low", "1", "--out", str(tmp_path / "out")]
    model = ["--model", str(wan_folder()), "--dtype", "float32", "--device", "cpu", "--lora", str(lora)]
    source = ["--source", str(workspace() / "clip0.mp4"), "--instruction", "make the dog blue"]
    monkeypatch.setattr(sys, "argv", ["edit.py", *model, *source, *options])
    edit.main()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip0.mp4", "clip0_side_by_side.mp4", "edits.jsonl"]
    one, both = (clips.clip_info(tmp_path / "out" / name) for name in ("clip0.mp4", "clip0_side_by_side.mp4"))
    assert one.frames == both.frames == 5 and one.fps == pytest.approx(16) and both.size == (2 * one.size[0] + 4, one.size[1])
    import av

    with av.open(str(tmp_path / "out/clip0.mp4")) as container:
        settings = json.loads(container.metadata["comment"])
    assert settings["size"] == [48, 32, 5] and settings["cfg_high_noise"] == 1.0 and settings["instruction"] == "make the dog blue"


def test_frames_are_checked_before_the_first_edit_and_rounding_is_told(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in").mkdir()
    for name, count in (("a.mp4", 11), ("b.mp4", 7)):
        clips.write_clip(tmp_path / "in" / name, [Image.new("RGB", (48, 32), (9 * k, 90, 100)) for k in range(count)], 16)
    options = ["--model", str(wan_folder()), "--dtype", "float32", "--device", "cpu", "--lora", str(lora), "--source", str(tmp_path / "in")]
    options += ["--instruction", "make the dog blue", "--steps", "1", "--resolution", "40", "--cfg-high", "1", "--cfg-low", "1"]

    def call(name: str, *more: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["edit.py", *options, "--out", str(tmp_path / name), *more])
        edit.main()
        return sorted(path.name for path in (tmp_path / name).iterdir() if path.name != "edits.jsonl")

    with pytest.raises(ValueError, match=r"b.mp4: has 7 frames, 9 are asked for"):
        call("refused", "--frames", "9")
    assert list((tmp_path / "refused").iterdir()) == []
    assert call("all") == ["a.mp4", "a_side_by_side.mp4", "b.mp4", "b_side_by_side.mp4"]
    said = capsys.readouterr().err
    assert "a.mp4: 9 of 11 frames are edited, Wan takes 4n + 1" in said and "b.mp4: 5 of 7 frames are edited" in said
    call("five", "--frames", "5")
    assert "frames are edited" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("available", "edited", "asked", "said"),
    [
        (81, 81, None, ""),
        (84, 81, None, "81 of 84 frames are edited, Wan takes 4n + 1"),
        (85, 81, None, "its first 81 of 85 frames are edited; --frames asks for more"),
        (100, 97, 100, "97 of 100 frames are edited, Wan takes 4n + 1"),
        (100, 81, 81, ""),
        (80, 77, None, "77 of 80 frames are edited, Wan takes 4n + 1"),
    ],
)
def test_frames_that_are_not_edited_are_told(capsys: pytest.CaptureFixture[str], available: int, edited: int, asked: int | None, said: str):
    jobs._report_shortened(Path("a.mp4"), available, edited, asked)
    assert capsys.readouterr().err == (f"a.mp4: {said}\n" if said else "")


def test_the_edit_at_scale_1_is_the_third_column_on_request(lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Image.effect_noise((48, 32), 90).convert("RGB").save(tmp_path / "still.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes((tmp_path / "still.png").read_bytes())
    (tmp_path / "in/b.mp4").write_bytes((workspace() / "clip0.mp4").read_bytes())
    options = ["--model", str(wan_folder()), "--dtype", "float32", "--device", "cpu", "--lora", str(lora), "--source", str(tmp_path / "in")]
    options += ["--instruction", "make the dog blue", "--steps", "2", "--resolution", "40", "--frames", "5"]

    def made(name: str, *more: str) -> dict[str, np.ndarray]:
        monkeypatch.setattr(sys, "argv", ["edit.py", *options, "--out", str(tmp_path / name), *more])
        edit.main()
        clip = next(iter(clips.read_clip(tmp_path / name / "b_side_by_side.mp4", 5)))
        pictures = {"a": Image.open(tmp_path / name / "a_side_by_side.png"), "b": clip}
        return {key: np.asarray(picture.convert("RGB")).astype(int) for key, picture in pictures.items()}

    both = made("both", "--show-unguided")
    plain = made("plain", "--cfg-high", "1", "--cfg-low", "1")
    guided = made("guided")
    for key in ("a", "b"):
        width = guided[key].shape[1]
        one = (width - 4) // 2
        assert both[key].shape[1] == width + 4 + one
        # Of a clip the codec's own error, of a picture none.
        near = 0 if key == "a" else 12
        assert np.abs(both[key][:, :width] - guided[key]).mean() <= near
        assert np.abs(both[key][:, -one:] - plain[key][:, -one:]).mean() <= near
    assert np.abs(both["a"][:, 52:100] - both["a"][:, -48:]).mean() > 0  # guidance changes it
    with pytest.raises(ValueError, match="--show-unguided: nothing is guided here"):
        made("refused", "--cfg-high", "1", "--cfg-low", "1", "--show-unguided")


def test_a_wan_lora_on_flux_and_a_clip_for_flux_are_refused(lora: Path, tmp_path: Path):
    from tests.support.tiny import tiny_config

    with pytest.raises(ValueError, match=f"the LoRA was trained for '{A14B}', the base model is 'flux'"):
        EditPipeline.from_lora(lora, config=tiny_config(tmp_path))
