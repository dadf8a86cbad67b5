"""The LoRA files that a run starts from: every refusal names key, file and a way out that exists."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from byg_plugin.config.sections import Config
from byg_plugin.hosts import adapter_shapes
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.lora import start as start_lora
from byg_plugin.lora.formats import convert
from byg_plugin.models import make_family
from tests.support import tiny, tiny_wan

CPU = torch.device("cpu")
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def config_of(key: str, path: Path) -> Config:
    if key == "init_from":
        return tiny.run_config(path.parent / "run", lora={key: str(path)})
    return tiny_wan.wan_config(path.parent / "run", tiny_wan.A14B, lora={"experts": "low_noise", key: str(path)})


def good(key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA of the tiny network that this key could name."""
    unused = Path("unused")
    config = tiny.run_config(unused) if key == "init_from" else tiny_wan.wan_config(unused, tiny_wan.A14B)
    host = DiffusersHost(config, make_family(config), CPU)
    (tensors, *_) = host.lora_files(host.parameters).values()
    return tensors, {"byg.family": config.model.family}


def last(tensors: dict[str, Tensor], value: float) -> dict[str, Tensor]:
    name = next(reversed(tensors))
    out = tensors[name].clone()
    out.view(-1)[-1] = value
    return tensors | {name: out}


# what is wrong -> (change of the tensors, change of the metadata, what the message says after key and path)
WRONG: dict[str, tuple[Change, dict[str, str], str]] = {
    "NaN": (lambda t: last(t, float("nan")), {}, "tensor .* holds NaN or infinite values"),
    "1e30": (lambda t: last(t, 1e30), {}, "tensor .*: a value or alpha / rank of 1e\\+30"),
    "alphas": (lambda t: t | {next(iter(t)).partition(".lora_")[0] + ".alpha": torch.ones(2)}, {}, "tensor .*alpha has shape"),
    "header": (lambda t: t, {"lora_adapter_metadata": "[" * 100_000}, "metadata key lora_adapter_metadata is damaged"),
    "foreign layer": (
        lambda t: t | {"other.lora_A.weight": torch.ones(4, 4), "other.lora_B.weight": torch.ones(4, 4)},
        {},
        "diffusers would lose 1 of .*convert_lora.py FILE --to diffusers --allow-loss --out NEW",
    ),
    "other model": (lambda t: {"x.lora_A.weight": torch.ones(4, 4), "x.lora_B.weight": torch.ones(4, 4)}, {}, "no LoRA of "),
    "family": (lambda t: t, {"byg.family": "sd"}, "was trained for 'sd'"),
    "guidance": (lambda t: t, {"byg.guidance": "much"}, "its metadata are damaged: byg.guidance = 'much'"),
}
# What only the network tells.
UNFIT: dict[str, Change] = {
    "a layer too few": lambda t: dict(list(t.items())[2:]),
    "another width": lambda t: t | {name: torch.zeros(len(t[name]), 99) for name in [next(n for n in t if "lora_A" in n)]},
}


@pytest.mark.parametrize("key", ["init_from", "other_expert"])
@pytest.mark.parametrize("case", [*WRONG, *UNFIT, "missing", "pickle"])
def test_every_refusal_names_key_and_file(tmp_path: Path, key: str, case: str):
    path = tmp_path / ("lora.pt" if case == "pickle" else "lora.safetensors")
    tensors, metadata = good(key)
    if case in WRONG:
        change, more, message = WRONG[case]
        save_file({n: t.contiguous() for n, t in change(tensors).items()}, path, metadata=metadata | more)
    elif case in UNFIT:
        save_file({n: t.contiguous() for n, t in UNFIT[case](tensors).items()}, path, metadata=metadata)
        message = ".*(this LoRA does not fit the model|has shape)"
    else:
        message = "no such file" if case == "missing" else "not a .safetensors file"
        if case == "pickle":
            path.write_bytes(b"x")
    config = config_of(key, path)
    named = f"^{re.escape(f'lora.{key} = {path}')}:? .*{message}".replace(":? .*was", " .*was")
    with pytest.raises(ValueError, match=named) as refusal:
        if case not in UNFIT:
            read = start_lora.read_init if key == "init_from" else start_lora.read_other_expert
            read(config)
        DiffusersHost(config, make_family(config), CPU)
    assert str(refusal.value).count(str(path)) == 1


@pytest.mark.parametrize("key", ["init_from", "other_expert"])
def test_good_files_of_every_naming_are_taken(tmp_path: Path, key: str):
    """Trained ones: of zeros a fused file does not say which rank belongs to which part."""
    tensors, metadata = good(key)
    tensors = {name: torch.randn(tensor.shape) for name, tensor in tensors.items()}
    for to in ("diffusers", "musubi", "comfyui"):
        path = tmp_path / f"{to}.safetensors"
        save_file({n: t.contiguous() for n, t in convert(tensors, to, family=metadata["byg.family"]).items()}, path, metadata=metadata)
        config = config_of(key, path)
        start_lora.check_start(config, partial(adapter_shapes, config, make_family(config), ("edit",)))


def test_of_a_pair_an_expert_that_is_trained_alone_takes_its_own(tmp_path: Path):
    config = tiny_wan.wan_config(Path("unused"), tiny_wan.A14B)
    host = DiffusersHost(config, make_family(config), CPU)
    for suffix, tensors in host.lora_files(host.parameters).items():
        tensors = {name: torch.randn(tensor.shape) for name, tensor in tensors.items()}
        save_file(tensors, tmp_path / f"pair{suffix}.safetensors", metadata={"byg.family": config.model.family})
    low, high = (str(tmp_path / f"pair_{side}_noise.safetensors") for side in ("low", "high"))
    for half in (low, high):
        started = tiny_wan.wan_config(tmp_path, tiny_wan.A14B, lora={"experts": "low_noise", "other_expert": high, "init_from": half})
        family = make_family(started)
        start_lora.check_start(started, partial(adapter_shapes, started, family, ("edit",)))
        DiffusersHost(started, family, CPU)
    wider = tiny_wan.wan_config(tmp_path, tiny_wan.A14B, lora={"experts": "low_noise", "other_expert": high, "init_from": low, "rank": 9})
    with pytest.raises(ValueError, match=r"lora.init_from = .*pair_low_noise.safetensors: .* has shape .* set lora.rank"):
        start_lora.check_start(wider, partial(adapter_shapes, wider, make_family(wider), ("edit",)))
