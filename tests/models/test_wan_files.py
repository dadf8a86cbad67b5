"""Wan's files: names against diffusers' converter, loading of every layout, and refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import save_file

from byg_plugin.lora import wan_names
from byg_plugin.models import files, wan_files
from byg_plugin.models.wan import _saved_boundary
from tests.support.tiny_wan import native_vae_state, tiny_umt5, tiny_vae, tiny_wan, wan_folder, wan_latents, wan_texts, write_wan

BF16, F32 = torch.bfloat16, torch.float32
ONE_HEAD = {"num_attention_heads": 1, "attention_head_dim": 128}


def native_file(model: WanTransformer3DModel, path: Path, prefix: str = "") -> Path:
    state = wan_files.to_native_layout(model.state_dict())
    assert len(state) == len(model.state_dict())
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


@torch.no_grad()
def output(model: WanTransformer3DModel) -> torch.Tensor:
    return model(wan_latents(2, 3), torch.tensor([300.0, 800.0]), wan_texts(2, 4)["umt5"], return_dict=False)[0]


# --- names ---


@pytest.mark.parametrize(
    ("changes", "count", "linears"),
    [
        ({}, 14_288_491_584, 400),
        ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1_418_996_800, 300),
        ({"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}, 4_999_787_712, 300),
    ],
    ids=["14b", "1.3b", "5b"],
)
def test_full_size_names_are_both_diffusers_own_and_what_its_converter_makes(changes: dict, count: int, linears: int):
    with torch.device("meta"):
        model = WanTransformer3DModel.from_config(files.shipped_config("wan/transformer") | changes)
    assert sum(p.numel() for p in model.parameters()) == count
    blocks = model.config.num_layers
    names = dict(wan_names.tensors(blocks))
    assert set(names.values()) == set(model.state_dict())
    native = wan_files.to_native_layout(model.state_dict())
    converted = convert_wan_transformer_to_diffusers(dict(native))
    assert {name: tensor.shape for name, tensor in converted.items()} == {n: t.shape for n, t in model.state_dict().items()}
    in_blocks = [linear for linear in wan_names.linears(blocks) if linear.native.startswith("blocks.")]
    assert len(in_blocks) == linears


def test_looking_names_up_in_every_spelling():
    for linear in wan_names.linears(3):
        for spelling in (linear.native, linear.native.replace(".", "_")):
            assert wan_names.find_native(spelling) == linear
        for spelling in (linear.parts[0], linear.parts[0].replace(".", "_")):
            assert wan_names.find_part(spelling) == (linear, 0)
    assert wan_names.find_native("blocks.0.self_attn.norm_q") is None
    assert wan_names.find_part("blocks.0.attn1") is None


# --- transformers ---


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_native_file_gives_identical_outputs(tmp_path: Path, prefix: str):
    model = tiny_wan(**ONE_HEAD)
    path = native_file(model, tmp_path / "wan.safetensors", prefix)
    loaded = wan_files.LOW_NOISE.load(path, dtype=F32)
    for key in ("num_attention_heads", "ffn_dim", "num_layers", "text_dim", "freq_dim", "in_channels", "patch_size"):
        assert tuple(torch.atleast_1d(torch.tensor(loaded.config[key]))) == tuple(torch.atleast_1d(torch.tensor(model.config[key]))), key
    loaded.rope = model.rope  # the file's rope is as long as Wan's, the tiny one's is shorter
    assert torch.equal(output(loaded), output(model))


def test_rope_of_a_file_is_the_models_own(tmp_path: Path):
    model = tiny_wan(**ONE_HEAD, rope_max_seq_len=1024)
    loaded = wan_files.TRANSFORMER.load(native_file(model, tmp_path / "wan.safetensors"), dtype=F32)
    assert torch.equal(loaded.rope.freqs_cos, model.rope.freqs_cos)
    assert torch.equal(output(loaded), output(model))


def test_folder_and_its_second_expert():
    root = wan_folder()
    experts = (wan_files.TRANSFORMER, wan_files.LOW_NOISE)
    high, low = (expert.load(root, dtype=F32) for expert in experts)
    assert torch.equal(output(high), output(tiny_wan(0)))
    assert torch.equal(output(low), output(tiny_wan(7)))
    for expert, expected in zip(experts, (high, low), strict=True):
        meta = expert.on_meta(root)
        assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}


def test_16_bit_keeps_time_norms_and_modulation_in_float32_from_file_and_folder(tmp_path: Path):
    model = tiny_wan(**ONE_HEAD)
    model.save_pretrained(tmp_path / "folder" / "transformer")
    from_file = wan_files.TRANSFORMER.load(native_file(model, tmp_path / "wan.safetensors"), dtype=BF16)
    from_folder = wan_files.TRANSFORMER.load(tmp_path / "folder", dtype=BF16)
    kinds = {name: p.dtype for name, p in from_file.named_parameters()}
    assert kinds == {name: p.dtype for name, p in from_folder.named_parameters()}
    assert kinds["condition_embedder.time_embedder.linear_1.weight"] == kinds["blocks.0.scale_shift_table"] == F32
    assert kinds["blocks.0.attn1.to_q.weight"] == BF16


def test_scaled_fp8(tmp_path: Path):
    model = tiny_wan(**ONE_HEAD)
    state = wan_files.to_native_layout(model.state_dict())
    stored = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in state.items():
        if name.startswith("blocks.") and name.endswith((".q.weight", ".0.weight")):
            scale = tensor.abs().max() / 448
            stored |= {name: (tensor / scale).to(torch.float8_e4m3fn), name.removesuffix("weight") + "scale_weight": scale}
        else:
            stored[name] = tensor.contiguous()
    save_file(stored, tmp_path / "fp8.safetensors")
    loaded = wan_files.to_native_layout(wan_files.TRANSFORMER.load(tmp_path / "fp8.safetensors", dtype=F32).state_dict())
    for name in ("blocks.1.self_attn.q.weight", "blocks.0.ffn.0.weight"):
        assert not torch.equal(loaded[name], state[name])
        torch.testing.assert_close(loaded[name], state[name], rtol=0.07, atol=1e-3)
    assert torch.equal(loaded["blocks.0.ffn.2.weight"], state["blocks.0.ffn.2.weight"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"img_emb.proj.0.weight": torch.zeros(2)}, "image-to-video"),
        ({"vace_patch_embedding.weight": torch.zeros(2)}, "VACE"),
        ({"blocks.0.face.weight": torch.zeros(2)}, "blocks.0.face.weight"),
    ],
)
def test_relatives_are_refused_by_name(tmp_path: Path, extra: dict[str, torch.Tensor], message: str):
    state = wan_files.to_native_layout(tiny_wan(**ONE_HEAD).state_dict())
    save_file({n: t.contiguous() for n, t in (state | extra).items()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        wan_files.TRANSFORMER.load(tmp_path / "other.safetensors", dtype=F32)
    assert "other.safetensors" in str(error.value)


def test_channels_of_image_to_video_are_refused(tmp_path: Path):
    path = native_file(tiny_wan(**ONE_HEAD, in_channels=36), tmp_path / "i2v.safetensors")
    with pytest.raises(ValueError, match="takes 36 channels and returns 16.*image-to-video"):
        wan_files.TRANSFORMER.on_meta(path)


def test_a_file_of_another_model_and_a_pickle(tmp_path: Path):
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match=r"relative of FLUX.*not a Wan text-to-video transformer"):
        wan_files.TRANSFORMER.load(tmp_path / "flux.safetensors", dtype=F32)
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickle"):
        wan_files.load_umt5(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", dtype=F32)


# --- VAE and text encoder ---


def test_vae_from_a_native_file(tmp_path: Path):
    vae = tiny_vae(num_res_blocks=2)
    save_file(native_vae_state(vae), tmp_path / "wan_2.1_vae.safetensors")
    loaded = wan_files.VAE.load(tmp_path / "wan_2.1_vae.safetensors", dtype=F32)
    pixels = torch.rand(1, 3, 5, 16, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(loaded.encode(pixels).latent_dist.mode(), vae.encode(pixels).latent_dist.mode())
    assert wan_files.VAE.config_of(tmp_path / "wan_2.1_vae.safetensors")["scale_factor_spatial"] == 8
    assert torch.tensor(loaded.config.latents_mean).sum() != 0


FIVE_B: dict[str, Any] = files.shipped_config("wan/vae_5b") | {"base_dim": 4, "decoder_base_dim": 8}


def native_5b_vae_state(vae: AutoencoderKLWan) -> dict[str, torch.Tensor]:
    """The same of the 5B's VAE, whose levels hold numbered blocks: the resampler is the last one of its level."""
    out = {}
    for name, tensor in native_vae_state(vae).items():
        new = re.sub(r"^(encoder\.downsamples|decoder\.up_blocks)\.(\d)\.(?:down|up)sampler\.", r"\1.\2.LAST.", name)
        new = re.sub(r"^encoder\.downsamples\.(\d)\.(?:resnets\.)?", r"encoder.downsamples.\1.downsamples.", new)
        new = re.sub(r"^decoder\.upsamples\.(\d+)\.", lambda m: f"decoder.upsamples.{int(m[1]) // 4}.upsamples.{int(m[1]) % 4}.", new)
        new = new.replace("decoder.up_blocks", "decoder.upsamples").replace(".3.LAST", ".3.upsamples.3")
        out[re.sub(r"^decoder\.upsamples\.(\d)\.LAST", r"decoder.upsamples.\1.upsamples.3", new).replace("LAST", "2")] = tensor
    return out


