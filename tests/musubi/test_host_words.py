"""Options that only the host reads, and only once the DiT is loaded: kind of network, optimizer, schedule, trackers, and their words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from byg_plugin.musubi import options as musubi_options
from byg_plugin.musubi import rates as musubi_rates
from tests.support.musubi_host import T2V, host_config, recorded_surface
from tests.support.musubi_images import KLEIN, KREA2


def found(folder: Path, options: dict[str, Any], family: str = "flux") -> list[str]:
    save_file({}, folder / "dit.safetensors")
    (folder / "dataset.toml").touch()
    return musubi_options.problems(host_config(folder, family, musubi=options), recorded_surface(family))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"network_module": "networks.lora_fluxx"}, "did you mean 'networks.lora_flux'?"),
        ({"network_module": "networks.lora_wan"}, "it is another family's, and would find no layer in flux: leave it out"),
        ({"network_module": "networks.lora"}, "no kind of network for flux"),
        ({"network_module": "no.such_module"}, "no such module here; leave it out"),
        ({"network_args": ["rank_dropout"]}, "'rank_dropout': must be key=value"),
        ({"network_args": ['exclude_patterns=["(?<=a)b"]']}, r"write \x3d for = inside quotes of the value"),
        ({"network_args": ["rank_dropout=abc"]}, "rank_dropout=abc: must be a number from 0 to below 1"),
        ({"network_args": ["rank_dropout=1"]}, "must be a number from 0 to below 1"),
        ({"network_args": ["module_dropout=nan"]}, "must be a number from 0 to below 1"),
        ({"network_args": ["exclude_pattern=['.*']"]}, "ignore it in silence; did you mean exclude_patterns?"),
        ({"network_args": ["exclude_patterns=.*"]}, "must be a list of texts"),
        ({"network_args": ["include_patterns=['(']"]}, "'(' is not a regular expression"),
        ({"network_args": ["factor=4"]}, "would ignore it in silence"),
        ({"network_args": ["factor=a"], "network_module": "networks.lokr"}, "must be a whole number"),
        ({"network_args": ["loraplus_lr_ratio=0"]}, "must be a number above 0"),
        ({"network_dropout": 1.0}, "must be below 1"),
        ({"optimizer_args": ["weight_decay"]}, "musubi.optimizer_args: 'weight_decay': must be key=value"),
        ({"optimizer_args": ["weight_decy=0.1"]}, "unexpected keyword argument 'weight_decy'"),
        ({"optimizer_args": ["betas=0.9,abc"]}, "betas=0.9,abc: no literal of Python"),
        ({"optimizer_args": ["weight_decay=-1"]}, "Invalid weight_decay value: -1: change it or leave it out"),
        ({"optimizer_args": ["weight_decay=-1"], "optimizer_type": "torch.optim.Adam"}, "Invalid weight_decay value"),
        ({"optimizer_args": ["decay=0.1"], "optimizer_type": "Adafactor"}, "unexpected keyword argument 'decay'"),
        ({"optimizer_type": "Optimizer"}, "it is what the others are made of"),
        ({"optimizer_type": "LBFGS"}, "evaluates the loss several times"),
        ({"optimizer_type": "SparseAdam"}, "is for sparse gradients"),
        ({"optimizer_type": "some.library.Prodigy"}, "no module some.library here: install it"),
        ({"optimizer_type": "tests.support.Prodigy"}, "tests.support has no Prodigy"),
        ({"lr_scheduler": "adafactor"}, "is for musubi.optimizer_type = 'Adafactor'"),
        (
            {"lr_scheduler": "adafactor", "optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False"]},
            "needs a first rate after a colon",
        ),
        ({"optimizer_type": "Adafactor", "lr_warmup_steps": 5, "lr_scheduler": "linear"}, "Adafactor's own schedule has none"),
        ({"lr_scheduler": "piecewise_constant"}, "'step_rules': change it or leave it out; musubi.lr_scheduler_args = "),
        ({"lr_scheduler": "cosine_with_min_lr"}, "set musubi.lr_scheduler_min_lr_ratio"),
        ({"lr_scheduler": "reduce_lr_on_plateau"}, "musubi.lr_scheduler = 'reduce_lr_on_plateau': "),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ["foo"]}, "musubi.lr_scheduler_args: 'foo': must be key=value"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": ["foo=1"]}, "unexpected keyword argument 'foo'"),
        ({"lr_scheduler": "rex", "lr_scheduler_args": ["foo=1"]}, "no such argument: foo"),
        ({"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 1, "lr_scheduler_args": ["last_epoch=10"]}, "initial_lr"),
        ({"lr_scheduler_type": "Foo"}, "musubi.lr_scheduler_type = 'Foo': unknown"),
        ({"lr_scheduler_type": "CosineAnnealingLR"}, "'T_max'"),
        ({"lr_scheduler_type": "ReduceLROnPlateau"}, "'metrics'"),
        ({"lr_scheduler_type": "some.library.Schedule"}, "no module some.library here"),
        ({"log_with": "tensorboard"}, "needs musubi.logging_dir"),
        ({"log_tracker_config": "nowhere.toml"}, "no such file"),
        ({"vae_dtype": "foo"}, "musubi.vae_dtype = 'foo': must be one of 'bf16', "),
    ],
    ids=str,
)
def test_what_the_host_would_stop_at_late_is_told(tmp_path: Path, options: dict[str, Any], says: str):
    lines = found(tmp_path, options)
    assert len(lines) == 1 and says in lines[0], lines
    assert lines[0].startswith("musubi.")


@pytest.mark.parametrize(
    "options",
    [
        {"network_module": "musubi_tuner.networks.lora_flux"},
        {"network_module": "networks.loha"},
        {"network_module": "networks.lora_krea2"},  # of every linear
        {"network_module": "networks.lokr", "network_args": ["factor=8"]},
        {"network_module": "tests.support", "network_args": ["anything=1"]},
        {"network_args": [r'exclude_patterns=["(?<\x3da)b"]', "include_patterns=[]", "verbose=True", "module_dropout=0"]},
        {"optimizer_type": "AdamW", "optimizer_args": ["betas=(0.9, 0.99)", "weight_decay=0.1"]},
        {"optimizer_type": "torch.optim.Muon", "optimizer_args": ["adjust_lr_fn='match_rms_adamw'"]},
        {"optimizer_type": "Adafactor"},
        {
            "optimizer_type": "Adafactor",
            "lr_scheduler": "constant_with_warmup",
            "optimizer_args": ["relative_step=False"],
            "lr_warmup_steps": 1,
        },
        {"lr_scheduler": "linear", "lr_warmup_steps": 0.1},
        {"lr_scheduler": "linear", "lr_warmup_steps": "10%"},
        {"lr_scheduler": "cosine", "lr_warmup_steps": 100},
        {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2},
        {"lr_scheduler": "polynomial", "lr_scheduler_power": 2},
        {"lr_scheduler": "inverse_sqrt"},
        {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1},
        {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 1},
        {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": ["step_rules='1:100,0.1'"]},
        {"lr_scheduler": "rex", "lr_scheduler_args": ["rex_alpha=0.2"]},
        {"lr_scheduler": "rex", "lr_warmup_steps": 2000, "max_train_epochs": 100},
        {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": ["T_max=100"]},
        {"lr_scheduler_type": "torch.optim.lr_scheduler.OneCycleLR", "lr_scheduler_args": ["max_lr=0.1", "total_steps=9"]},
        {"log_with": "tensorboard", "logging_dir": "logs"},
        {"logging_dir": "logs"},
        {"vae_dtype": "fp32"},
        {"vae_dtype": "e5m2fnuz"},
    ],
    ids=str,
)
def test_what_works_there_passes(tmp_path: Path, options: dict[str, Any]):
    assert found(tmp_path, options) == []


def test_kinds_go_by_the_family(tmp_path: Path):
    assert found(tmp_path, {"network_module": "networks.lora_flux"}, KLEIN) == []
    assert "another family's" in found(tmp_path, {"network_module": "networks.lora_flux"}, T2V)[0]
    for kind in ("networks.loha", "networks.lokr"):
        assert found(tmp_path, {"network_module": kind}, T2V) == []
        assert "the host has it not for krea2" in found(tmp_path, {"network_module": kind}, KREA2)[0]


def test_8_bit_moments_take_what_bitsandbytes_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(musubi_rates, "find_spec", lambda package: object())
    assert found(tmp_path, {"optimizer_type": "AdamW8bit", "optimizer_args": ["weight_decay=0.1"]}) == []
    (line,) = found(tmp_path, {"optimizer_type": "adamw8bit", "optimizer_args": ["decay=0.1"]})
    assert line.startswith("musubi.optimizer_args: decay: no such argument; known: betas")


def test_wandb_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(musubi_rates, "find_spec", lambda package: None)
    assert found(tmp_path, {"log_with": "wandb"}) == ["musubi.log_with = 'wandb' needs wandb: pip install wandb, or set 'tensorboard'"]
    monkeypatch.setattr(musubi_rates, "find_spec", lambda package: object())
    assert found(tmp_path, {"log_with": "wandb"}) == []


def test_an_optimizer_of_another_library_is_asked_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "prodigy_of_ours.py").write_text(
        "class Prodigy:\n    def __init__(self, params, lr=1.0, d_coef=1.0):\n        raise RuntimeError('wants a GPU')\n", encoding="utf-8"
    )
    (tmp_path / "broken_of_ours.py").write_text("import no_such_module_at_all\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    given = {"optimizer_type": "prodigy_of_ours.Prodigy", "optimizer_args": ["d_coef=0.5"]}
    assert found(tmp_path, given) == []
    assert "unexpected keyword argument" in found(tmp_path, given | {"optimizer_args": ["d_coeff=0.5"]})[0]
    assert "cannot be imported (No module named 'no_such" in found(tmp_path, {"optimizer_type": "broken_of_ours.Prodigy"})[0]
    sys.modules.pop("prodigy_of_ours")
