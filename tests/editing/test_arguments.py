"""What edit.py is told and could not honour is an error that names the option, before anything heavy is imported or loaded."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from byg_plugin import EditPipeline, edit
from byg_plugin.config.sections import DatasetConfig
from byg_plugin.editing.jobs import Job, check_arguments, jobs_of

METADATA = {"byg.position": "same", "byg.guidance": "3.5", "byg.max_text_tokens": "8", "byg.resolution": "64", "byg.schedule": "shifted"}


def lora_file(folder: Path, family: str, **metadata: str) -> Path:
    layer = "transformer.transformer_blocks.0.attn.to_q" if family == "flux" else "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{layer}.lora_A.weight": torch.zeros(4, 32), f"{layer}.lora_B.weight": torch.zeros(32, 4)}
    save_file(tensors, folder / "l.safetensors", {**METADATA, "byg.family": family, **metadata})
    return folder / "l.safetensors"


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("wan2.1-t2v-1.3b", {"guidance": 2.0}, r"guidance \(--guidance\) = 2.0: not for wan2.1-t2v-1.3b, .*cfg_high_noise \(--cfg-high\)"),
        ("wan2.1-t2v-1.3b", {"cfg_low_noise": 2.0}, r"cfg_low_noise \(--cfg-low\) = 2.0: not for wan2.1-t2v-1.3b"),
        ("wan2.2-t2v-a14b", {"guidance": 0.0}, r"guidance \(--guidance\) = 0.0: not for .* and cfg_low_noise \(--cfg-low\)"),
        ("flux", {"cfg_high_noise": 2.0}, r"cfg_high_noise \(--cfg-high\) = 2.0: not for flux, .*guidance \(--guidance\)"),
        ("flux", {"cfg_low_noise": 1.0}, r"cfg_low_noise \(--cfg-low\) = 1.0: not for flux"),
        ("flux", {"negative": ""}, r"negative \(--negative\) = '': not for flux"),
        ("flux", {"solver": "unipc"}, r"solver \(--solver\) = 'unipc': not for flux"),
        ("flux", {"solver": "unipc_diffusers"}, r"solver \(--solver\) = 'unipc_diffusers': not for flux"),
        ("wan2.1-t2v-1.3b", {"negative": "blur", "cfg_high_noise": 1.0}, r"negative \(--negative\) is not used at guidance 1"),
    ],
)
def test_what_a_family_has_no_use_for(tmp_path: Path, family: str, options: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        EditPipeline.from_lora(lora_file(tmp_path, family), model="nowhere", **options)


def test_guidance_in_a_wan_loras_metadata_is_of_no_use_and_no_error(tmp_path: Path):
    path = lora_file(tmp_path, "wan2.1-t2v-1.3b", **{"byg.guidance": "7.0"})
    pipe = EditPipeline.from_lora(path, model="nowhere", device="cpu", cfg_high_noise=2.0, negative="blur", solver="euler")
    assert (pipe.config.cfg_at(True), pipe.config.negative, pipe.config.sample.solver) == (2.0, "blur", "euler")


@pytest.mark.parametrize(
    ("key", "value"), [("guidance", "nan"), ("guidance", "1e400"), ("resolution", "0"), ("max_text_tokens", "-4"), ("position", "x")]
)
def test_values_of_metadata_that_no_option_has_are_told_with_the_file(tmp_path: Path, key: str, value: str):
    with pytest.raises(ValueError, match=rf"l\.safetensors \(its metadata byg\.\*\)(.|\n)*\.{key} = "):
        EditPipeline.from_lora(lora_file(tmp_path, "flux", **{f"byg.{key}": value}), model="nowhere")


def jobs(*names: str) -> list[Job]:
    return [Job(source=Path(name), instruction="add", name=Path(name).stem) for name in names]


@pytest.mark.parametrize("folder", [True, False])
def test_rules_for_training_forbid_an_edit_only_where_a_configuration_says_so(tmp_path: Path, folder: bool):
    (tmp_path / "a.png").touch()
    same = {"src_caption": "a house", "tgt_caption": "a house", "instruction": "add", "reverse_instruction": "remove"}
    file = tmp_path / ("a.json" if folder else "t.jsonl")
    file.write_text(json.dumps(same if folder else {"source": "a.png", **same}), encoding="utf-8")
    place = tmp_path if folder else file
    args = Namespace(tuples=str(place), source=None, instruction=None)
    forbidding, taking = (DatasetConfig(tuples="t", cache_dir="c", rules=rules) for rules in ("error", "warn"))
    assert [job.instruction for dataset in (None, taking) for job in jobs_of(args, dataset)] == ["add", "add"]
    with pytest.raises(ValueError, match='caption must differ(.|\n)*dataset.rules = "warn"'):
        jobs_of(args, forbidding)


def arguments(folder: Path, *words: str) -> Namespace:
    (folder / "l.safetensors").touch()
    return edit._parser().parse_args(["--lora", str(folder / "l.safetensors"), "--model", "m", *words])


@pytest.mark.parametrize(
    ("words", "sources", "says"),
    [
        (["--frames", "5"], ["a.png", "b.jpg"], "--frames 5 is for clips, and there is none"),
        (["--batch-size", "4"], ["a.mp4"], "--batch-size 4 is for images"),
        (["--seed", str(2**63 - 2)], ["a.png", "b.png", "c.png"], "--seed 9223372036854775806: edit i uses seed"),
    ],
)
def test_what_has_no_effect_on_these_sources_or_stops_late(tmp_path: Path, words: list[str], sources: list[str], says: str):
    with pytest.raises(ValueError, match=says):
        check_arguments(arguments(tmp_path, *words), jobs(*sources))


def test_what_has_an_effect_on_some_of_the_sources_passes(tmp_path: Path):
    args = arguments(tmp_path, "--frames", "5", "--batch-size", "4", "--seed", str(2**63 - 2))
    check_arguments(args, jobs("a.png", "b.mp4"))


def test_a_missing_lora_is_told_without_reading_anything(tmp_path: Path):
    args = arguments(tmp_path)
    args.lora = str(tmp_path / "byg.safetensors")
    with pytest.raises(ValueError, match=r"--lora .*byg\.safetensors: no such file"):
        check_arguments(args, jobs("a.png"))
    (tmp_path / "byg_low_noise.safetensors").touch()  # of a pair either file, or the common name
    check_arguments(args, jobs("a.png"))


def test_edit_needs_a_base_model(tmp_path: Path):
    args = arguments(tmp_path)
    args.model = None
    with pytest.raises(ValueError, match="--model FOLDER_OR_HUB_ID, or --config"):
        check_arguments(args, jobs("a.png"))


@pytest.mark.parametrize(
    ("override", "option", "says"),
    [
        ("conditioning.guidance=7.0", [], "--set conditioning.guidance=7.0: .* use 3.5; give --guidance 7.0"),
        ("dataset.resolution = 128", [], "use 64; give --resolution 128"),
        ("sample.schedule=uniform", [], "use 'shifted'; give --schedule uniform"),
        ("conditioning.guidance=3.5", [], None),
        ("conditioning.guidance=7.0", ["--guidance", "5"], None),
        ("sample.steps=7", [], None),
        ("conditioning.position=kontext", [], "use the LoRA.s own value, .same.; leave it out"),
        ("conditioning.max_text_tokens=16", [], "use the LoRA.s own value, 8; leave it out"),
        ("conditioning.max_text_tokens=8", [], None),
    ],
)
def test_an_override_that_the_lora_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, option: list[str], says: str | None
):
    said = overridden(monkeypatch, tmp_path, "flux", lora_file(tmp_path, "flux"), override, *option)
    # Without a complaint about the override the next thing that is wrong is told: there is no model, or no picture.
    assert re.search(says or "config.json|a.png", said) and (says is None) != ("--set" in said)


def overridden(monkeypatch: pytest.MonkeyPatch, folder: Path, family: str, lora: Path, override: str, *more: str) -> str:
    """What edit.py says of `--set` beside a LoRA."""
    toml, model = folder / "c.toml", f'model = {{path = ".", family = "{family}"}}'
    toml.write_text(f'{model}\ndataset = {{tuples = "t", cache_dir = "c"}}\ntrain.steps = 1\noutput.dir = "o"', encoding="utf-8")
    (folder / "a.png").touch()
    words = ["--config", toml, "--set", override, "--lora", lora, "--source", folder / "a.png", "--instruction", "add", *more]
    monkeypatch.setattr(sys, "argv", ["edit.py", *map(str, words), "--out", str(folder / "o")])
    with pytest.raises(ValueError) as caught:
        edit.main()
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("sample.steps=7", "and use 4; give --steps 7"),
        ("sample.solver=euler", "and use 'stochastic'; give --solver euler"),
        ("sample.cfg_high_noise=3", "and use the LoRA's own value, 1.0; leave it out"),
        ("sample.negative=blur", "and use the LoRA's own value, None; leave it out"),
    ],
)
def test_an_override_that_a_few_step_lora_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, says: str):
    family = "wan2.1-t2v-1.3b"
    lora = lora_file(tmp_path, family, **{"byg.sampler": "stochastic", "byg.steps": "4"})
    assert says in overridden(monkeypatch, tmp_path, family, lora, override)
    assert "--set" not in overridden(monkeypatch, tmp_path, family, lora_file(tmp_path, family), override), "of a LoRA of any steps"


def test_an_override_of_the_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    family = "wan2.2-t2v-a14b"
    lora = lora_file(tmp_path, family, **{"byg.boundary": "0.75"})
    assert "use the LoRA's own value, 0.75; leave it out" in overridden(monkeypatch, tmp_path, family, lora, "model.boundary=0.5")
