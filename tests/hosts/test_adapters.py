"""The LoRA of the embedded host: targets, rank, its start, and the files that it writes and starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from byg_plugin.hosts.diffusers import DiffusersHost, lora_shapes, matched_linears
from byg_plugin.lora.files import write_lora
from byg_plugin.models import files
from byg_plugin.models.flux import DEFAULT_TARGETS, FluxFamily
from tests.support.diffusers_host import batch_of, ema_of, host_config, live_of, without_lora
from tests.support.tiny import TINY_FLUX, make_host, tiny_flux


def test_default_targets_match_418_linears_of_the_full_size_flux():
    with torch.device("meta"):
        from diffusers import FluxTransformer2DModel

        network = FluxTransformer2DModel.from_config(files.shipped_config("flux_dev/transformer"))
    names = matched_linears(network, DEFAULT_TARGETS)
    assert len(names) == 19 * 12 + 38 * 5 == 418
    assert not [n for n in names if "norm" in n or "embedder" in n]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nothing_like_this", r"matches no module; it must match whole names such as transformer_blocks"),
        ("attn", "matches no module"),  # a part of a name
        (r"transformer_blocks\.\d+\.attn", "also matches transformer_blocks.0.attn, which is not a linear"),
        (".*", "also matches the whole network"),
    ],
)
def test_bad_targets(tmp_path: Path, pattern: str, message: str):
    config = host_config(tmp_path, lora={"targets": pattern})
    with pytest.raises(ValueError, match=message) as error:
        DiffusersHost(config, FluxFamily(config), torch.device("cpu"))
    assert "lora.targets" in str(error.value)


def test_rank_and_targets_make_the_parameters(tmp_path: Path):
    config = host_config(tmp_path, lora={"rank": 3, "targets": r"transformer_blocks\.\d\.attn\.to_q"})
    host = DiffusersHost(config, FluxFamily(config), torch.device("cpu"))
    width = TINY_FLUX["attention_head_dim"] * TINY_FLUX["num_attention_heads"]
    assert {n: tuple(p.shape) for n, p in host.parameters.items()} == {
        f"transformer.transformer_blocks.{block}.attn.to_q.lora_{side}.weight": shape
        for block in range(2)
        for side, shape in (("A", (3, width)), ("B", (width, 3)))
    }
    assert sorted(lora_shapes(tiny_flux(), config.lora, host.family)) == sorted(tuple(p.shape) for p in host.parameters.values())
    fresh = [p for n, p in host.parameters.items() if "lora_B" in n]
    assert all((p == 0).all() for p in fresh), "a fresh LoRA starts at the base"


def test_the_lora_starts_alike_for_every_storage_and_differs_by_seed(tmp_path: Path):
    def start(**sections: dict[str, Any]) -> dict[str, Tensor]:
        config = host_config(tmp_path, **sections)
        return {n: p.detach() for n, p in DiffusersHost(config, FluxFamily(config), torch.device("cpu")).parameters.items()}

    plain, stored, other = start(), start(model={"quantization": "fp8"}), start(train={"seed": 1})
    assert all(torch.equal(plain[n], stored[n]) for n in plain)
    a = [n for n in plain if "lora_A" in n]
    assert not any(torch.equal(plain[n], other[n]) for n in a)


def test_export_folds_alpha_and_loading_takes_it_back(tmp_path: Path):
    batch = batch_of()
    host = make_host(host_config(tmp_path, lora={"alpha": 1.0}))
    tensors = host.export_lora(host.parameters)
    same = DiffusersHost(host_config(tmp_path, lora={"alpha": 1.0}), host.family, torch.device("cpu"))
    folded = DiffusersHost(host_config(tmp_path), host.family, torch.device("cpu"))
    for other in (same, folded):
        other.load_lora(tensors)
        torch.testing.assert_close(live_of(other, batch), live_of(host, batch))
    name = next(n for n in tensors if "lora_B" in n)
    torch.testing.assert_close(tensors[name], host.parameters[name].detach() / 4)
    for n, parameter in same.parameters.items():
        torch.testing.assert_close(parameter, host.parameters[n])


def test_strength_scales_the_lora_and_0_is_the_network_without(tmp_path: Path):
    host, batch = make_host(host_config(tmp_path)), batch_of()
    full = live_of(host, batch)
    host.set_strength(0.0)
    torch.testing.assert_close(live_of(host, batch), without_lora(batch))
    host.set_strength(0.5)
    half = live_of(host, batch)
    host.set_strength(1.0)
    assert torch.equal(live_of(host, batch), full) and not torch.allclose(half, full)


def test_init_from(tmp_path: Path):
    batch = batch_of()
    first = make_host(host_config(tmp_path))
    path = tmp_path / "first.safetensors"
    write_lora(path, first.export_lora(first.parameters), {"byg.family": "flux"})
    config = host_config(tmp_path, lora={"init_from": str(path)})
    second = DiffusersHost(config, FluxFamily(config), torch.device("cpu"))
    assert torch.equal(live_of(second, batch), live_of(first, batch))
    assert torch.equal(ema_of(second, batch), live_of(first, batch)), "its EMA starts there too"

    def refused(message: str, **sections: dict[str, Any]) -> None:
        changed = host_config(tmp_path, **sections)
        with pytest.raises(ValueError, match=message):
            DiffusersHost(changed, FluxFamily(changed), torch.device("cpu"))

    refused("lora.rank", lora={"init_from": str(path), "rank": 8})
    refused("set lora.targets", lora={"init_from": str(path), "targets": r"transformer_blocks\.0\.attn\.to_q"})
    write_lora(tmp_path / "wan.safetensors", first.export_lora(first.parameters), {"byg.family": "wan"})
    refused("init_from = .*wan.safetensors was trained for 'wan'", lora={"init_from": str(tmp_path / "wan.safetensors")})
    refused("no such file", lora={"init_from": str(tmp_path / "missing.safetensors")})
    save_file({"transformer.x.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    refused(".", lora={"init_from": str(tmp_path / "other.safetensors")})
