"""FLUX.1's files: names against diffusers' converter, loading of every layout, and refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from byg_plugin.lora import flux_names
from byg_plugin.models import files, flux_files

BF16, F32 = torch.bfloat16, torch.float32


def tiny_flux(guidance: bool = True, **changes: object) -> FluxTransformer2DModel:
    """A random two-plus-three-block FLUX with heads of 32 channels, which split like FLUX.1's 128."""
    torch.manual_seed(0)
    options = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "guidance_embeds": guidance,
        "axes_dims_rope": (4, 14, 14),
    }
    return FluxTransformer2DModel(**(options | changes)).eval()


@torch.no_grad()
def flux_output(model: FluxTransformer2DModel) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    ids = torch.stack([torch.zeros(6), torch.arange(6) // 3, torch.arange(6) % 3], dim=1).float()
    return model(
        hidden_states=torch.randn(2, 6, 16, generator=g),
        timestep=torch.tensor([0.3, 0.8]),
        guidance=torch.tensor([3.5, 2.0]) if model.config.guidance_embeds else None,
        encoder_hidden_states=torch.randn(2, 5, 24, generator=g),
        pooled_projections=torch.randn(2, 20, generator=g),
        txt_ids=torch.zeros(5, 3),
        img_ids=ids,
        return_dict=False,
    )[0]


def native_file(model: FluxTransformer2DModel, path: Path, prefix: str = "") -> Path:
    state = flux_files.to_native_layout(model.state_dict())
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, path)
    return path


# --- names ---


def test_full_size_flux_on_the_meta_device():
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(flux_files.shipped_config("transformer"))
    assert len(model.transformer_blocks) == 19
    assert len(model.single_transformer_blocks) == 38
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320
    linears = list(flux_names.linears(19, 38, guidance=True))
    ours = {f"{part}.{kind}" for linear in linears for part in linear.parts for kind in ("weight", "bias")}
    ours |= {f"{name}.weight" for _, name in flux_names.norms(19, 38)}
    assert ours == set(model.state_dict())
    assert len(flux_files.to_native_layout(model.state_dict())) == 780


def test_native_names_are_those_of_diffusers_converter():
    """Shapes need the real width 3072, which that converter has written in; one input column keeps them small."""
    rows = {"linear1": 7 * 3072, "qkv": 3 * 3072}
    native = {}
    for linear in flux_names.linears(2, 2, guidance=True):
        out = rows.get(linear.native.rsplit(".", 1)[-1], 8)
        native[f"{linear.native}.weight"] = torch.randn(out, 1)
        native[f"{linear.native}.bias"] = torch.randn(out)
    native |= {f"{name}.scale": torch.randn(4) for name, _ in flux_names.norms(2, 2)}
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(native))
    back = flux_files.to_native_layout(theirs)
    assert back.keys() == native.keys()
    assert all(torch.equal(back[name], native[name]) for name in native)


# --- transformer ---


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("guidance", [True, False])
def test_transformer_from_a_native_file_gives_identical_outputs(tmp_path: Path, prefix: str, guidance: bool):
    model = tiny_flux(guidance)
    path = native_file(model, tmp_path / "flux.safetensors", prefix)
    loaded = flux_files.load_flux_transformer(path, dtype=F32)
    assert loaded.config.guidance_embeds is guidance
    assert not loaded.training
    assert torch.equal(flux_output(loaded), flux_output(model))


def test_transformer_from_folders_and_a_diffusers_file(tmp_path: Path):
    model = tiny_flux()
    model.save_pretrained(tmp_path / "root" / "transformer")
    part = tmp_path / "root" / "transformer"
    loose = tmp_path / "loose.safetensors"
    save_file(model.state_dict(), loose)
    for place in (tmp_path / "root", part, part / "diffusion_pytorch_model.safetensors", loose):
        assert torch.equal(flux_output(flux_files.load_flux_transformer(str(place), dtype=F32)), flux_output(model))


