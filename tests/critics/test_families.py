"""Every family's own autoencoder: decoded with a gradient, in tiles, and counted without weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from byg_plugin.critics.decode import Decoder
from byg_plugin.critics.memory import decoder_graph
from byg_plugin.models import make_family
from byg_plugin.models.base import Family
from tests.support.memory import most_saved
from tests.support.tiny import model_folder, tiny_config
from tests.support.tiny_flux2 import flux2_folder
from tests.support.tiny_qwen import krea2_folder, qwen_folder
from tests.support.tiny_wan import wan_config, wan_folder
from tests.support.tiny_zimage import zimage_folder

FOLDERS: dict[str, Callable[[], Path]] = {
    "flux": model_folder,
    "flux2-klein-4b": flux2_folder,
    "z-image": zimage_folder,
    "qwen-image": qwen_folder,
    "krea2": krea2_folder,
    "wan2.1-t2v-1.3b": lambda: wan_folder(1),
}
CPU = torch.device("cpu")


def family(name: str, tmp_path: Path) -> Family:
    if name.startswith("wan"):
        return make_family(wan_config(tmp_path, name, dataset={"frames": 1}, model={"path": str(FOLDERS[name]())}))
    return make_family(tiny_config(tmp_path, model={"family": name, "path": str(FOLDERS[name]())}))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tile", [None, 32])
@pytest.mark.parametrize("name", FOLDERS)
def test_the_gradient_is_the_difference(name: str, tile: int | None, tmp_path: Path):
    one = family(name, tmp_path)
    vae: Any = one.load_vae(CPU).double()
    pixels = torch.rand(1, 3, 1, 64, 96, generator=torch.Generator().manual_seed(0)) - 0.5
    latents = one.encode_pixels(vae, pixels).double()
    decoder = Decoder(one, vae, tile)
    decoded = decoder.pixels(latents)
    assert decoded.shape == (1, 3, 64, 96) and decoded.dtype == torch.float64 and decoded.std() > 1e-4
    rng = torch.Generator().manual_seed(1)
    weights, direction = (torch.randn(like.shape, generator=rng, dtype=torch.float64) for like in (decoded, latents))
    step = 1e-7
    up, down = ((decoder.pixels(latents + sign * step * direction) * weights).sum().item() for sign in (1, -1))
    pulled = (decoder.pull_back(latents, weights) * direction).sum().item()
    assert pulled != 0 and (up - down) / (2 * step) == pytest.approx(pulled, rel=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_its_graph_is_counted_without_weights(name: str, tmp_path: Path):
    one = family(name, tmp_path)
    meta, vae = one.meta_vae(), one.load_vae(CPU)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert sum(p.numel() for p in meta.parameters()) == sum(p.numel() for p in vae.parameters())
    latents = one.encode_pixels(vae, torch.zeros(1, 3, 1, 64, 64))
    measured, _ = most_saved(lambda: Decoder(one, vae, recompute=False).pull_back(latents, torch.ones(1, 3, 64, 64)))
    assert decoder_graph(one, meta, 64, 64, None, recompute=False) == pytest.approx(measured, rel=0.1)


def test_wans_own_tiles_are_not_inside_ours(tmp_path: Path):
    one = make_family(
        wan_config(tmp_path, "wan2.1-t2v-1.3b", dataset={"frames": 1, "vae_tiling": True}, model={"path": str(wan_folder(1))})
    )
    vae: Any = one.load_vae(CPU)
    assert vae.use_tiling
    Decoder(one, vae, 64)
    assert not vae.use_tiling
