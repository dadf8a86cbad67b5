"""The LoRA's product in one step computes what PEFT's forward does."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from byg_plugin.hosts import lora_product


class Adapted(nn.Module):
    """One linear whose LoRA has a B that is not zero and a scale that is not one."""

    def __init__(self, dtype: torch.dtype = torch.float32, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.linear: Any = nn.Linear(6, 5, dtype=dtype)
        config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["linear"])
        peft.inject_adapter_in_model(config, self, adapter_name="byg")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".byg." in name)
            if ".byg." in name:
                parameter.data = torch.randn(parameter.shape)

    def results(self, x: Tensor) -> list[Tensor]:
        """Output, and the gradients of the input, A and B."""
        torch.manual_seed(1)  # of dropout
        x = x.clone().requires_grad_()
        out = self.linear(x)
        weights = [p for p in self.parameters() if p.requires_grad]
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *weights])]


@pytest.mark.parametrize("shape", [(2, 7, 6), (7, 6)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(
    ("base", "autocast", "tolerance"),
    [(torch.float32, False, 1e-6), (torch.float32, True, 0.02), (torch.bfloat16, True, 0.02), (torch.bfloat16, False, 0.02)],
)
def test_it_computes_what_peft_does(shape: tuple[int, ...], dropout: float, base: torch.dtype, autocast: bool, tolerance: float):
    made = Adapted(base, dropout)
    x = torch.randn(shape, dtype=base)
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        wanted = made.results(x)
        lora_product.use_one_product(made.linear, "byg")
        found = made.results(x)
    without = F.linear(x, made.linear.base_layer.weight, made.linear.base_layer.bias)
    assert ((wanted[0] - without).norm() / wanted[0].norm()).item() > 0.1, "the LoRA does something"
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert ((ours - theirs).float().norm() / theirs.float().norm()).item() <= tolerance


def test_the_sum_is_one_operation():
    made = Adapted()
    lora_product.use_one_product(made.linear, "byg")
    out = made.linear(torch.randn(2, 7, 6))
    assert out.grad_fn.next_functions[0][0].name() == "AddmmBackward0"


def test_layers_over_other_linears_keep_pefts_forward():
    class OverBitsandbytes:
        lora_variant: dict[str, Any] = {}

    assert not issubclass(OverBitsandbytes, PeftLinear)
    lora_product.use_one_product(OverBitsandbytes(), "byg")
    assert OverBitsandbytes.lora_variant == {}