def test_meta_transformer_has_the_loaded_ones_shapes(tmp_path: Path):
    model = tiny_flux(guidance=False)
    model.save_pretrained(tmp_path / "transformer")
    for place in (tmp_path, native_file(model, tmp_path / "flux.safetensors")):
        meta = flux_files.flux_transformer_on_meta(place)
        assert {p.device.type for p in meta.parameters()} == {"meta"}
        assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_dtype_is_asked_for(tmp_path: Path):
    path = native_file(tiny_flux(), tmp_path / "flux.safetensors")
    assert {p.dtype for p in flux_files.load_flux_transformer(path, dtype=BF16).parameters()} == {BF16}


def test_plain_fp8_is_upcast_exactly(tmp_path: Path):
    state = flux_files.to_native_layout(tiny_flux().state_dict())
    state = {n: t.to(torch.float8_e4m3fn) if n.endswith("weight") else t for n, t in state.items()}
    save_file(state, tmp_path / "fp8.safetensors")
    loaded = flux_files.load_flux_transformer(tmp_path / "fp8.safetensors", dtype=BF16)
    back = flux_files.to_native_layout(loaded.state_dict())
    assert torch.equal(back["double_blocks.1.img_attn.qkv.weight"], state["double_blocks.1.img_attn.qkv.weight"].to(BF16))


@pytest.mark.parametrize(("suffix", "per_row"), [("scale_weight", False), ("weight_scale", False), ("weight_scale", True)])
def test_scaled_fp8_is_multiplied_out(tmp_path: Path, suffix: str, per_row: bool):
    native = flux_files.to_native_layout(tiny_flux().state_dict())
    stored: dict[str, torch.Tensor] = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    expected = {}
    for name, tensor in native.items():
        stored[name] = expected[name] = tensor
        if not name.endswith(".weight") or "_blocks." not in name:
            continue
        scale = tensor.abs().amax(dim=1, keepdim=True) / 400 if per_row else tensor.abs().max() / 400
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        layer = name.removesuffix(".weight")
        stored[f"{layer}.{suffix}"] = scale
        if suffix == "weight_scale":
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode())).byte()
        expected[name] = stored[name].float() * scale
    if suffix == "weight_scale":
        del stored["scaled_fp8"]
    prefixed = {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in stored.items()}
    save_file(prefixed, tmp_path / "scaled.safetensors")
    loaded = flux_files.load_flux_transformer(tmp_path / "scaled.safetensors", dtype=F32)
    back = flux_files.to_native_layout(loaded.state_dict())
    assert all(torch.equal(back[name], expected[name]) for name in native)
    name = "single_blocks.0.linear1.weight"
    assert not torch.equal(back[name], stored[name].float()), "a scale of 1 would make this test pass without scaling"


