"""musubi-tuner's options, checked against what its parsers took when they were recorded: without the host."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from byg_plugin import families, shipped
from byg_plugin.config.loading import load_config, parse_config
from byg_plugin.config.sections import Config
from byg_plugin.musubi import options as musubi_options
from byg_plugin.musubi import rates as musubi_rates
from byg_plugin.musubi import section as musubi_section
from byg_plugin.musubi.family import musubi_family
from byg_plugin.musubi.options import REFUSED
from byg_plugin.objectives.paired_config import PairedConfig
from tests.support import ROOT
from tests.support.musubi_host import A14B, T2V, host_config, recorded_surface
from tests.support.musubi_images import MASKED, QWEN


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("dit.safetensors", "high.safetensors"):
        save_file({}, tmp_path / name)
    (tmp_path / "dataset.toml").touch()
    return tmp_path


def found(config: Config) -> list[str]:
    return musubi_options.problems(config, recorded_surface(config.model.family))


@pytest.mark.parametrize("family", [T2V, A14B, "flux", *MASKED])
def test_a_good_configuration_has_no_problems(folder: Path, family: str):
    assert found(host_config(folder, family)) == []


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("learning_rat", 1e-3, "did you mean musubi.learning_rate?"),
        ("--gradient-checkpointing", True, "did you mean musubi.gradient_checkpointing?"),
        ("qqqq", 1, "has no such option"),
        ("network_dim", "64", "must be a whole number"),
        ("network_dim", True, "must be a whole number"),
        ("max_grad_norm", "1", "must be a number"),
        ("gradient_checkpointing", 1, "must be true or false"),
        ("network_args", "include_patterns=x", "must be a list"),
        ("network_args", 5, "must be a list"),
        ("network_args", True, "must be a list"),
        ("optimizer_args", [True], "must be a text"),
        ("mixed_precision", "bf-16", "did you mean 'bf16'?"),
        ("save_precision", "fp64", "must be one of 'float', 'fp32', 'fp16', 'bf16'"),
        ("dit", {"a": 1}, "must be a text"),
        ("vae", ["a"], "must be a text"),
        ("dit", "nowhere.safetensors", "no such file"),
        ("flash_attn", True, "exactly one of"),
        ("fp8_scaled", True, "needs musubi.fp8_base"),
        ("block_swap_h2d_only", True, "musubi.gradient_checkpointing = true"),
        ("gradient_checkpointing_cpu_offload", True, "does nothing without"),
        ("sample_every_n_steps", 5, "needs musubi.sample_prompts"),
        ("dit_high_noise", "x", "has one network"),
        ("network_dim", 0, "must be above 0"),
        ("max_train_steps", 0, "must be above 0"),
        ("blocks_to_swap", -1, "must not be negative"),
        ("optimizer_type", "AdmW", "did you mean 'AdamW'?"),
        ("lr_scheduler", "cosin", "did you mean 'cosine'?"),
        ("save_every_n_steps", 0, "the host divides by it"),
        ("sample_every_n_epochs", 0, "the host divides by it"),
        ("blocks_to_swap", 30, "has no more than 29 to swap"),
        ("learning_rate", float("nan"), "must be finite"),
        ("persistent_data_loader_workers", True, "set musubi.max_data_loader_n_workers above 0"),
        ("sample_prompts", "prompts.txt", "needs musubi.vae = None"),
        ("sample_prompts", "prompts.txt", "needs musubi.t5 = None"),
        ("max_data_loader_n_workers", 10**6, "must not be above 256"),
        ("gradient_accumulation_steps", 10**12, "must not be above 100,000"),
        ("max_train_epochs", 10**12, "must not be above 1,000,000"),
        ("save_every_n_steps", 10**30, "must not be above 9.22337e+18"),
        ("max_grad_norm", 1e39, "must not be above 3.4e+38"),
        pytest.param("max_grad_norm", 10**400, "must not be above 9.22337e+18", id="400 digits"),
        pytest.param("blocks_to_swap", 16**6000, "must not be above 9.22337e+18", id="7000 digits"),
        ("dit", "C:\temp", "single quotes"),
        ("dit", "a\0b", "control character"),
        ("vae", "a" * 300, "more than 255 bytes"),
        ("lr_warmup_steps", 5, "set musubi.lr_scheduler = 'constant_with_warmup'"),
    ],
)
def test_what_is_wrong_is_told(folder: Path, key: str, value: Any, says: str):
    lines = found(host_config(folder, T2V, musubi={key: value}))
    assert any(says in line and key in line for line in lines), lines


def test_other_models_of_qwen_image_are_refused(folder: Path):
    lines = found(host_config(folder, QWEN, musubi={"model_version": "edit", "edit": True, "remove_first_image_from_target": True}))
    assert len(lines) == 3 and all("model.family decides it" in line for line in lines)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_what_cannot_be_honoured_is_refused_with_a_remedy(folder: Path, key: str):
    option = recorded_surface(T2V).get(key)
    assert option is not None, "the host has no such option any more: take it out of REFUSED"
    value: Any = True if option.kind == "flag" else option.choices[0] if option.choices else 1 if option.kind in ("int", "float") else "x"
    lines = found(host_config(folder, T2V, musubi={key: [value] if option.many else value}))
    assert any(line.startswith(f"musubi.{key} = ") and "cannot be honoured" in line for line in lines)


@pytest.mark.parametrize("key", ["dit", "dataset_config", "network_dim", "learning_rate", "optimizer_type", "sdpa", "dit_high_noise"])
def test_what_is_needed_is_named(folder: Path, key: str):
    config = host_config(folder, A14B)
    left = {name: value for name, value in config.musubi.items() if name != key}
    assert any(f"musubi.{key}" in line for line in found(config.model_copy(update={"musubi": left})))


@pytest.mark.parametrize(
    "good",
    [
        {"optimizer_type": "adamw"},
        {"optimizer_type": "Muon"},
        {"optimizer_type": "Adafactor", "lr_scheduler": "adafactor:1e-3"},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 5},
        {"lr_scheduler": "rex"},
    ],
    ids=str,
)
def test_names_that_the_host_knows_pass(folder: Path, good: dict[str, Any]):
    assert found(host_config(folder, T2V, musubi=good)) == []


def test_8_bit_moments_need_their_package(folder: Path, monkeypatch: pytest.MonkeyPatch):
    config = host_config(folder, T2V, musubi={"optimizer_type": "AdamW8bit"})
    monkeypatch.setattr(musubi_rates, "find_spec", lambda package: None)
    assert any("needs bitsandbytes" in line for line in found(config))
    monkeypatch.setattr(musubi_rates, "find_spec", lambda package: object())
    assert found(config) == []


@pytest.mark.parametrize("boundary", [0, 1, 1000, 2000])
def test_a_boundary_leaves_work_to_both_experts(folder: Path, boundary: int):
    (line,) = found(host_config(folder, A14B, musubi={"timestep_boundary": boundary}))
    assert line.startswith(f"musubi.timestep_boundary = {boundary}: ") and line.endswith("the checkpoint's own, 875")
    for good in (2, 900, 999):
        assert found(host_config(folder, A14B, musubi={"timestep_boundary": good})) == []


def test_swapped_blocks_exclude_an_offloaded_expert(folder: Path):
    lines = found(host_config(folder, A14B, musubi={"blocks_to_swap": 1, "offload_inactive_dit": True}))
    assert any("exclude each other" in line for line in lines)


def test_streamed_blocks_exclude_two_experts(folder: Path):
    options = {"blocks_to_swap": 2, "block_swap_h2d_only": True, "gradient_checkpointing": True}
    assert any("keeps the first expert's weights" in line for line in found(host_config(folder, A14B, musubi=options)))
    assert found(host_config(folder, T2V, musubi=options)) == []


def test_an_8_bit_t5_excludes_previews_of_flux(folder: Path):
    path = str(folder / "dataset.toml")
    options = {"fp8_t5": True, **dict.fromkeys(("sample_prompts", "vae", "t5", "text_encoder1", "text_encoder2"), path)}
    wan = {name: value for name, value in options.items() if not name.startswith("text_encoder")}
    assert any("musubi.fp8_t5 stops" in line for line in found(host_config(folder, "flux", musubi=options)))
    assert found(host_config(folder, T2V, musubi=wan)) == [] == found(host_config(folder, "flux", musubi={"fp8_t5": True}))


@pytest.mark.parametrize(
    ("dtype", "options", "says"),
    [
        (torch.float16, {"mixed_precision": "bf16"}, "is in fp16, and the host needs the same: set 'fp16'"),
        (torch.bfloat16, {}, "musubi.mixed_precision = None: .* set 'bf16'"),
        (torch.float8_e4m3fn, {"mixed_precision": "bf16", "fp8_scaled": True}, "is in 8 bit already"),
    ],
)
def test_the_precision_is_that_of_the_file(folder: Path, dtype: torch.dtype, options: dict[str, Any], says: str):
    path = folder / "dit.safetensors"
    given = {"dit": str(path), **options}
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        musubi_options.check_precision(given)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no Wan DiT"):
        musubi_options.check_precision(given)
    key = "model.diffusion_model.blocks.0.cross_attn.k.weight"
    save_file({key: torch.zeros(2, 2).to(dtype)}, path)
    with pytest.raises(ValueError, match=says):
        musubi_options.check_precision(given)
    musubi_options.check_precision(given | {"mixed_precision": "fp16" if dtype == torch.float16 else "bf16", "fp8_scaled": False})
    save_file({key: torch.zeros(2, 2)}, path)
    musubi_options.check_precision(given)


@pytest.mark.parametrize(
    ("family", "names"), [("flux", ["dit", "vae", "text_encoder1", "text_encoder2"]), (A14B, ["dit_high_noise", "t5"])]
)
def test_damaged_files_are_told_before_the_host_reads_them(folder: Path, family: str, names: list[str]):
    bad = folder / "bad.safetensors"
    bad.write_bytes(b"junk" * 100)
    for name in names:
        (line,) = found(host_config(folder, family, musubi={name: str(bad)}))
        assert line.startswith(f"musubi.{name} = {str(bad)!r}: bad.safetensors is not a readable safetensors file (")
    pickled = bad.rename(folder / "bad.pth")
    assert len(found(host_config(folder, family, musubi=dict.fromkeys(names, str(pickled))))) == 1, "the DiT alone is no pickle"


def test_all_parts_of_a_split_file_are_looked_at(folder: Path):
    for index in (1, 2):
        save_file({}, folder / f"dit-0000{index}-of-00003.safetensors")
    config = host_config(folder, "flux", musubi={"dit": str(folder / "dit-00001-of-00003.safetensors")})
    assert "dit-00003-of-00003.safetensors is not beside it" in found(config)[0]
    (folder / "dit-00003-of-00003.safetensors").touch()
    assert "dit-00003-of-00003.safetensors is not a readable" in found(config)[0]
    save_file({}, folder / "dit-00003-of-00003.safetensors")
    assert found(config) == []


def test_every_problem_is_in_one_message(folder: Path):
    parser = argparse.ArgumentParser()
    parser.add_argument("--dit", type=str)
    with pytest.raises(ValueError, match=r"(?s)unknown key musubi\.network_dim.*unknown key musubi\.sdpa"):
        musubi_options.arguments(host_config(folder, T2V), parser)


def test_arguments_are_what_the_hosts_entry_point_makes(folder: Path):
    parser = argparse.ArgumentParser()
    for name, option in recorded_surface(T2V).items():
        if option.kind == "flag":
            parser.add_argument(f"--{name}", action="store_true")
        else:
            kind = {"int": int, "float": float, "path": Path, "other": lambda text: int(text) if text.isdigit() else float(text)}.get(
                option.kind, str
            )
            parser.add_argument(f"--{name}", type=kind, nargs="*" if option.many else None, choices=option.choices)
    config = host_config(
        folder,
        A14B,
        musubi={"seed": 7, "learning_rate": 1, "lr_warmup_steps": 3, "lr_scheduler": "rex", "network_args": ["rank_dropout=0.1"]},
    )
    args = musubi_options.arguments(config, parser)
    assert (args.task, args.network_module, args.seed, args.vae_dtype) == ("t2v-A14B", "networks.lora_wan", 7, "bfloat16")
    assert args.learning_rate == 1.0 and isinstance(args.learning_rate, float)
    assert isinstance(args.dataset_config, Path) and args.lr_warmup_steps == 3 and args.network_args == ["rank_dropout=0.1"]
    assert args.gradient_checkpointing is False and args.sdpa is True
    assert musubi_options.arguments(host_config(folder, T2V), parser).seed == 0, "without one the host gives each rank its own"
    with pytest.raises(ValueError, match="musubi.lr_warmup_steps = 'a tenth'"):
        musubi_options.arguments(host_config(folder, T2V, musubi={"lr_warmup_steps": "a tenth", "lr_scheduler": "rex"}), parser)


# --- our own sections on this host ---


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("train", "steps", 5, "set musubi.max_train_steps"),
        ("lora", "rank", 5, "set musubi.network_dim"),
        ("output", "dir", "x", "set musubi.output_dir"),
        ("sample", "steps", 5, "leave it out"),
        ("model", "transformer", "x", "set musubi.dit"),
        ("dataset", "resolution", 512, "set musubi.dataset_config"),
        ("lora", "rnak", 5, "did you mean lora.rank?"),
        ("conditioning", "position", "bernini", "model.host = 'diffusers'"),
        ("objective", "rollout_weights", "merged", "set it to 'swap'"),
        ("model", "family", "wan2.2-ti2v-5b", "not trained in musubi-tuner by this package"),
    ],
)
def test_what_the_host_decides_is_not_said_twice(folder: Path, section: str, key: str, value: Any, says: str):
    with pytest.raises(ValueError, match=says):
        host_config(folder, T2V, **{section: {key: value}})


def test_pairs_are_left_to_the_host(folder: Path):
    raw = host_config(folder, T2V).model_dump(exclude={"objective", "dataset", "lora", "train", "sample", "evaluate", "output"})
    raw["model"] = {key: raw["model"][key] for key in ("family", "host", "device")}
    with pytest.raises(ValueError, match="only 'unpaired_cycle'"):
        parse_config(raw | {"objective": {"name": "paired"}, "dataset": {"tuples": "x"}})


def test_one_graph_is_refused_with_swapped_blocks(folder: Path):
    with pytest.raises(ValueError, match="objective.graph = 'sequential'"):
        host_config(folder, T2V, objective={"graph": "joint"}, musubi={"blocks_to_swap": 2})


def test_what_goes_by_the_type_of_an_edit_is_refused(folder: Path):
    for key, value in (("critique_types", ["remove"]), ("prior_guidance", {"remove": 3.0})):
        with pytest.raises(ValueError, match=rf"objective.{key} .* leave it out"):
            musubi_section.check(host_config(folder, "flux", objective={key: value}))


def test_dropout_is_refused_where_a_pass_is_made_twice(folder: Path):
    routing = {"routing": False}
    for given in ({"network_dropout": 0.1}, {"network_args": ["rank_dropout=0.1"]}, {"network_args": ["x=1", "module_dropout=0.05"]}):
        with pytest.raises(ValueError, match=r"musubi: (network_dropout|(rank|module)_dropout=0.*): with objective.routing = false"):
            musubi_section.check(host_config(folder, "flux", objective=routing, musubi=given))
        musubi_section.check(host_config(folder, "flux", musubi=given))
    for none in ({"network_dropout": 0.0}, {"network_args": ["rank_dropout=0", "module_dropout=0.0"]}):
        musubi_section.check(host_config(folder, "flux", objective=routing, musubi=none))


def test_another_objective_needs_none_of_the_keys_of_the_first(folder: Path):
    class Other(PairedConfig):
        on_musubi: ClassVar[bool] = True

    config = host_config(folder, T2V, musubi={"blocks_to_swap": 2})
    musubi_section.check(config.model_copy(update={"objective": Other()}))


def test_the_hosts_options_fill_our_sections(folder: Path):
    config = host_config(folder, A14B, musubi={"seed": 3})
    assert (config.train.steps, config.train.seed, config.lora.rank, config.lora.experts) == (4, 3, 4, "shared")
    assert (config.output.dir, config.output.name) == (str(folder / "out"), "tiny")


def test_the_users_folder_is_meant_in_paths(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    given = {"dit": "~/dit.safetensors", "dataset_config": "~/dataset.toml", "output_dir": "~/out", "logging_dir": "~/logs"}
    config = host_config(folder, "flux", musubi={**given, "metadata_title": "~tiny"})
    assert found(config) == []
    assert {name: config.musubi[name] for name in given} == {name: str(folder / value[2:]) for name, value in given.items()}
    assert (config.output.dir, config.musubi["metadata_title"]) == (str(folder / "out"), "~tiny")


def test_every_path_of_the_hosts_is_one_that_it_has():
    known = set().union(*(recorded_surface(family) for family in (A14B, "flux", *MASKED)))
    assert set(musubi_section.PATHS) <= known


def test_its_section_needs_the_host():
    with pytest.raises(ValueError, match="model.host is not 'musubi'"):
        parse_config({"model": {}, "musubi": {"dit": "x"}})
    with pytest.raises(ValueError, match="model.host_path is musubi-tuner's folder"):
        parse_config(
            {"model": {"host_path": "x"}, "dataset": {"tuples": "", "cache_dir": ""}, "train": {"steps": 1}, "output": {"dir": "x"}}
        )


@pytest.mark.parametrize(
    "name", ["musubi_flux", "musubi_krea2", "musubi_qwen_image", "musubi_z_image", "musubi_wan22", "musubi_wan22_24gb"]
)
def test_recipes_name_options_that_the_host_has(name: str):
    config = load_config(ROOT / "configs" / f"{name}.toml")
    wrong = [line for line in found(config) if not line.endswith("no such file") and "bitsandbytes" not in line]
    assert not wrong and len(found(config)) >= 2
    if not families.named(config.model.family).has_experts:  # Wan's check reads its DiT
        musubi_family(config.model.family).check(config.musubi)


# --- a host that is not there ---


def test_a_missing_host_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from byg_plugin.musubi import host as musubi

    config = host_config(folder, T2V)
    model = config.model.model_copy(update={"host_path": str(folder)})
    with pytest.raises(ValueError, match="no checkout of musubi-tuner there"):
        musubi.open_checkout(model)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="set model.host_path"):
        musubi.open_checkout(model.model_copy(update={"host_path": None}))


def test_clips_are_not_edited_with_the_diffusers_that_the_host_pins(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from byg_plugin.config import extras

    monkeypatch.setattr(extras, "version", lambda package: "0.32.1")
    extras.require_model_extras(host_config(folder, "flux").model)
    with pytest.raises(ValueError, match="needs diffusers 0.35 or later, and this is 0.32.1"):
        extras.require_model_extras(host_config(folder, T2V).model)


def test_engines_that_step_inside_backward_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from byg_plugin.musubi import host as musubi

    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(ValueError, match="run plain multi-GPU"):
        musubi.prepare(host_config(folder, T2V))
    monkeypatch.delenv("ACCELERATE_USE_MEGATRON_LM")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="set musubi.compile"):
        musubi.prepare(host_config(folder, T2V))


def test_the_patch_of_imports_is_guarded_and_undone(monkeypatch: pytest.MonkeyPatch):
    import torch

    patches, asked = shipped.module("patches.musubi"), torch.cuda.current_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with patches.imports_without_cuda():
        assert torch.cuda.current_device is asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="inside"), patches.imports_without_cuda():
        assert torch.cuda.current_device() == 0
        raise RuntimeError("inside")
    assert torch.cuda.current_device is asked


def test_held_out_tuples_are_not_trained_on(folder: Path):
    from PIL import Image

    from byg_plugin.musubi import host as musubi

    lines = []
    for name, more in (("a", {}), ("b", {"split": "validation"})):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
        texts = {"src_caption": "a red car", "tgt_caption": "a blue car", "instruction": "make the car blue"}
        lines.append(json.dumps({"source": f"{name}.png", **texts, "reverse_instruction": "make the car red", **more}))
    (folder / "tuples.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert [item.source.stem for item in musubi.training_tuples(host_config(folder, T2V).dataset)] == ["a"]


def test_a_latent_cache_is_the_hosts(folder: Path):
    from byg_plugin import caching as run_cache

    (folder / "run.toml").write_text('[model]\nfamily = "wan2.1-t2v-1.3b"\nhost = "musubi"\n[dataset]\ntuples = "x"\n', encoding="utf-8")
    with pytest.raises(ValueError, match="host's own wan_cache_latents.py"):
        run_cache.run("latents", str(folder / "run.toml"), [], prune=False)
