"""Tiny critics of tiny autoencoders, and the pictures that they are shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from byg_plugin.critics.critic import Critic
from byg_plugin.critics.decode import Decoder
from byg_plugin.critics.vlm import Vlm
from byg_plugin.models import make_family
from tests.support.tiny import model_folder, tiny_config, tiny_flux_vae
from tests.support.tiny_critics import critic_config, critic_folder, tiny_critic_vlm

NATIVE = {"qwen3_vl": (40, 48), "qwen2_5_vl": (48, 40), "internvl": (32, 32), "llava_onevision": (32, 32)}
"""(height, width) of a picture that each kind sees as it is."""


def picture(height: int, width: int) -> Image.Image:
    """Smooth and 8-bit, no channel or side like another."""
    coarse = np.random.default_rng(height + width).integers(0, 255, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def flux() -> Any:
    return make_family(tiny_config(Path("unused"), model={"path": str(model_folder())}))


def vae(dtype: torch.dtype = torch.float64) -> nn.Module:
    return tiny_flux_vae().to(dtype).eval().requires_grad_(False)


def latents(height: int = 6, width: int = 8, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(3)
    return torch.randn(batch, 16, 1, height, width, generator=rng, dtype=torch.float64).to(dtype) * 0.5


def exact(judge: Vlm) -> Vlm:
    """In float64, also where the model would go through float32."""
    judge.model.double()
    for module in judge.model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _norm(module)
    return judge


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


def critic(kind: str = "qwen3_vl", *, double: bool = False, tile: int | None = None, **values: Any) -> Critic:
    judge = tiny_critic_vlm(kind, **values)
    decoder = vae(torch.float64 if double else torch.float32)
    return Critic(exact(judge) if double else judge, Decoder(flux(), decoder, tile), critic_config(critic_folder(kind), **values))