def test_nothing_is_read_twice_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Parameters are the tensors that were read: no initialised copy is made first."""
    path = native_file(tiny_flux(), tmp_path / "flux.safetensors")
    seen = []
    read = files.Weights.read

    def spy(self, name, dtype, rows=None):
        tensor = read(self, name, dtype, rows)
        seen.append(tensor.untyped_storage().data_ptr())
        return tensor

    monkeypatch.setattr(files.Weights, "read", spy)
    model = flux_files.load_flux_transformer(path, dtype=F32)
    swapped = {"norm_out.linear.weight", "norm_out.linear.bias"}
    assert all(p.untyped_storage().data_ptr() in seen for n, p in model.named_parameters() if n not in swapped)


# --- autoencoder ---


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    config = flux_files.shipped_config("vae") | {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    }
    return AutoencoderKL.from_config(config).eval()


def ldm_names(state: dict[str, torch.Tensor], blocks: int) -> dict[str, torch.Tensor]:
    """A hand-written diffusers -> ae.safetensors renaming, independent of the converter under test."""

    def rename(name: str) -> str:
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        for theirs, ldm in (
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ):
            name = name.replace(f"mid_block.attentions.0.{theirs}.", f"mid.attn_1.{ldm}.")
        return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")

    out = {rename(name): tensor for name, tensor in state.items()}
    return {n: t[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", n) else t for n, t in out.items()}


@pytest.mark.parametrize("prefix", ["", "vae."])
def test_vae_from_ae_file(tmp_path: Path, prefix: str):
    vae = tiny_vae()
    state = ldm_names(vae.state_dict(), blocks=2)
    save_file({prefix + name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "ae.safetensors")
    loaded = flux_files.load_flux_vae(tmp_path / "ae.safetensors", dtype=F32)
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        latent = vae.encode(pixels).latent_dist.mode()
        assert torch.equal(loaded.encode(pixels).latent_dist.mode(), latent)
        assert torch.equal(loaded.decode(latent).sample, vae.decode(latent).sample)
    assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (0.3611, 0.1159)
    assert flux_files.vae_downsampling(tmp_path / "ae.safetensors") == 2


def test_vae_from_folders(tmp_path: Path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    for place in (tmp_path, tmp_path / "vae", tmp_path / "vae" / "diffusion_pytorch_model.safetensors"):
        loaded = flux_files.load_flux_vae(str(place), dtype=F32)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), vae.parameters(), strict=True))
        assert flux_files.vae_downsampling(str(place)) == 2


def test_shipped_vae_is_flux1s():
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(flux_files.shipped_config("vae"))
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683


# --- text encoders ---


def tiny_clip(vocabulary: int = 49408) -> CLIPTextModel:
    torch.manual_seed(0)
    config = flux_files.shipped_config("clip_l") | {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "projection_dim": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
    }
    return CLIPTextModel(CLIPTextConfig(**config)).eval()


def tiny_t5(vocabulary: int = 32128) -> T5EncoderModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(**(flux_files.shipped_config("t5_xxl") | sizes))).eval()


def clip_state(model: CLIPTextModel) -> dict[str, torch.Tensor]:
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "text_encoders.clip_l.transformer."])
def test_clip_from_a_single_file(tmp_path: Path, prefix: str):
    model = tiny_clip()
    beside = {"logit_scale": torch.ones(()), "text_projection.weight": torch.randn(64, 64)}
    save_file({prefix + n: t.contiguous() for n, t in (clip_state(model) | beside).items()}, tmp_path / "clip_l.safetensors")
    loaded, tokenizer = flux_files.load_clip_l(tmp_path / "clip_l.safetensors", dtype=F32)
    ids = tokenizer("a photo of a cat", padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded(ids).pooler_output, model(ids).pooler_output)


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight"])
def test_t5_from_a_single_file(tmp_path: Path, embedding: str):
    model = tiny_t5()
    state = {n: t for n, t in model.state_dict().items() if n not in ("shared.weight", "encoder.embed_tokens.weight")}
    state |= {embedding: model.shared.weight.detach().clone(), "spiece_model": torch.zeros(3, dtype=torch.uint8)}
    save_file(state, tmp_path / "t5xxl_fp16.safetensors")
    loaded, tokenizer = flux_files.load_t5(tmp_path / "t5xxl_fp16.safetensors", dtype=F32)
    ids = tokenizer("make it snow", padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, model(ids).last_hidden_state)
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight, "two parameters would be moved to a GPU twice"


def test_t5_fp8_scaled(tmp_path: Path):
    state = dict(tiny_t5().state_dict())
    state.pop("encoder.embed_tokens.weight", None)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    stored = (state[name] / 0.25).to(torch.float8_e4m3fn)
    state |= {name: stored, name.replace(".weight", ".scale_weight"): torch.tensor(0.25), "scaled_fp8": torch.zeros(0)}
    save_file(state, tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors")
    loaded, _ = flux_files.load_t5(tmp_path / "t5xxl_fp8_e4m3fn_scaled.safetensors", dtype=F32)
    assert torch.equal(loaded.get_parameter(name), stored.float() * 0.25)


def test_text_encoders_of_a_root_folder_bring_their_own_tokenizers(tmp_path: Path):
    tiny_clip().save_pretrained(tmp_path / "text_encoder")
    tiny_t5().save_pretrained(tmp_path / "text_encoder_2")
    _, clip_tokenizer = flux_files.load_clip_l(tmp_path, dtype=F32)
    _, t5_tokenizer = flux_files.load_t5(tmp_path, dtype=F32)
    clip_tokenizer.add_tokens(["<edit>"])
    t5_tokenizer.add_tokens(["<edit>"])
    clip_tokenizer.save_pretrained(tmp_path / "tokenizer")
    t5_tokenizer.save_pretrained(tmp_path / "tokenizer_2")
    with pytest.raises(ValueError, match="49409 tokens, the text encoder knows 49408"):
        flux_files.load_clip_l(tmp_path, dtype=F32)
    for place in (tmp_path, tmp_path / "text_encoder_2"):
        assert "<edit>" in flux_files.load_t5(place, dtype=F32)[1].get_vocab()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path: Path):
    state = {n: t for n, t in tiny_t5(vocabulary=100).state_dict().items() if n != "encoder.embed_tokens.weight"}
    save_file(state, tmp_path / "t5.safetensors")
    with pytest.raises(ValueError, match="32100 tokens, the text encoder knows 100"):
        flux_files.load_t5(tmp_path / "t5.safetensors", dtype=F32)


def test_shipped_tokenizers_give_the_known_ids():
    clip = files.load_tokenizer(Path(__file__), "clip", 77)
    t5 = files.load_tokenizer(Path(__file__), "t5", 512)
    assert clip("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert clip("A  photo of a\ncat").input_ids == clip("a photo of a cat").input_ids
    assert t5("translate English to German: Hello").input_ids == [13959, 1566, 12, 2968, 10, 8774, 1]
    assert (len(clip), len(t5), t5.pad_token_id, t5.eos_token_id, t5.convert_tokens_to_ids("▁the")) == (
        49408,
        32100,
        0,
        1,
        8,
    )
    padded = clip(["cat", "a cat"], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert padded.shape == (2, 77)
    assert padded[0].tolist()[:4] == [49406, 2368, 49407, 49407]
    assert t5("x " * 900, truncation=True, max_length=512).input_ids[-1] == 1


def test_shipped_text_configs_are_flux1s():
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(**flux_files.shipped_config("t5_xxl")))
        clip = CLIPTextModel(CLIPTextConfig(**flux_files.shipped_config("clip_l")))
    assert sum(p.numel() for p in t5.parameters()) == 4_762_310_656
    assert sum(p.numel() for p in clip.parameters()) == 123_060_480


# --- fingerprints ---


def test_fingerprint_follows_the_weights_and_not_the_place(tmp_path: Path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "a" / "vae")
    vae.save_pretrained(tmp_path / "b")
    first = files.weights_fingerprint(tmp_path / "a", "vae")
    assert files.weights_fingerprint(tmp_path / "b", "vae") == first
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1)
    vae.save_pretrained(tmp_path / "b")
    assert files.weights_fingerprint(tmp_path / "b", "vae") != first
    config = json.loads((tmp_path / "a" / "vae" / "config.json").read_text())
    (tmp_path / "a" / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 1.0}))
    assert files.weights_fingerprint(tmp_path / "a", "vae") != first


def test_fingerprint_covers_the_tokenizer(tmp_path: Path):
    tiny_t5().save_pretrained(tmp_path / "text_encoder_2")
    _, tokenizer = flux_files.load_t5(tmp_path, dtype=F32)
    shipped = files.weights_fingerprint(tmp_path, "t5")
    tokenizer.save_pretrained(tmp_path / "tokenizer_2")
    own = files.weights_fingerprint(tmp_path, "t5")
    tokenizer.add_tokens(["<edit>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer_2")
    assert len({shipped, own, files.weights_fingerprint(tmp_path, "t5")}) == 3


def test_fingerprint_of_a_large_file_samples_it_and_of_a_missing_hub_id_says_what_to_run(tmp_path: Path):
    path = tmp_path / "big.safetensors"
    save_file({"a": torch.zeros(3_000_000)}, path)
    first = files.weights_fingerprint(path, "vae")
    save_file({"a": torch.ones(3_000_000)}, path)
    assert files.weights_fingerprint(path, "vae") != first
    with pytest.raises(ValueError, match="hf download nobody/nothing"):
        files.weights_fingerprint("nobody/nothing", "vae")


def test_fingerprint_of_a_hub_id_is_that_of_its_cached_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_t5().save_pretrained(tmp_path / "text_encoder_2")
    cached = str(tmp_path / "text_encoder_2" / "config.json")
    monkeypatch.setattr(files, "try_to_load_from_cache", lambda repo, name: cached)
    with pytest.raises(ValueError, match="owner/flux: the tokenizer of its t5 is not in the local hub cache"):
        files.weights_fingerprint("owner/flux", "t5")
    flux_files.load_t5(tmp_path, dtype=F32)[1].save_pretrained(tmp_path / "tokenizer_2")
    assert files.weights_fingerprint("owner/flux", "t5") == files.weights_fingerprint(tmp_path, "t5")


# --- refusals ---


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flux.ckpt", "looks like a pickle"),
        ("flux1-dev-Q4_K_S.gguf", "GGUF files are quantised"),
        ("model-00001-of-00003.safetensors", "one shard of several"),
        ("flux.onnx", "not a .safetensors file"),
    ],
)
def test_files_that_are_not_read(tmp_path: Path, name: str, message: str):
    path = tmp_path / name
    path.write_bytes(b"x")
    with pytest.raises(ValueError, match=message) as refusal:
        flux_files.load_flux_transformer(path, dtype=F32)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("transformer_blocks.0.qkv_proj.wscales", "nunchaku"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "looks like a LoRA"),
        ("double_stream_modulation_img.lin.weight", "FLUX.2"),
        ("blocks.0.self_attn.q.weight", "Wan transformer"),
        ("decoder.up.0.block.0.conv1.weight", "looks like a VAE"),
        ("something", "unknown layout"),
    ],
)
def test_layouts_that_are_not_flux(tmp_path: Path, tensor: str, message: str):
    save_file({tensor: torch.zeros(2, 2)}, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match=message) as refusal:
        flux_files.load_flux_transformer(tmp_path / "file.safetensors", dtype=F32)
    assert "file.safetensors" in str(refusal.value)
    assert "flux1-dev.safetensors" in str(refusal.value)


def test_missing_places(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file or folder"):
        flux_files.load_flux_vae(tmp_path / "no" / "such" / "ae.safetensors", dtype=F32)
    with pytest.raises(ValueError, match="has no vae/config.json"):
        flux_files.load_flux_vae(tmp_path, dtype=F32)
    (tmp_path / "broken.safetensors").write_bytes(b"\x01\x02")
    with pytest.raises(ValueError, match="not a readable .safetensors"):
        flux_files.load_flux_vae(tmp_path / "broken.safetensors", dtype=F32)


def test_a_folder_with_pickles_only(tmp_path: Path):
    tiny_vae().save_config(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="only diffusion_pytorch_model.bin, which are not read"):
        flux_files.load_flux_vae(tmp_path, dtype=F32)
    with pytest.raises(ValueError, match="holds a AutoencoderKL, not a FluxTransformer2DModel"):
        flux_files.load_flux_transformer(tmp_path, dtype=F32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"double_blocks.0.img_mod.lin.bias": None}, "has no tensor double_blocks.0.img_mod.lin.bias"),
        ({"double_blocks.0.hyper.weight": torch.zeros(1)}, "tensors that FLUX.1 does not have"),
        ({"img_in.weight": torch.zeros(2, 2, dtype=torch.uint8)}, "stored as U8"),
        ({"img_in.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}')).byte()}, "quantised as nvfp4"),
        ({"img_in.weight": torch.zeros(64, 99)}, "Fill, Depth or Canny|of another shape"),
    ],
)
def test_damaged_or_other_native_files(tmp_path: Path, change: dict[str, torch.Tensor | None], message: str):
    state = flux_files.to_native_layout(tiny_flux().state_dict()) | change
    save_file({name: tensor.contiguous() for name, tensor in state.items() if tensor is not None}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=message):
        flux_files.load_flux_transformer(tmp_path / "f.safetensors", dtype=F32)


def test_scaled_fp8_that_cannot_be_undone(tmp_path: Path):
    state = flux_files.to_native_layout(tiny_flux().state_dict())
    state["img_in.weight"] = state["img_in.weight"].to(torch.float8_e4m3fn)
    save_file(state | {"scaled_fp8": torch.zeros(0)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="img_in.weight has no scale_weight"):
        flux_files.load_flux_transformer(tmp_path / "f.safetensors", dtype=F32)
    save_file(state | {"img_in.weight_scale": torch.ones(4, 4)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="scales blocks of a weight"):
        flux_files.load_flux_transformer(tmp_path / "f.safetensors", dtype=F32)


def test_heads_whose_positions_cannot_be_told(tmp_path: Path):
    model = tiny_flux(attention_head_dim=16, axes_dims_rope=(4, 6, 6))
    with pytest.raises(ValueError, match="heads of 16 channels"):
        flux_files.load_flux_transformer(native_file(model, tmp_path / "f.safetensors"), dtype=F32)


def test_neighbours_of_the_text_encoders_are_named(tmp_path: Path):
    t5 = tiny_t5().state_dict()
    t5.pop("encoder.embed_tokens.weight", None)
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file(t5 | {bias.format(1): t5[bias.format(0)].clone()}, tmp_path / "umt5.safetensors")
    with pytest.raises(ValueError, match="UMT5"):
        flux_files.load_t5(tmp_path / "umt5.safetensors", dtype=F32)
    save_file({"text_model.embeddings.token_embedding.weight": torch.zeros(10, 1280)}, tmp_path / "clip_g.safetensors")
    with pytest.raises(ValueError, match="CLIP-G: 1280"):
        flux_files.load_clip_l(tmp_path / "clip_g.safetensors", dtype=F32)


# --- values and shards ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["double_blocks.1.txt_attn.qkv.weight", "img_in.bias", "single_blocks.0.norm.key_norm.scale"])
def test_a_file_with_one_value_that_is_no_number(tmp_path: Path, name: str, value: float):
    state = flux_files.to_native_layout(tiny_flux().state_dict())
    state[name].view(-1)[-1] = value
    path = tmp_path / "flux.safetensors"
    save_file({f"model.diffusion_model.{n}": t.contiguous() for n, t in state.items()}, path)
    message = f"^{re.escape(str(path))}: tensor model.diffusion_model.{name} holds NaN or infinite values as torch.bfloat16; download it"
    with pytest.raises(ValueError, match=message):
        flux_files.load_flux_transformer(path, dtype=BF16)


def test_values_that_the_asked_dtype_cannot_hold(tmp_path: Path):
    state = flux_files.to_native_layout(tiny_flux().state_dict())
    state["img_in.weight"][0, 0] = 1e5
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "flux.safetensors")
    assert flux_files.load_flux_transformer(tmp_path / "flux.safetensors", dtype=BF16) is not None
    with pytest.raises(ValueError, match=r"img_in.weight holds NaN or infinite values as torch.float16; .*set model.dtype"):
        flux_files.load_flux_transformer(tmp_path / "flux.safetensors", dtype=torch.float16)


def sharded(folder: Path, change: dict[str, float] | None = None) -> list[Path]:
    """A tiny FLUX in several shards, as large models are saved; `change`: the last value of some tensors."""
    model = tiny_flux()
    for name, value in (change or {}).items():
        model.state_dict()[name].view(-1)[-1] = value
    model.save_pretrained(folder, max_shard_size="500KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    return shards


def test_a_folder_with_one_value_that_is_no_number(tmp_path: Path):
    name = "transformer_blocks.0.attn.to_q.weight"
    shards = sharded(tmp_path / "transformer", {name: float("nan")})
    index = json.loads((tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    holder = next(shard for shard in shards if shard.name == index["weight_map"][name])
    for dtype in (F32, BF16):
        with pytest.raises(ValueError, match=f"^{re.escape(str(holder))}: tensor {name} holds NaN or infinite"):
            flux_files.load_flux_transformer(tmp_path, dtype=dtype)


def test_text_encoders_of_a_folder_are_looked_at_too(tmp_path: Path):
    t5, clip = tiny_t5(), tiny_clip()
    for model, folder in ((t5, "text_encoder_2"), (clip, "text_encoder")):
        next(iter(model.parameters())).data.view(-1)[0] = float("inf")
        model.save_pretrained(tmp_path / folder)
    for load in (flux_files.load_t5, flux_files.load_clip_l):
        with pytest.raises(ValueError, match=r"model.safetensors: tensor .* holds NaN or infinite"):
            load(tmp_path, dtype=F32)


def shard_missing(folder: Path, shards: list[Path]) -> str:
    shards[1].unlink()
    return f"^{re.escape(str(shards[1]))}: missing, and diffusion_pytorch_model.safetensors.index.json names it; download"


def shard_cut(folder: Path, shards: list[Path]) -> str:
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    return f"^{re.escape(str(shards[1]))}: not a readable .safetensors file"


def shard_of_another(folder: Path, shards: list[Path]) -> str:
    shards[1].write_bytes(shards[0].read_bytes())
    return f"^{re.escape(str(shards[1]))}: has no tensor .*, which diffusion_pytorch_model.safetensors.index.json says is in it"


def index_of_text(text: str) -> Callable[[Path, list[Path]], str]:
    def change(folder: Path, shards: list[Path]) -> str:
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
        return r"diffusion_pytorch_model.safetensors.index.json: "

    return change


def configuration_of_text(text: str) -> Callable[[Path, list[Path]], str]:
    def change(folder: Path, shards: list[Path]) -> str:
        (folder / "config.json").write_text(text)
        return r"config.json: (cannot be read as JSON|holds no object)"

    return change


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "damage",
    [
        shard_missing,
        shard_cut,
        shard_of_another,
        *(
            index_of_text(text)
            for text in ("{", "[]", "{}", '{"metadata": {}, "weight_map": []}', '{"metadata": {}, "weight_map": {"a": 1}}', DEEP)
        ),
        *(configuration_of_text(text) for text in ("{", "[]", DEEP)),
    ],
)
def test_damaged_folders_are_seen_before_weights_are_read(tmp_path: Path, damage: Callable[[Path, list[Path]], str]):
    folder = tmp_path / "transformer"
    message = damage(folder, sharded(folder))
    looks: list[Callable[[], object]] = [
        lambda: flux_files.flux_transformer_on_meta(tmp_path),
        lambda: flux_files.load_flux_transformer(tmp_path, dtype=F32),
    ]
    for look in looks:
        with pytest.raises(ValueError, match=message):
            look()


def test_what_the_libraries_do_not_read_is_no_matter(tmp_path: Path):
    """A whole file beside a stale index (transformers), the index of a variant, a Mac's hidden files."""
    stale = '{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}'
    tiny_flux().save_pretrained(tmp_path / "transformer")
    tiny_t5().save_pretrained(tmp_path / "text_encoder_2")
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text(stale)
    (tmp_path / "transformer" / "._diffusion_pytorch_model.safetensors").write_bytes(b"Mac OS X")
    (tmp_path / "text_encoder_2" / "model.safetensors.index.json").write_text(stale)
    assert torch.equal(flux_output(flux_files.load_flux_transformer(tmp_path, dtype=F32)), flux_output(tiny_flux()))
    assert flux_files.load_t5(tmp_path, dtype=F32)[0] is not None


