"""Qwen-Image's and Krea 2's parts from single files, as ComfyUI and the makers have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import AutoencoderKLQwenImage, Krea2Transformer2DModel, QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from byg_plugin.lora import krea2_layout, qwen_layout
from byg_plugin.models import networks, qwen_files, qwen_texts
from tests.support.tiny_qwen import VOCABULARY, qwen_tokenizer, tiny_krea2, tiny_qwen
from tests.support.tiny_wan import native_vae_state

F32, BF16 = torch.float32, torch.bfloat16
KREA2 = {"attention_head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "axes_dims_rope": (8, 12, 12)}
QWEN = {"attention_head_dim": 32, "axes_dims_rope": (4, 14, 14)}


def saved(state: dict[str, Tensor], path: Path, prefix: str = "") -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


def same(loaded: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = loaded.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_qwen_image_from_one_file(tmp_path: Path, prefix: str):
    network = tiny_qwen(**QWEN)
    path = saved(network.state_dict(), tmp_path / "qwen_image.safetensors", prefix)
    loaded = qwen_files.QWEN_IMAGE.load(path, dtype=F32)
    same(loaded, network)
    assert loaded.config.axes_dims_rope == [4, 14, 14] and loaded.config.num_attention_heads == 2
    meta = qwen_files.QWEN_IMAGE.on_meta(path)
    assert meta.state_dict().keys() == network.state_dict().keys()


@pytest.mark.parametrize(("native", "prefix"), [(True, ""), (True, "model.diffusion_model."), (False, "")])
def test_krea2_from_one_file(tmp_path: Path, native: bool, prefix: str):
    network = tiny_krea2(**KREA2)
    state = network.state_dict()
    path = saved(qwen_files.to_native_krea2(state) if native else state, tmp_path / "krea2.safetensors", prefix)
    loaded = qwen_files.KREA2.load(path, dtype=F32)
    same(loaded, network)
    for name, value in network.config.items():
        if name in KREA2 or name.startswith(("text_", "num_", "timestep")):
            assert list(loaded.config[name]) == list(value) if isinstance(value, tuple) else loaded.config[name] == value, name
    half = qwen_files.KREA2.load(path, dtype=BF16)
    in_float32 = {name for name, tensor in half.state_dict().items() if tensor.dtype == F32}
    assert in_float32 == {name for name in state if "norm" in name}


def test_krea2s_native_tensors_are_all_named():
    with torch.device("meta"):
        network = Krea2Transformer2DModel()
    native = qwen_files.to_native_krea2(network.state_dict())
    assert len(native) == len(network.state_dict())
    linears = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert {linear.parts[0] for linear in krea2_layout.LAYOUT.linears()} == linears
    assert native["blocks.27.mod.lin"].shape == (6 * 6144,) and native["last.modulation.lin"].shape == (2, 6144)


def test_qwen_images_linears_are_all_named():
    with torch.device("meta"):
        network = QwenImageTransformer2DModel()
    linears = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert {linear.parts[0] for linear in qwen_layout.LAYOUT.linears()} == linears


@torch.no_grad()
def test_scaled_fp8_is_multiplied_out(tmp_path: Path):
    network = tiny_krea2(**KREA2)
    state = qwen_files.to_native_krea2(network.state_dict())
    name = "blocks.0.attn.wq.weight"
    scale = state[name].abs().max() / 448
    stored = state | {name: (state[name] / scale).to(torch.float8_e4m3fn), name.removesuffix("weight") + "scale_weight": scale}
    path = saved(stored | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "krea2_fp8_scaled.safetensors")
    loaded = qwen_files.KREA2.load(path, dtype=F32)
    got, wanted = (net.get_parameter("transformer_blocks.0.attn.to_q.weight") for net in (loaded, network))
    assert 0 < (got - wanted).abs().max() <= 0.07 * wanted.abs().max()


@torch.no_grad()
def test_vae_from_a_native_file(tmp_path: Path):
    vae = AutoencoderKLQwenImage(base_dim=4, z_dim=16).eval()
    path = saved(native_vae_state(vae), tmp_path / "qwen_image_vae.safetensors")
    loaded = qwen_files.VAE.load(path, dtype=F32)
    pixels = torch.rand(1, 3, 1, 32, 32) * 2 - 1
    assert torch.equal(loaded.encode(pixels).latent_dist.mode(), vae.encode(pixels).latent_dist.mode())
    assert loaded.config.latents_mean == AutoencoderKLQwenImage().config.latents_mean
    assert networks.vae_downsampling(qwen_files.VAE, path) == 8


LANGUAGES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3Model, {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "head_dim": 128}),
    "qwen25_vl": (
        transformers.Qwen2_5_VLTextConfig,
        transformers.Qwen2_5_VLTextModel,
        {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    ),
    "qwen3_vl": (
        transformers.Qwen3VLTextConfig,
        transformers.Qwen3VLTextModel,
        {
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
            "rope_theta": 5e6,
            "rms_norm_eps": 1e-6,
            "head_dim": 128,
        },
    ),
}


@pytest.mark.parametrize(
    ("part", "prefix"),
    [*((part, "model.") for part in LANGUAGES), *((part, "model.language_model.") for part in ("qwen25_vl", "qwen3_vl"))],
)
def test_text_encoder_from_one_file(tmp_path: Path, part: str, prefix: str):
    """Of heads of 128 channels, as every published size has; what sees is left out."""
    config, kind, own = LANGUAGES[part]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = kind(config(num_attention_heads=1, num_key_value_heads=1, **sizes, **own)).to(BF16).eval()
    model.rotary_emb = type(model.rotary_emb)(config=model.config)  # as it is loaded: in float32
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    eyes = "visual." if prefix == "model." else "model.visual."
    state |= {"lm_head.weight": torch.zeros(2, 2)} | ({f"{eyes}patch_embed.proj.weight": torch.zeros(2, 2)} if part != "qwen3" else {})
    path = saved(state, tmp_path / "encoder.safetensors")
    loaded, tokenizer = qwen_files.load_text_encoder(None, path, part, dtype=BF16)
    ids = qwen_texts.token_ids(tokenizer, ["add snow"], 32, keeps_suffix=False)
    ours, theirs = (qwen_texts.hidden_rows(qwen_texts.TextEncoder(one, qwen_tokenizer()), ids, (1, -1)) for one in (loaded, model))
    assert torch.equal(ours["qwen"], theirs["qwen"]) and ours["qwen"].std() > 0


def test_other_files_are_named(tmp_path: Path):
    edit = tiny_qwen(**QWEN).state_dict() | {"__index_timestep_zero__": torch.zeros(1)}
    path = saved(edit, tmp_path / "edit.safetensors")
    with pytest.raises(ValueError, match="__index_timestep_zero__, so it looks like Qwen-Image-Edit-2511"):
        qwen_files.QWEN_IMAGE.load(path, dtype=F32)
    with pytest.raises(ValueError, match="looks like a Qwen-Image transformer, not Krea 2's transformer"):
        qwen_files.KREA2.load(path, dtype=F32)
    path = saved(qwen_files.to_native_krea2(tiny_krea2(**KREA2).state_dict()), tmp_path / "krea2.safetensors")
    with pytest.raises(ValueError, match="looks like a Krea 2 transformer, not Qwen-Image's transformer"):
        qwen_files.QWEN_IMAGE.load(path, dtype=F32)
    cut = {
        name: tensor for name, tensor in qwen_files.to_native_krea2(tiny_krea2(**KREA2).state_dict()).items() if "blocks.1.mlp" not in name
    }
    with pytest.raises(ValueError, match=r"9 tensors are missing, such as text_fusion\.layerwise_blocks\.1\.ff\.gate\.weight"):
        qwen_files.KREA2.load(saved(cut, tmp_path / "cut.safetensors"), dtype=F32)
    state = tiny_qwen(**QWEN).state_dict() | {"more.weight": torch.zeros(2, 2), "img_in.bias": torch.zeros(3)}
    with pytest.raises(
        ValueError, match=r"1 tensors belong to no layer, such as more\.weight; 1 tensors have another shape, such as img_in"
    ):
        qwen_files.QWEN_IMAGE.load(saved(state, tmp_path / "more.safetensors"), dtype=F32)


@pytest.mark.parametrize(
    ("given", "wanted", "eyes"), [("qwen3", "qwen3_vl", None), ("qwen3_vl", "qwen3", "visual."), ("qwen3", "qwen3", "model.visual.")]
)
def test_qwen3_and_the_language_model_of_qwen3_vl_are_told_apart(tmp_path: Path, given: str, wanted: str, eyes: str | None):
    """They have the same names and, of 4B, the same shapes."""
    config, kind, own = LANGUAGES[given]
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}
    model = kind(config(num_attention_heads=1, num_key_value_heads=1, **sizes, **own))
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"{eyes}patch_embed.proj.weight": torch.zeros(2, 2)} if eyes else {}
    why = "has a vision tower, so it looks like Qwen3-VL" if eyes else "has no vision tower, so it looks like Qwen3"
    with pytest.raises(ValueError, match=why):
        qwen_files.load_text_encoder(None, saved(state, tmp_path / "encoder.safetensors"), wanted, dtype=BF16)


def test_a_wan_vae_of_other_channels_is_named(tmp_path: Path):
    """Of 48 channels it is Wan2.2 5B's."""
    state = native_vae_state(AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]))
    with pytest.raises(ValueError, match=r"a VAE of 4 latent channels, Qwen-Image's has 16"):
        qwen_files.VAE.load(saved(state, tmp_path / "vae.safetensors"), dtype=F32)


def test_a_qwen_image_with_extra_channels_is_refused():
    with pytest.raises(ValueError, match=r"in_channels = 128: looks like a model with extra channels"):
        qwen_files._refuse_other_inputs({"in_channels": 128, "out_channels": 16}, "folder")
