"""Networks stored in 8 or 4 bits: what they compute, what they keep, and what trains."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from byg_plugin.config.sections import Config
from byg_plugin.hosts import quantize
from byg_plugin.hosts.diffusers import DiffusersHost
from byg_plugin.models.flux import FluxFamily
from tests.support.diffusers_host import base_of, batch_of, gradients, host_config, live_of, step_gradients
from tests.support.tiny import make_host, tiny_config, tiny_flux, wake, write_model


def fp8_pair(dtype: torch.dtype = torch.float32) -> tuple[quantize.Fp8Linear, Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(24, 40).to(dtype)
    linear.weight.data[3] = 0  # a dead row
    linear.weight.data[5] *= 100
    return quantize.Fp8Linear.from_linear(linear.requires_grad_(False)), torch.randn(2, 7, 24, dtype=dtype)


def test_fp8_forward_and_input_gradient(tmp_path: Path):
    linear, x = fp8_pair()
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, wanted = linear(one), quantize.linear_reference(two, linear)
    torch.testing.assert_close(out, wanted)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(one.grad, two.grad)
    assert torch.isfinite(out).all() and torch.isfinite(one.grad).all()


def test_fp8_is_near_the_original():
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    stored = quantize.Fp8Linear.from_linear(plain)
    x = torch.randn(32, 64)
    error = (stored(x) - plain(x)).norm() / plain(x).norm()
    assert 1e-4 < error < 0.05, "3 bits of mantissa"
    assert stored.weight.dtype == quantize.FP8


def test_fp8_keeps_no_16_bit_weight_in_the_graph():
    linear, x = fp8_pair(torch.bfloat16)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        linear(x).sum().backward()
        assert any(t.dtype == quantize.FP8 for t in saved)
        assert not [t.dtype for t in saved if t.numel() >= linear.weight.numel() and t.dtype != quantize.FP8]
        saved.clear()
        quantize.linear_reference(x, linear).sum().backward()
        assert [t for t in saved if t.numel() >= linear.weight.numel() and t.dtype == torch.bfloat16], "the hook sees nothing"


def test_fp8_under_autocast_computes_in_its_dtype():
    linear, x = fp8_pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16


def wide_config(tmp_path: Path, **model: Any) -> Config:
    """Widths of multiples of 64, as bitsandbytes' blocks want them."""
    write_model(tmp_path / "wide", attention_head_dim=32, axes_dims_rope=(4, 14, 14))
    return tiny_config(tmp_path, model={"path": str(tmp_path / "wide"), "dtype": "bfloat16"} | model, train={"mixed_precision": "bf16"})


@pytest.mark.parametrize(("storage", "tolerance"), [("fp8", 0.25), ("int8", 0.15), ("nf4", 0.6)])
def test_stored_networks_train_and_their_base_has_no_lora(tmp_path: Path, storage: str, tolerance: float):
    if storage != "fp8":
        pytest.importorskip("bitsandbytes")
    batch = batch_of()
    plain = make_host(wide_config(tmp_path))
    host = make_host(wide_config(tmp_path, quantization=storage))
    kinds = {type(m).__name__ for n, m in host.networks["transformer"].named_modules() if n.endswith("to_q.base_layer")}
    assert kinds == {{"fp8": "Fp8Linear", "int8": "Linear8bitLt", "nf4": "Linear4bit"}[storage]}
    wanted, base = base_of(plain, batch), base_of(host, batch)
    error = (base - wanted).norm() / wanted.norm()
    assert 0 < error < tolerance
    assert not torch.equal(live_of(host, batch), base)
    grads = step_gradients(host, {})
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads.values())
    assert torch.equal(base_of(host, batch), base)
    live = live_of(host, batch)
    wake(host, seed=77)
    assert not torch.equal(live_of(host, batch), live) and torch.equal(base_of(host, batch), base)


def test_layers_of_one_input_keep_it_once_for_backward_and_compute_the_same(tmp_path: Path):
    """PEFT's own way makes a float32 copy for each LoRA layer, and autocast a bfloat16 copy of that one, which is kept."""

    def step(peft_casts: bool) -> tuple[int, dict[str, Tensor]]:
        host = make_host(host_config(tmp_path, model={"dtype": "bfloat16"}, train={"mixed_precision": "bf16"}))
        for layer in host._lora_layers:
            assert not layer.cast_input_dtype_enabled
            layer.cast_input_dtype_enabled = peft_casts
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with host.edit() as velocity, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            batch = batch_of()
            out = velocity(batch.noise, batch.t, batch.instruction, batch.source).square().sum()
        size = sum(kept.values())
        out.backward()
        return size, gradients(host)

    (ours, got), (theirs, wanted) = step(False), step(True)
    assert got.keys() == wanted.keys() and all(torch.equal(got[name], wanted[name]) for name in got)
    assert ours < theirs


def test_only_linears_inside_blocks_are_stored_in_8_bits():
    network = tiny_flux()
    quantize.quantize_(network, "fp8", torch.float32)
    kinds = {name: type(m) for name, m in network.named_modules() if isinstance(m, nn.Linear)}
    assert kinds["transformer_blocks.0.attn.to_q"] is quantize.Fp8Linear
    assert all(kinds[name] is nn.Linear for name in ("x_embedder", "context_embedder", "proj_out", "norm_out.linear"))


def test_a_16_bit_weight_is_freed_before_the_next_is_quantised(monkeypatch: pytest.MonkeyPatch):
    network, dead = tiny_flux(), []
    weights = [weakref.ref(m.weight) for name, m in network.named_modules() if type(m) is nn.Linear and "blocks." in name]
    quantised = quantize._quantized
    monkeypatch.setattr(quantize, "_quantized", lambda *of: (dead.append(sum(w() is None for w in weights)), quantised(*of))[1])
    quantize.quantize_(network, "fp8", torch.float32)
    assert dead == list(range(len(weights)))


def test_bitsandbytes_missing_names_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from byg_plugin.config import extras

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "bitsandbytes" else object())
    config = host_config(tmp_path, model={"quantization": "nf4", "dtype": "bfloat16", "path": str(tmp_path / "never read")})
    with pytest.raises(ValueError, match=r'quantization = "nf4" needs bitsandbytes.*-e "\.\[bnb\]"'):
        DiffusersHost(config, FluxFamily(config), torch.device("cpu"))