def test_weights_of_a_variant_are_a_named_error(tmp_path: Path):
    folder = tmp_path / "transformer"
    tiny_flux().save_pretrained(folder, variant="fp16")
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}: cannot be loaded"):
        flux_files.load_flux_transformer(tmp_path, dtype=F32)


@pytest.mark.parametrize(
    ("metadata", "tensor"),
    [
        ({"_quantization_metadata": "{"}, None),
        ({"_quantization_metadata": DEEP}, None),
        ({"_quantization_metadata": "[]"}, None),
        ({"_quantization_metadata": '{"layers": []}'}, None),
        ({"_quantization_metadata": '{"layers": [1]}'}, None),
        ({"_quantization_metadata": '{"layers": {"img_in": 1}}'}, None),
        ({}, list(b"{")),
        ({}, list(b"[]")),
        ({}, list(b"[" * 100_000)),
        ({}, [200]),
    ],
)
def test_damaged_quantisation_headers(tmp_path: Path, metadata: dict[str, str], tensor: list[int] | None):
    state = {name: tensor.contiguous() for name, tensor in flux_files.to_native_layout(tiny_flux().state_dict()).items()}
    path = tmp_path / "f.safetensors"
    save_file(state | ({} if tensor is None else {"img_in.comfy_quant": torch.tensor(tensor).byte()}), path, metadata=metadata)
    if metadata == {"_quantization_metadata": '{"layers": []}'}:
        assert flux_files.load_flux_transformer(path, dtype=F32) is not None
        return
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*(_quantization_metadata|img_in.comfy_quant)"):
        flux_files.flux_transformer_on_meta(path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_tokenizer_nested_without_end(tmp_path: Path, name: str):
    tiny_clip().save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / name).write_text(DEEP)
    with pytest.raises(ValueError, match=f"{name}: cannot be read as JSON"):
        flux_files.load_clip_l(tmp_path, dtype=F32)


