"""The critic of a configuration: what is missing is said before a weight is read, and one that is blind is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from byg_plugin import critics
from byg_plugin.config import extras
from byg_plugin.config.sections import Config
from byg_plugin.critics import check_critic, check_instructions, critic_device, make_critic, shares_device, vlm
from byg_plugin.critics.questions import made
from byg_plugin.models import make_family
from byg_plugin.objectives.paired_config import PairedConfig
from tests.support.critic_runs import latents
from tests.support.tiny import model_folder, tiny_config
from tests.support.tiny_critics import critic_config, critic_folder
from tests.support.tiny_wan import wan_config

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """An objective that asks a critic."""
    monkeypatch.setattr(PairedConfig, "criticised", True)


def config(folder: Path, **critic: Any) -> Config:
    values = {"path": str(critic_folder("qwen3_vl")), "dtype": "float32", "least_accuracy": 0.0} | critic
    return tiny_config(folder, model={"path": str(model_folder())}, objective={"name": "paired"}, critic=values)


def sources(count: int = 2) -> list[torch.Tensor]:
    return list(latents(6, 6, count, torch.float32))


def test_a_critic_of_a_configuration(tmp_path: Path):
    one = config(tmp_path, tile=32, scale_steps=10)
    critic = make_critic(one, make_family(one), CPU, sources())
    assert critic.decoder._tile == 32
    assert critic.vlm.device == CPU and critic.scale(5) == pytest.approx(0.55)
    assert critic.decoder.pixels(latents(6, 6, 1, torch.float32)).shape == (1, 3, 48, 48)


@pytest.mark.parametrize("objective", [{"name": "np_edit"}, {"name": "unpaired_cycle", "critique_types": ["remove"]}])
def test_its_scale_rises_from_the_end_of_the_warm_up(objective: dict[str, Any], tmp_path: Path):
    one = tiny_config(
        tmp_path,
        model={"path": str(model_folder())},
        objective=objective | {"identity_warmup_steps": 300},
        train={"steps": 400},
        critic={"path": str(critic_folder("qwen3_vl")), "dtype": "float32", "least_accuracy": 0.0, "scale_from": 0.2, "scale_steps": 10},
    )
    critic = make_critic(one, make_family(one), CPU, sources())
    assert [critic.scale(updates) for updates in (299, 300, 305, 310)] == pytest.approx([0.2, 0.2, 0.6, 1.0])


@pytest.mark.parametrize("count", [1, 2])
def test_one_that_cannot_tell_yes_from_no_is_refused(count: int, tmp_path: Path):
    one = config(tmp_path, least_accuracy=0.75)
    with pytest.raises(ValueError, match=r"of 32 known questions rightly .* critic\.least_accuracy = 0\.75"):
        make_critic(one, make_family(one), CPU, sources(count))


def test_a_picture_of_two_tuples_is_one_picture():
    first, second = sources()
    assert [one is other for one, other in zip(critics._different([first, first.clone(), second]), (first, second), strict=True)] == [
        True
    ] * 2


def test_none_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match='objective.name = "paired" asks a critic: set critic.path'):
        check_critic(config(tmp_path, path=None))


@pytest.mark.parametrize(
    ("package", "values", "extra"),
    [("transformers", {}, "diffusers"), ("bitsandbytes", {"quantization": "nf4", "dtype": "bfloat16"}, "bnb")],
)
def test_a_missing_package_names_its_install_line(
    package: str, values: dict[str, str], extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ValueError, match=rf'needs {package}, which is not installed.*-e "\.\[{extra}\]"'):
        check_critic(config(tmp_path, **values))


def test_clips_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"dataset\.frames = 5: a critic looks at single pictures; set dataset\.frames = 1"):
        wan_config(tmp_path, "wan2.1-t2v-1.3b", dataset={"frames": 5}, objective={"name": "paired"})


def test_four_bits_of_32_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="critic.quantization = 'nf4' computes in 16 bit: set critic.dtype = 'bfloat16'"):
        config(tmp_path, quantization="nf4")


def test_its_device(monkeypatch: pytest.MonkeyPatch):
    assert critic_device(critic_config("x", device="auto"), torch.device("meta")) == torch.device("meta")
    assert critic_device(critic_config("x", device="cpu"), torch.device("meta")) == CPU
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert critic_device(critic_config("x", device="cuda"), CPU) == torch.device("cuda")
    with pytest.raises(ValueError, match='critic.device = "cuda:1": this machine has 1 CUDA devices'):
        critic_device(critic_config("x", device="cuda:1"), CPU)


@pytest.mark.parametrize(
    ("name", "device", "shared"),
    [
        ("auto", "cuda:1", True),
        ("cpu", "cpu", True),
        ("cuda", "cuda", True),
        ("cuda:0", "cuda", True),
        ("cuda:1", "cuda", False),
        ("cpu", "cuda", False),
        ("cuda", "cpu", False),
    ],
)
def test_where_it_shares_the_networks_device(name: str, device: str, shared: bool):
    assert shares_device(critic_config("x", device=name), torch.device(device)) is shared


def test_an_instruction_with_a_mark_of_its_own_is_refused_by_its_tuple():
    described = vlm.describe(critic_config(critic_folder("qwen3_vl")))
    check_instructions(described, [("a", "make it <b>bold</b> | blue"), ("b", "add an image")])
    for mark in ("<|image|>", "<|im_end|>", "<|vision_start|>"):
        with pytest.raises(ValueError, match=rf"the instruction of tuple b holds '{re.escape(mark)}', which critic\.path = "):
            check_instructions(described, [("a", "make it blue"), ("b", f"make {mark} blue")])


def test_four_bits_answer_and_have_a_gradient():
    pytest.importorskip("bitsandbytes")
    values: dict[str, Any] = {"quantization": "nf4", "dtype": "bfloat16"}
    one = critic_config(critic_folder("qwen3_vl"), **values)
    judge = vlm.load(one, vlm.describe(one), CPU)
    assert any(type(module).__name__ == "Linear4bit" for module in judge.model.modules())
    leaf = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    answer = judge.logits(made("remove it", "remove"), [judge.features(leaf)])
    (gradient,) = torch.autograd.grad(answer[1] - answer[0], leaf)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
