"""Our Wan against ComfyUI's own model and key map, from the checkout that `COMFYUI` names."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from byg_plugin.lora import formats as lora_formats
from byg_plugin.lora import wan_names
from byg_plugin.models import make_family, wan_files
from byg_plugin.models.wan import to_wan_timestep
from tests.support.tiny_wan import TEXT_TOKENS, TEXT_WIDTH, tiny_wan, wan_config, wan_latents, wan_texts

CHECKOUT = os.environ.get("COMFYUI")
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(not CHECKOUT, reason="COMFYUI does not name a ComfyUI checkout (folder with comfy/lora.py)"),
]
T = torch.tensor([0.31, 0.77])


@pytest.fixture(scope="module")
def comfy() -> Iterator[SimpleNamespace]:
    """ComfyUI's modules that are needed here."""
    root = Path(str(CHECKOUT)).expanduser()
    sys.path.insert(0, str(root))
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True  # before model_management looks for a GPU
        import comfy.ldm.wan.model
        import comfy.ldm.wan.vae2_2
        import comfy.lora
        import comfy.model_base
        import comfy.ops
        import comfy.supported_models

        yield SimpleNamespace(
            lora=comfy.lora,
            bases=comfy.model_base,
            models=comfy.supported_models,
            wan=comfy.ldm.wan.model,
            vae_5b=comfy.ldm.wan.vae2_2,
            ops=comfy.ops,
        )
    finally:
        sys.path.remove(str(root))


def theirs(comfy: SimpleNamespace) -> Any:
    """ComfyUI's Wan with the tiny network's weights."""
    network = tiny_wan()
    model = comfy.wan.WanModel(
        model_type="t2v",
        dim=24,
        ffn_dim=32,
        freq_dim=16,
        text_dim=TEXT_WIDTH,
        text_len=TEXT_TOKENS,
        num_heads=2,
        num_layers=2,
        in_dim=16,
        out_dim=16,
        operations=comfy.ops.disable_weight_init,
        dtype=torch.float32,
        device="cpu",
    )
    model.load_state_dict(wan_files.to_native_layout(network.state_dict()))
    return model.eval()


@torch.no_grad()
def ours(tmp_path: Path, position: str, source: Tensor | None) -> Tensor:
    family = make_family(wan_config(tmp_path, "wan2.1-t2v-1.3b", conditioning={"position": position}))
    return family.velocity(tiny_wan(), wan_latents(2, 1), T, wan_texts(2, 9), source)


@torch.no_grad()
def test_without_source_both_are_one_model(comfy: SimpleNamespace, tmp_path: Path):
    v = theirs(comfy)(wan_latents(2, 1), to_wan_timestep(T), wan_texts(2, 9)["umt5"])
    torch.testing.assert_close(ours(tmp_path, "same", None), v, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_same_positions_are_stacked_frames_whose_rotation_is_repeated(comfy: SimpleNamespace, tmp_path: Path):
    model, x, source = theirs(comfy), wan_latents(2, 1), wan_latents(2, 2)
    encode = type(model).rope_encode
    model.rope_encode = lambda t, h, w, **options: torch.cat([encode(model, x.shape[2], h, w, **options)] * 2, dim=1)
    v = model(x, to_wan_timestep(T), wan_texts(2, 9)["umt5"], time_dim_concat=source)
    torch.testing.assert_close(ours(tmp_path, "same", source), v, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_bernini_is_one_more_rotation_by_comfyuis_own_function(comfy: SimpleNamespace, tmp_path: Path):
    """Also for releases without in-context latents: what they multiply the source's rotation with later."""
    from comfy.ldm.flux.math import rope

    model, x, source = theirs(comfy), wan_latents(2, 1), wan_latents(2, 2)
    encode = type(model).rope_encode

    def both(t: int, h: int, w: int, **options: Any) -> Tensor:
        plain = encode(model, x.shape[2], h, w, **options)
        turn = rope(torch.ones(1, 1), 12, 10000).reshape(1, 1, 1, 6, 2, 2).to(plain)
        return torch.cat([plain, plain @ turn], dim=1)

    model.rope_encode = both
    v = model(x, to_wan_timestep(T), wan_texts(2, 9)["umt5"], time_dim_concat=source)
    torch.testing.assert_close(ours(tmp_path, "bernini", source), v, rtol=1e-5, atol=1e-5)
    assert (ours(tmp_path, "same", source) - v).abs().max() > 3e-4


@torch.no_grad()
def test_bernini_is_stock_context_latents(comfy: SimpleNamespace, tmp_path: Path):
    if "source_id" not in inspect.signature(comfy.wan.WanModel.rope_encode).parameters:
        pytest.skip("this ComfyUI is older than in-context latents (0.24)")
    source = wan_latents(2, 2)
    v = theirs(comfy)(wan_latents(2, 1), to_wan_timestep(T), wan_texts(2, 9)["umt5"], context_latents=[source])
    torch.testing.assert_close(ours(tmp_path, "bernini", source), v, rtol=1e-5, atol=1e-5)


def test_every_saved_key_of_a_full_expert_is_in_the_key_map(comfy: SimpleNamespace):
    config = {
        "image_model": "wan2.1",
        "model_type": "t2v",
        "dim": 5120,
        "ffn_dim": 13824,
        "num_heads": 40,
        "num_layers": 40,
        "in_dim": 16,
        "out_dim": 16,
    }
    with torch.device("meta"):
        model = comfy.bases.WAN21(comfy.models.WAN21_T2V(config), device=torch.device("meta"))
    key_map = comfy.lora.model_lora_keys_unet(model, {})
    tensors = {}
    for linear in (linear.at(block) for block in range(40) for linear in wan_names.BLOCK):
        for letter in "AB":
            tensors[f"transformer.{linear.parts[0]}.lora_{letter}.weight"] = torch.ones(1, 1)
    for to in ("comfyui", "musubi"):
        saved = lora_formats.convert(tensors, to, family="wan2.2-t2v-a14b")
        patches = comfy.lora.load_lora(saved, key_map)
        assert len(patches) == 400
    assert len(comfy.lora.load_lora(tensors, key_map)) == 0


@torch.no_grad()
def test_the_5b_vae_is_the_same(comfy: SimpleNamespace, tmp_path: Path):
    """One file, their autoencoder and ours: the same latents and the same pixels."""
    torch.manual_seed(5)
    vae = comfy.vae_5b.WanVAE(dim=8, dec_dim=8, z_dim=48, temperal_downsample=[False, True, True]).eval()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(vae.state_dict(), tmp_path / "wan2.2_vae.safetensors")
    loaded = wan_files.VAE.load(tmp_path / "wan2.2_vae.safetensors", dtype=torch.float32)
    pixels = torch.rand(1, 3, 5, 32, 64) * 2 - 1
    latents = vae.encode(pixels)
    torch.testing.assert_close(loaded.encode(pixels).latent_dist.mode(), latents, rtol=1e-4, atol=1e-5)
    theirs_decoded = vae.decode(latents).clamp(-1, 1)  # diffusers clamps, ComfyUI's caller does
    torch.testing.assert_close(loaded.decode(latents).sample, theirs_decoded, rtol=1e-4, atol=1e-5)
    assert theirs_decoded.abs().max() < 1
