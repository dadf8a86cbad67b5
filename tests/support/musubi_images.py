"""Tiny networks of the image families whose text is Qwen's, the same in both hosts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from byg_plugin.texts import MASK

KLEIN, QWEN, KREA2, ZIMAGE = "flux2-klein-4b", "qwen-image", "krea2", "z-image"
TEXT_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class TinyImage:
    """One family.

    Attributes:
        kind: diffusers' class, which the host's pinned diffusers may not have.
        build: the embedded host's network.
        native: its state dict in the layout of the host's file.
        text: shape of one row of a text.
        masked: whether texts keep their own lengths.
        channels, height, width: of the latents.
        stored: shape of the latents in the host's cache, without channels.
        blocks: list of blocks of the host's network.
        head: module of the host's network whose output holds the tokens, noisy ones first.
        options: of the host, without which the tiny network is not loaded.
    """

    kind: str
    build: Callable[[], nn.Module]
    native: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
    text: tuple[int, ...]
    masked: bool = True
    channels: int = 16
    height: int = 4
    width: int = 6
    stored: tuple[int, ...] = (1, 4, 6)
    blocks: str
    head: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def network(self) -> nn.Module:
        """The same weights every time."""
        import diffusers

        if not hasattr(diffusers, self.kind):
            pytest.skip(f"diffusers {diffusers.__version__}, which musubi-tuner pins, has no {self.kind}: nothing to compare with")
        return self.build()

    def state(self) -> dict[str, Tensor]:
        """What the host's file holds."""
        return {name: value.contiguous().clone() for name, value in self.native(self.network().state_dict()).items()}

    def latents(self, batch: int, seed: int) -> Tensor:
        """Random latents of one frame."""
        return torch.randn(batch, self.channels, 1, self.height, self.width, generator=torch.Generator().manual_seed(seed))

    def texts(self, batch: int, seed: int) -> dict[str, Tensor]:
        """Random encodings, where they are masked of several lengths."""
        rows = torch.randn(batch, TEXT_TOKENS, *self.text, generator=torch.Generator().manual_seed(seed))
        if not self.masked:
            return {"qwen": rows}
        lengths = torch.tensor([3 + (seed + 2 * index) % (TEXT_TOKENS - 2) for index in range(batch)])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        rows = rows[:, : mask.shape[1]] * mask.view(*mask.shape, *[1] * len(self.text))
        return {"qwen": rows, MASK: mask}


def _klein() -> nn.Module:
    from tests.support.tiny_flux2 import tiny_flux2

    return tiny_flux2(timestep_guidance_channels=256)  # the host's width


def _klein_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from byg_plugin.models import flux2_files

    return flux2_files.to_native_layout(state)


def _qwen() -> nn.Module:
    from tests.support.tiny_qwen import tiny_qwen

    return tiny_qwen()


def _krea2() -> nn.Module:
    from tests.support.tiny_qwen import tiny_krea2

    return tiny_krea2(intermediate_size=256, text_intermediate_size=128)  # the host's multiples of 128


def _krea2_file(state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    from byg_plugin.models import qwen_files

    return qwen_files.to_native_krea2(state)


def _zimage() -> nn.Module:
    from tests.support.tiny_zimage import tiny_zimage

    return tiny_zimage()


def _zimage_file(state: dict[str, Tensor]) -> Mapping[str, Tensor]:
    from byg_plugin.models import zimage_files

    return zimage_files.to_native_layout(state)


IMAGES = {
    KLEIN: TinyImage(
        kind="Flux2Transformer2DModel",
        build=_klein,
        native=_klein_file,
        text=(48,),
        masked=False,
        channels=128,
        height=2,
        width=3,
        stored=(2, 3),
        blocks="double_blocks",
        head="final_layer",
    ),
    QWEN: TinyImage(
        kind="QwenImageTransformer2DModel",
        build=_qwen,
        native=lambda state: state,
        text=(24,),
        blocks="transformer_blocks",
        head="proj_out",
        options={"num_layers": 2},
    ),
    KREA2: TinyImage(kind="Krea2Transformer2DModel", build=_krea2, native=_krea2_file, text=(12, 24), blocks="blocks", head="last"),
    ZIMAGE: TinyImage(
        kind="ZImageTransformer2DModel",
        build=_zimage,
        native=_zimage_file,
        text=(16,),
        stored=(4, 6),
        blocks="layers",
        head="all_final_layer.2-1",
    ),
}
MASKED = [name for name, tiny in IMAGES.items() if tiny.masked]
"""Those whose texts keep their own lengths."""
