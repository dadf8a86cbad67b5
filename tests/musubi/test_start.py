"""`musubi.network_weights`: what the host would pass over in silence, stop at late, or scale otherwise than it saves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from byg_plugin.musubi import options as musubi_options
from tests.support.musubi_host import A14B, T2V, host_config, recorded_surface
from tests.support.musubi_images import KREA2, QWEN, ZIMAGE

LAYERS = {
    "flux": "double_blocks_0_img_attn_proj",
    T2V: "blocks_0_cross_attn_k",
    A14B: "blocks_0_cross_attn_k",
    QWEN: "transformer_blocks_0_attn_to_q",
    KREA2: "blocks_0_attn_wq",
    ZIMAGE: "layers_0_attention_to_q",
}


def hosts(layer: str, *, rank: int = 4, alpha: float | None = 4.0) -> dict[str, Tensor]:
    """A layer's tensors as the host's LoRA has them."""
    name = f"lora_unet_{layer}"
    found = {f"{name}.lora_down.weight": torch.ones(rank, 8), f"{name}.lora_up.weight": torch.ones(8, rank)}
    return found if alpha is None else found | {f"{name}.alpha": torch.tensor(alpha)}


def ours(layer: str, rank: int = 4) -> dict[str, Tensor]:
    name = f"transformer.{layer}"
    return {f"{name}.lora_A.weight": torch.randn(rank, 8), f"{name}.lora_B.weight": torch.ones(8, rank)}


def loha(rank: int = 4) -> dict[str, Tensor]:
    name = f"lora_unet_{LAYERS['flux']}"
    found = {f"{name}.hada_w{one}_{side}": torch.ones((8, rank) if side == "a" else (rank, 8)) for one in (1, 2) for side in "ab"}
    return found | {f"{name}.alpha": torch.tensor(4.0)}


def lines(
    folder: Path, tensors: dict[str, Tensor], family: str = "flux", metadata: dict[str, str] | None = None, **options: Any
) -> list[str]:
    """What is wrong with a start from these tensors."""
    path = folder / "start.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    for name in ("dit.safetensors", "high.safetensors"):
        save_file({"x": torch.zeros(1)}, folder / name)
    (folder / "dataset.toml").touch()
    config = host_config(folder, family, musubi={"network_weights": str(path), **options})
    return musubi_options.problems(config, recorded_surface(family))


@pytest.mark.parametrize("family", LAYERS)
def test_a_lora_of_the_hosts_own_is_taken(tmp_path: Path, family: str):
    card = {"byg.family": family, "byg.position": "same"}
    assert lines(tmp_path, hosts(LAYERS[family]), family) == [] == lines(tmp_path, hosts(LAYERS[family]), family, card)


def test_networks_of_other_kinds_are_taken_by_their_own(tmp_path: Path):
    whole = {f"lora_unet_{LAYERS['flux']}.{end}": torch.ones(2, 2) for end in ("lokr_w1", "lokr_w2")}
    whole |= {f"lora_unet_{LAYERS['flux']}.alpha": torch.tensor(16.0)}  # of a whole matrix the host keeps the rank that it was asked for
    assert lines(tmp_path, whole, network_module="networks.lokr") == []
    assert lines(tmp_path, loha(), network_module="networks.loha") == []
    assert lines(tmp_path, {"anything": torch.ones(1)}, network_module="tests.support") == []
    (line,) = lines(tmp_path, loha())
    assert line.endswith("set musubi.network_module = 'networks.loha'")
    (line,) = lines(tmp_path, hosts(LAYERS["flux"]), network_module="networks.loha")
    assert line.endswith("leave musubi.network_module out")
    (line,) = lines(tmp_path, loha(8), network_module="networks.loha")
    assert "has rank 8, musubi.network_dim is 4" in line


@pytest.mark.parametrize(
    ("tensors", "family", "says"),
    [
        (ours("transformer_blocks.0.attn.to_out.0"), "flux", r"convert_lora.py .*start.safetensors --to musubi .* musubi.network_dim = 4"),
        (
            ours("transformer_blocks.0.attn.to_q") | ours("transformer_blocks.0.attn.to_k") | ours("transformer_blocks.0.attn.to_out.0"),
            "flux",
            r"has ranks 4 and 8, and the host's network has one: go on with model.host = \"diffusers\" and lora.init_from",
        ),
        ({"blocks.0.attn.wq.lora_down.weight": torch.ones(4, 8)}, "flux", "no LoRA of flux in this file"),
        (hosts("foo"), "flux", "no LoRA of flux in this file"),
        (hosts(LAYERS[T2V]), "flux", "no LoRA of flux in this file"),
        (hosts(LAYERS["flux"]) | hosts("foo"), "flux", r"would pass over lora_unet_foo in silence \(no layer of flux has this name\)"),
    ],
)
def test_what_the_host_would_pass_over_is_refused(tmp_path: Path, tensors: dict[str, Tensor], family: str, says: str):
    (line,) = lines(tmp_path, tensors, family)
    assert line.startswith(f"musubi.network_weights = {tmp_path / 'start.safetensors'}") and re.search(says, line), line


def test_layers_that_a_run_leaves_out_are_told_unless_it_has_patterns_of_its_own(tmp_path: Path):
    tensors = hosts(LAYERS[QWEN]) | hosts("transformer_blocks_0_img_mod_1")
    (line,) = lines(tmp_path, tensors, QWEN)
    assert "lora_unet_transformer_blocks_0_img_mod_1" in line and "silence" in line
    assert lines(tmp_path, tensors, QWEN, network_args=["exclude_patterns=[]"]) == []


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("byg.family", "z-image", "was trained for 'z-image', model.family is 'flux'"),
        ("byg.position", "kontext", "conditioning.position = 'kontext', here it is 'same': set it to 'kontext'"),
    ],
)
def test_a_lora_that_was_trained_otherwise_is_refused(tmp_path: Path, key: str, value: str, says: str):
    (line,) = lines(tmp_path, hosts(LAYERS["flux"]), metadata={key: value})
    assert says in line


def test_another_rank_is_refused(tmp_path: Path):
    (line,) = lines(tmp_path, hosts(LAYERS["flux"], rank=8))
    assert line.endswith("has rank 8, musubi.network_dim is 4: set it to the file's")
    (line,) = lines(tmp_path, hosts(LAYERS["flux"]) | hosts("double_blocks_0_txt_attn_proj", rank=8))
    assert "has layers of ranks 4 and 8" in line and "lora.init_from" in line


def test_another_strength_than_is_trained_is_refused(tmp_path: Path):
    (line,) = lines(tmp_path, hosts(LAYERS["flux"], alpha=16.0))
    assert line.endswith("has alpha 16, and musubi.network_alpha is 4: set musubi.network_alpha to the file's, 16")
    (line,) = lines(tmp_path, hosts(LAYERS["flux"], alpha=None), network_alpha=2)  # without one it is the rank
    assert line.endswith("to the file's, 4")
    (line,) = lines(tmp_path, hosts(LAYERS["flux"]) | hosts("double_blocks_0_txt_attn_proj", alpha=16.0))
    assert "has layers of several alphas" in line
    assert lines(tmp_path, hosts(LAYERS["flux"], alpha=16.0), network_alpha=16) == []
    saved = float(torch.tensor(0.3).bfloat16())  # as the host saves its own
    assert lines(tmp_path, hosts(LAYERS["flux"], alpha=saved), network_alpha=0.3) == []
    for alpha in (4.0, None):
        assert lines(tmp_path, hosts(LAYERS["flux"], alpha=alpha), network_alpha=0) == []  # 0 is the rank, the host says
