"""A LoRA's product added in one step, where PEFT scales and adds in two more passes over the output."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor


class OneProduct(LoraVariant):
    """W x + scale B (A x), the sum rounded once. PEFT's seam for another forward; nothing else of a layer changes."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """`result` (..., outputs) is the base layer's. See `LoraVariant.forward`."""
        inner = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        b, scale = module.lora_B[active_adapter].weight, module.scaling[active_adapter]
        if inner.dtype != result.dtype:  # float32 LoRA beside a 16-bit base, without autocast
            return result + F.linear(inner, b) * scale
        return torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), b.t(), alpha=scale).view(result.shape)


def use_one_product(layer: Any, adapter: str) -> None:
    """Of a plain linear's LoRA layer; those over bitsandbytes' weights keep PEFT's own forward."""
    if isinstance(layer, PeftLinear):
        layer.lora_variant[adapter] = OneProduct()
