"""Frozen linears stored in 8 or 4 bits, so that the base model fits a small card."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byg_plugin.hosts.blocks import linears_in_blocks

FP8 = torch.float8_e4m3fn


class _Fp8Product(torch.autograd.Function):
    """x W^T with W in fp8. Backward dequantises again instead of keeping a 16-bit copy of W alive in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return x @ _dequantise(weight, scale, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        (grad,) = grads
        return grad @ _dequantise(weight, scale, grad.dtype), None, None


def _dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) * scale.to(dtype)


class Fp8Linear(nn.Linear):
    """A frozen linear whose weight is stored as float8_e4m3fn with one float32 scale an output channel."""

    weight_scale: Tensor

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Fp8Linear:
        """Quantise a linear; its bias keeps its dtype."""
        out = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        weight = linear.weight.detach().float()
        # Clamped after the division: a subnormal scale may be flushed to 0, and a row of zeros would become NaN.
        scale = (weight.abs().amax(dim=1, keepdim=True) / torch.finfo(FP8).max).clamp(min=torch.finfo(torch.float32).tiny)
        out.weight = nn.Parameter((weight / scale).to(FP8), requires_grad=False)
        out.register_buffer("weight_scale", scale)
        out.bias = linear.bias
        return out

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the autocast dtype, or the input's."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            out = _Fp8Product.apply(input, self.weight, self.weight_scale)
            return out if self.bias is None else out + self.bias.to(out.dtype)


def quantize_(network: nn.Module, kind: Literal["none", "fp8", "int8", "nf4"], compute_dtype: torch.dtype) -> None:
    """Replace the linears inside the blocks, in place; embedders, norms' modulation heads outside blocks stay.

    int8 and nf4 are quantised by bitsandbytes when the network is moved to its device.
    """
    if kind == "none":
        return
    # Names, not modules: a list of these would keep every 16-bit weight until the last one is quantised.
    for name in linears_in_blocks(network):
        parent = network.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], _quantized(network.get_submodule(name), kind, compute_dtype))
    # PEFT picks the LoRA layer that knows bitsandbytes' weights by these flags.
    if kind in ("int8", "nf4"):
        vars(network)["is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit"] = True


def _quantized(linear: nn.Linear, kind: str, compute_dtype: torch.dtype) -> nn.Module:
    if kind == "fp8":
        return Fp8Linear.from_linear(linear)
    import bitsandbytes as bnb

    bias = linear.bias is not None
    out: nn.Module
    if kind == "nf4":
        out = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
        out.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
    else:
        out = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias, has_fp16_weights=False, device="meta")
        out.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
    out.bias = linear.bias
    return out


def after_eval_(network: nn.Module) -> None:
    """bitsandbytes' linears read their training flag: in eval mode on a CPU they repack the weight into a layout without
    backward. They have no dropout; the flag changes nothing else."""
    for module in network.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            module.training = True


def linear_reference(x: Tensor, linear: Fp8Linear) -> Tensor:
    """What `Fp8Linear` computes, written plainly (for tests)."""
    return F.linear(x, _dequantise(linear.weight, linear.weight_scale, x.dtype), linear.bias)
