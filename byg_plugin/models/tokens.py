"""Latents of images as tokens: squares of 2 x 2, row by row. Torch alone, so that every host can use it.

Legend: B batch, C latent channels, F = 1, H W latent height and width, L tokens = (H/2)(W/2), D = 4C.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """(B, C, 1, H, W) -> (B, L, D): 2x2 patches as tokens, row by row, channel-major inside a token."""
    b, c, f, h, w = latents.shape
    if f != 1 or h % PATCH or w % PATCH:
        raise ValueError(f"the network takes one frame and even latent sides, got latents of shape {tuple(latents.shape)}")
    patches = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, L, D) -> (B, C, 1, H, W); the inverse of `pack`."""
    b, _, d = tokens.shape
    patches = tokens.reshape(b, height // PATCH, width // PATCH, d // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(b, d // PATCH**2, 1, height, width)


def pack_length(height: int, width: int) -> int:
    """Tokens of an H x W latent."""
    return (height // PATCH) * (width // PATCH)


def position_ids(height: int, width: int, first: int, device: torch.device) -> Tensor:
    """(L, 3) ids (first, row, column) of the packed tokens of an H x W latent, in `pack`'s order."""
    rows = torch.arange(height // PATCH, device=device)
    columns = torch.arange(width // PATCH, device=device)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    return torch.cat([torch.full_like(grid[:, :1], first), grid], dim=1).float()


def sequence(noisy: Tensor, source: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """Tokens and position ids of one call: noisy (B, C, 1, H, W), source like noisy or None -> (B, L or 2 L, D) and as many ids (3).

    Source tokens follow the noisy tokens, at the same rows and columns; their first id is `first`, 0 for the same positions.
    """
    h, w = noisy.shape[-2:]
    tokens, ids = pack(noisy), position_ids(h, w, 0, noisy.device)
    if source is None:
        return tokens, ids
    return torch.cat([tokens, pack(source)], dim=1), torch.cat([ids, position_ids(h, w, first, noisy.device)])


def image_grids(height: int, width: int, source_id: int | None) -> tuple[list[tuple[int, int, int]], bool]:
    """Qwen-Image's list of images (frames, rows, columns) of an H x W latent, and whether its positions are to be taken twice.

    An image's number in that list is its frame. `source_id`: that of the source tokens, 0 for the noisy tokens' own positions; None: no
    source.
    """
    grid = (1, height // PATCH, width // PATCH)
    return [grid] * ((source_id or 0) + 1), source_id == 0


def split_squares(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4C, H/2, W/2): 2x2 squares as channels, channel-major."""
    b, c, h, w = latents.shape
    squares = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH)
    return squares.permute(0, 1, 3, 5, 2, 4).reshape(b, c * PATCH * PATCH, h // PATCH, w // PATCH)


def join_squares(squares: Tensor) -> Tensor:
    """(B, 4C, H, W) -> (B, C, 2H, 2W); the inverse of `split_squares`."""
    b, d, h, w = squares.shape
    latents = squares.reshape(b, d // PATCH**2, PATCH, PATCH, h, w)
    return latents.permute(0, 1, 4, 2, 5, 3).reshape(b, d // PATCH**2, h * PATCH, w * PATCH)


# --- a latent a token, with four position axes (FLUX.2) ---


def latent_tokens(latents: Tensor) -> Tensor:
    """(B, C, 1, H, W) -> (B, HW, C)."""
    return latents.flatten(2).transpose(1, 2)


def latent_ids(height: int, width: int, first: int, device: torch.device) -> Tensor:
    """(HW, 4) ids (first, row, column, 0) of the latents of an image."""
    axes = (torch.tensor([first]), torch.arange(height), torch.arange(width), torch.tensor([0]))
    return torch.cartesian_prod(*axes).to(device)


def latent_sequence(noisy: Tensor, source: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """`sequence` of tokens of one latent each: (B, HW or 2 HW, C) and as many ids (4)."""
    h, w = noisy.shape[-2:]
    tokens, ids = latent_tokens(noisy), latent_ids(h, w, 0, noisy.device)
    if source is None:
        return tokens, ids
    return torch.cat([tokens, latent_tokens(source)], dim=1), torch.cat([ids, latent_ids(h, w, first, noisy.device)])


def tokens_to_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, HW, C) -> (B, C, 1, H, W); the inverse of `latent_tokens`."""
    b, _, c = tokens.shape
    return tokens.transpose(1, 2).reshape(b, c, 1, height, width)


def text_ids(length: int, device: torch.device) -> Tensor:
    """(L, 4) ids (0, 0, 0, number) of the tokens of a text."""
    ids = torch.zeros(length, 4, dtype=torch.long, device=device)
    ids[:, 3] = torch.arange(length, device=device)
    return ids
