"""FLUX.1's latents as tokens: packing and position ids. Torch alone, so that every host can use it.

Legend: B batch, C latent channels (16), F = 1, H W latent height and width, L tokens = (H/2)(W/2), D = 4C.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """(B, C, 1, H, W) -> (B, L, D): 2x2 patches as tokens, row by row, channel-major inside a token."""
    b, c, f, h, w = latents.shape
    if f != 1 or h % PATCH or w % PATCH:
        raise ValueError(f"FLUX takes one frame and even latent sides, got latents of shape {tuple(latents.shape)}")
    patches = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, L, D) -> (B, C, 1, H, W); the inverse of `pack`."""
    b, _, d = tokens.shape
    patches = tokens.reshape(b, height // PATCH, width // PATCH, d // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, d // PATCH**2, 1, height, width)


def position_ids(height: int, width: int, first: int, device: torch.device) -> Tensor:
    """(L, 3) ids (first, row, column) of the packed tokens of an H x W latent, in `pack`'s order."""
    rows = torch.arange(height // PATCH, device=device)
    columns = torch.arange(width // PATCH, device=device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    return torch.cat([torch.full_like(grid[:, :1], first), grid], dim=1).float()


def pack_length(height: int, width: int) -> int:
    """Tokens of an H x W latent."""
    return (height // PATCH) * (width // PATCH)


def sequence(noisy: Tensor, source: Tensor | None, position: str) -> tuple[Tensor, Tensor]:
    """Tokens and position ids of one call: noisy (B, C, 1, H, W), source like noisy or None -> (B, L or 2 L, D) and as many ids (3).

    Source tokens follow the noisy tokens, at the same positions (`same`) or with the first id 1 (`kontext`).
    """
    h, w = noisy.shape[-2:]
    tokens, ids = pack(noisy), position_ids(h, w, 0, noisy.device)
    if source is None:
        return tokens, ids
    first = 1 if position == "kontext" else 0
    return torch.cat([tokens, pack(source)], dim=1), torch.cat([ids, position_ids(h, w, first, noisy.device)])