def test_the_5b_vae_from_a_native_file(tmp_path: Path):
    torch.manual_seed(4)
    vae = AutoencoderKLWan.from_config(FIVE_B).eval()
    state = native_5b_vae_state(vae)
    assert {
        "encoder.downsamples.1.downsamples.0.shortcut.weight",
        "encoder.downsamples.1.downsamples.2.time_conv.weight",
        "decoder.upsamples.0.upsamples.3.resample.1.weight",
        "decoder.upsamples.3.upsamples.2.residual.6.bias",
    } <= state.keys()
    save_file(state, tmp_path / "wan2.2_vae.safetensors")
    loaded = wan_files.VAE.load(tmp_path / "wan2.2_vae.safetensors", dtype=F32)
    assert loaded.config.latents_std == FIVE_B["latents_std"] and len(loaded.config.latents_mean) == 48
    with torch.no_grad():
        latents = vae.encode(torch.rand(1, 3, 5, 32, 64) * 2 - 1).latent_dist.mode()
        assert torch.equal(loaded.decode(latents).sample, vae.decode(latents).sample)
    assert wan_files.VAE.config_of(tmp_path / "wan2.2_vae.safetensors")["scale_factor_spatial"] == 16


def test_a_vae_of_other_channels_is_refused(tmp_path: Path):
    save_file(native_vae_state(tiny_vae(num_res_blocks=2, z_dim=8)), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=r"8 latent channels"):
        wan_files.VAE.load(tmp_path / "vae.safetensors", dtype=F32)


