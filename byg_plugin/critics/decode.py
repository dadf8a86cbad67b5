"""Latents to pixels with gradient, in less memory than the decoder's whole graph: layers recomputed, tiles one after another.

The graph of a decoder at 512 x 512 pixels is several GiB in float32. It is never needed beside another one: the pixels are decoded
without a graph, a critic differentiates with respect to them, and `pull_back` decodes again, piece by piece, to take that derivative
through.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from byg_plugin.models.base import Family

_BLENDED = 4  # a tile's side over the part that it shares with the next one
# Blocks without memory. Those of Wan's and Qwen-Image's VAE count their calls, and a second one would be another one: tiles are for them.
_RECOMPUTED = ("ResnetBlock2D", "Upsample2D", "Attention")


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A rectangle of latents, the pixels that it becomes, and how much each of them counts."""

    latents: tuple[Any, ...]
    pixels: tuple[Any, ...]
    weight: Tensor | None


class Decoder:
    """A family's decoder as a function of latents of one frame.

    Args:
        family: whose latents.
        vae: frozen, its own: its blocks are changed.
        tile: side of a tile in pixels; None: the whole picture.
        recompute: keep the inputs of its blocks instead of all that a backward pass needs.
    """

    def __init__(self, family: Family, vae: nn.Module, tile: int | None = None, *, recompute: bool = True):
        self._family, self._vae, self._tile = family, vae, tile
        if getattr(vae, "use_tiling", False):  # diffusers' own tiles would be inside ours
            vae.disable_tiling()
        if recompute:
            recompute_(vae)

    @torch.no_grad()
    def pixels(self, latents: Tensor) -> Tensor:
        """(B, C, 1, h, w) -> (B, 3, H, W) in [0, 1], without a graph."""
        pictures = []
        for one in latents.split(1):
            whole: Tensor | None = None
            for tile in self._tiles(one):
                decoded = self._decoded(one[tile.latents])
                if tile.weight is None:
                    whole = decoded
                    continue
                if whole is None:
                    factor = decoded.shape[-1] // one[tile.latents].shape[-1]
                    whole = decoded.new_zeros(1, 3, one.shape[-2] * factor, one.shape[-1] * factor)
                whole[tile.pixels] += tile.weight * decoded
            assert whole is not None
            pictures.append(whole)
        return torch.cat(pictures)

    def pull_back(self, latents: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of <gradient, pixels(latents)> with respect to the latents; one tile's graph at a time.

        Args:
            latents: (B, C, 1, h, w).
            gradient: (B, 3, H, W), like the pixels.
        """
        pulled = torch.zeros_like(latents)
        for index, one in enumerate(latents.detach().split(1)):
            for tile in self._tiles(one):
                leaf = one[tile.latents].clone().requires_grad_()
                with torch.enable_grad():
                    decoded = self._decoded(leaf)
                along = gradient[index : index + 1][tile.pixels]
                along = along if tile.weight is None else along * tile.weight
                (of_tile,) = torch.autograd.grad(decoded, leaf, along.to(decoded))
                pulled[index : index + 1][tile.latents] += of_tile
        return pulled

    def _decoded(self, latents: Tensor) -> Tensor:
        return (self._family.decode_latents(self._vae, latents)[:, :, 0] + 1) / 2

    def _tiles(self, latents: Tensor) -> Iterator[Tile]:
        height, width = latents.shape[-2:]
        if self._tile is None:
            yield Tile(latents=(...,), pixels=(...,), weight=None)
            return
        factor = self._factor(latents)
        side = tile_side(self._tile, factor)
        if side >= max(height, width):
            yield Tile(latents=(...,), pixels=(...,), weight=None)
            return
        rows, columns = (_windows(length, side, factor, latents) for length in (height, width))
        for top, rows_weight in rows:
            for left, columns_weight in columns:
                spans = [(top, min(side, height)), (left, min(side, width))]
                yield Tile(
                    latents=(..., *(slice(start, start + length) for start, length in spans)),
                    pixels=(..., *(slice(factor * start, factor * (start + length)) for start, length in spans)),
                    weight=rows_weight[:, None] * columns_weight,
                )

    @torch.no_grad()
    def _factor(self, latents: Tensor) -> int:
        """Pixels that a side of a latent stands for: those of a decoded corner."""
        return self._decoded(latents[..., :2, :2]).shape[-1] // 2


def tile_side(tile: int, factor: int) -> int:
    """Latents a side of a tile of so many pixels: whole ones, of `factor` pixels each."""
    return max(1, tile // factor)


def _windows(length: int, side: int, factor: int, like: Tensor) -> list[tuple[int, Tensor]]:
    """Starts, in latents, of windows over a length, with the weights of their pixels, which add up to 1 everywhere."""
    side = min(side, length)
    shared = side // _BLENDED
    starts = list(range(0, length - side, max(1, side - shared)))
    starts.append(length - side)
    total = torch.zeros(length * factor, dtype=like.dtype, device=like.device)
    weights = []
    for start in starts:
        along = (torch.arange(side * factor, dtype=like.dtype, device=like.device) + 0.5) / max(1, shared * factor)
        rising = along.clamp(max=1) if start else torch.ones_like(along)
        falling = along.flip(0).clamp(max=1) if start + side < length else torch.ones_like(along)
        weights.append(rising * falling)
        total[start * factor : (start + side) * factor] += weights[-1]
    return [(start, weight / total[start * factor : (start + side) * factor]) for start, weight in zip(starts, weights, strict=True)]


def recomputed_blocks(vae: nn.Module) -> list[nn.Module]:
    """The blocks of a decoder that can be recomputed; none of those that count their calls."""
    return [module for module in vae.decoder.modules() if type(module).__name__ in _RECOMPUTED]


def recompute_(vae: nn.Module) -> None:
    """A decoder's blocks are recomputed in backward, in place. Without a graph nothing changes."""
    for block in recomputed_blocks(vae):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[method-assign]
