"""The decoder with gradient: recomputed and in tiles it is the same decoder, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from byg_plugin.critics.decode import Decoder, _windows, recompute_
from tests.support.critic_runs import flux, latents, vae
from tests.support.memory import most_saved


def along(pixels: Tensor) -> Tensor:
    return torch.randn(pixels.shape, generator=torch.Generator().manual_seed(4), dtype=pixels.dtype)


def plain(family: Any, decoder: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] and the gradient of <along, pixels>, in one graph."""
    leaf = x.clone().requires_grad_()
    pixels = (family.decode_latents(decoder, leaf)[:, :, 0] + 1) / 2
    return pixels.detach(), torch.autograd.grad((pixels * along(pixels)).sum(), leaf)[0]


def test_recomputed_it_is_the_plain_decoder():
    family, x = flux(), latents()
    pixels, gradient = plain(family, vae(), x)
    assert pixels.std() > 0.02 and (pixels.clamp(0.001, 0.999) == pixels).float().mean() > 0.5, "not all of it is clamped"
    decoder = Decoder(family, vae())
    assert not decoder.pixels(x).requires_grad and (decoder.pixels(x) - pixels).abs().max() <= 1e-12
    assert (decoder.pull_back(x, along(pixels)) - gradient).abs().max() <= 1e-10 * gradient.abs().max()


def test_its_gradient_is_the_difference():
    family, x = flux(), latents()
    decoder = Decoder(family, vae())
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    weights, step = along(decoder.pixels(x)), 1e-7  # shorter than to the nearest clamped pixel
    up, down = (((decoder.pixels(x + sign * step * direction)) * weights).sum() for sign in (1, -1))
    pulled = (decoder.pull_back(x, weights) * direction).sum().item()
    assert ((up - down) / (2 * step)).item() == pytest.approx(pulled, rel=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tile", [32, 48])
def test_the_gradient_of_tiles_is_that_of_the_tiled_picture(tile: int, recompute: bool):
    family, x = flux(), latents(8, 11)
    decoder = Decoder(family, vae(), tile, recompute=recompute)
    pixels = decoder.pixels(x)
    assert pixels.shape == (2, 3, 64, 88)
    weights = along(pixels)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    step = 1e-5
    up, down = ((decoder.pixels(x + sign * step * direction) * weights).sum() for sign in (1, -1))
    pulled = (decoder.pull_back(x, weights) * direction).sum().item()
    assert ((up - down) / (2 * step)).item() == pytest.approx(pulled, rel=1e-5)


class Pointwise:
    """A family whose decoder looks at one latent at a time, 4 pixels a side: tiles of it have no seams."""

    def decode_latents(self, vae: nn.Module, x: Tensor) -> Tensor:
        return (x[:, :3].repeat_interleave(4, -1).repeat_interleave(4, -2) * 0.3).tanh()


class NoVae(nn.Module):
    decoder = nn.Module()


@pytest.mark.parametrize("size", [(5, 9), (12, 4), (16, 16), (3, 3)])
def test_what_tiles_share_adds_up_to_the_whole(size: tuple[int, int]):
    x = latents(*size)
    whole, tiled = (Decoder(Pointwise(), NoVae(), tile) for tile in (None, 16))  # type: ignore[arg-type]
    pixels = whole.pixels(x)
    assert pixels.shape[-2:] == (size[0] * 4, size[1] * 4) and pixels.std() > 0.02
    assert (tiled.pixels(x) - pixels).abs().max() <= 1e-12
    weights = along(pixels)
    assert (tiled.pull_back(x, weights) - whole.pull_back(x, weights)).abs().max() <= 1e-12


def test_a_tile_as_large_as_the_picture_is_the_picture():
    family, x = flux(), latents()
    whole, tiled = Decoder(family, vae()), Decoder(family, vae(), 64)
    assert torch.equal(whole.pixels(x), tiled.pixels(x))


def test_recomputing_and_tiles_keep_less():
    """Counted as what autograd saves at once; the results of recomputing are the plain decoder's to 1e-6 in float32."""
    family, x = flux(), latents(12, 12, 1, torch.float32)
    weights = along(plain(family, vae(torch.float32), x)[0])
    pulled: dict[str, Tensor] = {}
    kept: dict[str, int] = {}
    for name, options in {"plain": {"recompute": False}, "recomputed": {}, "tiles": {"tile": 48}}.items():
        decoder = Decoder(family, vae(torch.float32), **options)  # type: ignore[arg-type]
        kept[name], pulled[name] = most_saved(lambda decoder=decoder: decoder.pull_back(x, weights))  # type: ignore[misc]
    assert (pulled["recomputed"] - pulled["plain"]).abs().max() <= 1e-6 * pulled["plain"].abs().max()
    assert kept["recomputed"] < 0.6 * kept["plain"] and kept["tiles"] < 0.5 * kept["recomputed"], kept


def test_blocks_that_count_their_calls_are_left_alone():
    from diffusers import AutoencoderKLWan

    made = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    before = [type(module).forward for module in made.decoder.modules()]
    recompute_(made)
    assert all("forward" not in vars(module) for module in made.decoder.modules()) and before


def test_neighbours_fade_into_each_other():
    """At the middle of what two tiles share each counts for half, at its end one of them alone."""
    windows = _windows(12, 8, 4, torch.zeros((), dtype=torch.float64))
    assert [start for start, _ in windows] == [0, 4] and all(len(weight) == 32 for _, weight in windows)
    first, second = (weight for _, weight in windows)
    assert torch.allclose(first[16:] + second[:16], torch.ones(16, dtype=torch.float64))
    assert first[:16].eq(1).all() and second[16:].eq(1).all()
    assert first[16:24].diff().le(0).all() and first[31] < 0.1 and second[0] < 0.1