def test_full_size_vae_and_umt5_on_the_meta_device():
    with torch.device("meta"):
        vae = AutoencoderKLWan.from_config(files.shipped_config("wan/vae"))
        umt5 = wan_files.UMT5EncoderModel(wan_files.UMT5Config(**files.shipped_config("wan/umt5_xxl")))
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531
    assert sum(p.numel() for p in umt5.parameters()) == 5_680_910_336


def test_umt5_from_a_file_has_the_shipped_tokenizer(tmp_path: Path):
    model = tiny_umt5(256384)
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items() if "embed_tokens" not in name}
    save_file(state | {"spiece_model": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "umt5_xxl_fp16.safetensors")
    loaded, tokenizer = wan_files.load_umt5(tmp_path / "umt5_xxl_fp16.safetensors", dtype=F32)
    ids = tokenizer(["a red circle"], padding="max_length", max_length=6, truncation=True, return_tensors="pt").input_ids
    assert tokenizer.convert_ids_to_tokens(ids[0].tolist()) == ["▁a", "▁red", "▁circle", "</s>", "<pad>", "<pad>"]
    assert tokenizer.encode("把圆变成蓝色")[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in tokenizer.encode("把圆变成蓝色")
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)
    before = files.weights_fingerprint(tmp_path / "umt5_xxl_fp16.safetensors", "umt5")
    state["shared.weight"] = state["shared.weight"] + 1
    save_file(state, tmp_path / "umt5_xxl_fp16.safetensors")
    assert files.weights_fingerprint(tmp_path / "umt5_xxl_fp16.safetensors", "umt5") != before


def test_t5_in_umt5s_place_is_refused(tmp_path: Path):
    state = {n: t.contiguous().clone() for n, t in tiny_umt5(50).state_dict().items() if "block.1.layer.0.SelfAttention.relative" not in n}
    save_file({n: t for n, t in state.items() if "embed_tokens" not in n}, tmp_path / "t5.safetensors")
    with pytest.raises(ValueError, match=r"looks like T5.*use umt5_xxl"):
        wan_files.load_umt5(tmp_path / "t5.safetensors", dtype=F32)


def test_missing_second_expert_is_named(tmp_path: Path):
    write_wan(tmp_path, experts=1)
    with pytest.raises(ValueError, match="transformer_2/config.json"):
        wan_files.LOW_NOISE.load(tmp_path, dtype=F32)


def test_values_that_are_no_numbers(tmp_path: Path):
    model = tiny_wan(**ONE_HEAD)
    model.state_dict()["blocks.1.attn2.to_k.weight"][0, 0] = float("nan")
    path = native_file(model, tmp_path / "wan.safetensors")
    with pytest.raises(ValueError, match=r"wan.safetensors: tensor blocks.1.cross_attn.k.weight holds NaN or infinite"):
        wan_files.TRANSFORMER.load(path, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "transformer_2")
    with pytest.raises(ValueError, match=r"transformer_2.*safetensors: tensor blocks.1.attn2.to_k.weight holds NaN or infinite"):
        wan_files.LOW_NOISE.load(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"boundary_ratio": "0.9"}', '{"boundary_ratio": NaN}'])
def test_damaged_model_indexes(tmp_path: Path, text: str):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match="^" + re.escape(str(tmp_path / "model_index.json"))):
        _saved_boundary(str(tmp_path))