@pytest.mark.parametrize("name", ["img_in.weight", "double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.norm.query_norm.scale"])
@pytest.mark.parametrize("shape", [None, (), (3,), (2, 2, 2), (0, 4)])
@pytest.mark.parametrize("dtype", [F32, torch.float8_e4m3fn])
def test_shapes_that_are_none_of_flux(tmp_path: Path, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype):
    state = {n: t.contiguous() for n, t in flux_files.to_native_layout(tiny_flux().state_dict()).items()}
    del state[name]
    path = tmp_path / "f.safetensors"
    save_file(state if shape is None else state | {name: torch.ones(shape).to(dtype)}, path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: "):
        flux_files.load_flux_transformer(path, dtype=F32)


@pytest.mark.parametrize("name", ["decoder.conv_in.weight", "decoder.mid.attn_1.q.weight", "encoder.down.0.block.0.conv1.bias"])
def test_a_vae_without_one_tensor(tmp_path: Path, name: str):
    names = [
        "decoder.up.0.block.0.conv1.weight",
        "decoder.conv_in.weight",
        "decoder.mid.attn_1.q.weight",
        "encoder.down.0.block.0.conv1.bias",
    ]
    path = tmp_path / "ae.safetensors"
    save_file({n: torch.ones(8, 8, 3, 3) for n in names if n != name}, path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: "):
        flux_files.load_flux_vae(path, dtype=F32)
