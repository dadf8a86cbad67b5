"""FLUX.2 klein's and Z-Image's parts from single files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from byg_plugin.models import flux2_files, flux_files, networks, zimage_files
from tests.support.flux_files import tiny_flux as tiny_flux1
from tests.support.tiny import tiny_flux
from tests.support.tiny_flux2 import tiny_flux2, tiny_flux2_vae
from tests.support.tiny_zimage import tiny_zimage

F32 = torch.float32
MAKERS: dict[str, Any] = {"flux2": (flux2_files, tiny_flux2), "zimage": (zimage_files, tiny_zimage)}


def saved(state: dict[str, Tensor], path: Path, prefix: str = "") -> Path:
    save_file({prefix + name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


def same(loaded: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = loaded.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize(("native", "prefix"), [(True, ""), (True, "model.diffusion_model."), (False, "")])
def test_a_transformer_from_one_file(tmp_path: Path, family: str, native: bool, prefix: str):
    files, make = MAKERS[family]
    network = make()
    state = files.to_native_layout(network.state_dict()) if native else network.state_dict()
    path = saved(state | ({"norm_final.weight": torch.ones(4)} if family == "zimage" else {}), tmp_path / "model.safetensors", prefix)
    loaded = files.TRANSFORMER.load(path, dtype=F32)
    same(loaded, network)
    told = {"axes_lens", "guidance_embeds"}  # not by shapes
    for name, value in network.config.items():
        if name not in told and not name.startswith("_") and value is not None:
            found = loaded.config[name]
            assert (list(found) if isinstance(found, (list, tuple)) else found) == (list(value) if isinstance(value, tuple) else value), (
                name
            )
    assert files.TRANSFORMER.on_meta(path).state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize("family", MAKERS)
def test_scaled_fp8_is_multiplied_out(tmp_path: Path, family: str):
    files, make = MAKERS[family]
    network = make()
    state = files.to_native_layout(network.state_dict())
    name = "double_blocks.0.img_attn.qkv" if family == "flux2" else "layers.0.attention.qkv"
    state[f"{name}.weight"], scale = (state[f"{name}.weight"] * 100).to(torch.float8_e4m3fn), torch.tensor(0.01)
    loaded = files.TRANSFORMER.load(saved(state | {f"{name}.weight_scale": scale}, tmp_path / "f.safetensors"), dtype=F32).state_dict()
    part = "transformer_blocks.0.attn.to_k.weight" if family == "flux2" else "layers.0.attention.to_k.weight"
    wanted = network.state_dict()[part]
    assert 0 < (loaded[part] - wanted).abs().max() <= 0.07 * wanted.abs().max()


@pytest.mark.parametrize("inside", [True, False])
def test_the_autoencoder_from_one_file(tmp_path: Path, inside: bool):
    """Quantisation convolutions lie inside encoder and decoder, as its makers have them, or beside, as ComfyUI does."""
    vae = tiny_flux2_vae(norm_num_groups=32, block_out_channels=(32, 32, 32, 64))
    loaded = flux2_files.VAE.load(saved(native_vae(vae.state_dict(), inside), tmp_path / "flux2-vae.safetensors"), dtype=F32)
    same(loaded, vae)
    assert loaded.bn.eps == 1e-4 and networks.vae_downsampling(flux2_files.VAE, tmp_path / "flux2-vae.safetensors") == 8


def native_vae(state: dict[str, Tensor], inside: bool) -> dict[str, Tensor]:
    """diffusers' names -> those of Black Forest Labs' file, for an autoencoder of four levels of one block."""
    names = {
        "encoder.down_blocks": "encoder.down",
        "decoder.up_blocks": "decoder.up",
        "resnets": "block",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "mid_block.block.0": "mid.block_1",
        "mid_block.block.1": "mid.block_2",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_q": "mid.attn_1.q",
        "mid_block.attentions.0.to_k": "mid.attn_1.k",
        "mid_block.attentions.0.to_v": "mid.attn_1.v",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
    }
    native = {}
    for name, tensor in state.items():
        own = name
        for ours, theirs in names.items():
            own = own.replace(ours, theirs)
        if own.startswith("decoder.up."):
            _, _, level, rest = own.split(".", 3)
            own = f"decoder.up.{3 - int(level)}.{rest}"
        if inside and own.startswith(("quant_conv", "post_quant_conv")):
            own = ("encoder." if own.startswith("quant") else "decoder.") + own
        native[own] = (
            tensor[:, :, None, None] if "attn_1" in own and own.endswith(("q.weight", "k.weight", "v.weight", "out.weight")) else tensor
        )
    return native


# --- refusals ---


@pytest.mark.parametrize("family", MAKERS)
def test_other_networks_are_named(tmp_path: Path, family: str):
    files, _ = MAKERS[family]
    flux = saved(flux_files.to_native_layout(tiny_flux().state_dict()), tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match=r"looks like a relative of FLUX .*not .*'s transformer; use "):
        files.TRANSFORMER.load(flux, dtype=F32)
    other = next(name for name in MAKERS if name != family)
    foreign = saved(MAKERS[other][0].to_native_layout(MAKERS[other][1]().state_dict()), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match={"flux2": "looks like a FLUX.2", "zimage": "looks like a Z-Image"}[other]):
        files.TRANSFORMER.on_meta(foreign)


def test_flux2_dev_is_told_by_its_guidance(tmp_path: Path):
    tiny_flux2(guidance_embeds=True).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="looks like FLUX.2 dev; use FLUX.2 klein base"):
        flux2_files.TRANSFORMER.load(tmp_path, dtype=F32)
    state = tiny_flux2(guidance_embeds=True).state_dict()
    with pytest.raises(ValueError, match="looks like FLUX.2 dev, whose text encoder"):
        flux2_files.TRANSFORMER.on_meta(saved(state, tmp_path / "dev.safetensors"))
    state = flux2_files.to_native_layout(tiny_flux2().state_dict()) | {"guidance_in.in_layer.weight": torch.zeros(4, 4)}
    with pytest.raises(ValueError, match="looks like FLUX.2 dev, whose text encoder"):
        flux2_files.TRANSFORMER.on_meta(saved(state, tmp_path / "native.safetensors"))


def test_a_vae_without_statistics_is_refused(tmp_path: Path):
    state = {name: tensor for name, tensor in tiny_flux2_vae().state_dict().items() if not name.startswith("bn.")}
    with pytest.raises(ValueError, match="has no bn.running_mean"):
        flux2_files.VAE.load(saved(state, tmp_path / "ae.safetensors"), dtype=F32)


@pytest.mark.parametrize("make", [tiny_flux1, tiny_flux2])
def test_norms_as_comfyui_saves_them(tmp_path: Path, make: Any):
    """It loads `query_norm.scale` as `query_norm.weight`, and saves that."""
    files = flux2_files if make is tiny_flux2 else flux_files
    network = make()
    state = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in files.to_native_layout(network.state_dict()).items()}
    assert sum(name.endswith("_norm.weight") for name in state) > 4
    path = saved(state, tmp_path / "model.safetensors")
    same(files.TRANSFORMER.load(path, dtype=F32), network)
    assert files.TRANSFORMER.on_meta(path).state_dict().keys() == network.state_dict().keys()


def test_z_image_omni_is_told_by_its_embedder(tmp_path: Path):
    state = zimage_files.to_native_layout(tiny_zimage().state_dict()) | {"siglip_embedder.0.weight": torch.zeros(4)}
    path = saved(state, tmp_path / "omni.safetensors")
    for look in (zimage_files.TRANSFORMER.on_meta, lambda path: zimage_files.TRANSFORMER.load(path, dtype=F32)):
        with pytest.raises(ValueError, match=r"looks like Z-Image Omni, whose input is not supplied here"):
            look(path)
    with pytest.raises(ValueError, match="siglip_feat_dim is set: looks like Z-Image Omni"):
        zimage_files._refuse_other_inputs({"siglip_feat_dim": 1152}, "folder")
