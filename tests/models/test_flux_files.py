"""FLUX.1's files: names against diffusers' converter, loading of every layout, fingerprints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from byg_plugin.lora import flux_names
from byg_plugin.models import files, flux_files, networks
from tests.support.flux_files import BF16, F32, flux_output, native_file, tiny_clip, tiny_flux, tiny_t5, tiny_vae

# --- names ---


def test_full_size_flux_on_the_meta_device():
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(files.shipped_config("flux_dev/transformer"))
    assert len(model.transformer_blocks) == 19
    assert len(model.single_transformer_blocks) == 38
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320
    linears = list(flux_names.linears(19, 38, guidance=True))
    ours = {f"{part}.{kind}" for linear in linears for part in linear.parts for kind in ("weight", "bias")}
    ours |= {name for _, name in flux_names.norms(19, 38)}
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
    native |= {name: torch.randn(4) for name, _ in flux_names.norms(2, 2)}
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
    loaded = flux_files.TRANSFORMER.load(path, dtype=F32)
    assert loaded.config.guidance_embeds is guidance
    assert not loaded.training
    assert torch.equal(flux_output(loaded), flux_output(model))


def test_transformer_from_folders_and_a_diffusers_file(tmp_path: Path):
    model = tiny_flux()
    model.save_pretrained(tmp_path / "root" / "transformer")
    part = tmp_path / "root" / "transformer"
    loose = tmp_path / "loose.safetensors"
    save_file(model.state_dict(), loose)
    for path in (tmp_path / "root", part, part / "diffusion_pytorch_model.safetensors", loose):
        assert torch.equal(flux_output(flux_files.TRANSFORMER.load(str(path), dtype=F32)), flux_output(model))


def test_meta_transformer_has_the_loaded_ones_shapes(tmp_path: Path):
    model = tiny_flux(guidance=False)
    model.save_pretrained(tmp_path / "transformer")
    for path in (tmp_path, native_file(model, tmp_path / "flux.safetensors")):
        meta = flux_files.TRANSFORMER.on_meta(path)
        assert {p.device.type for p in meta.parameters()} == {"meta"}
        assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_dtype_is_asked_for(tmp_path: Path):
    path = native_file(tiny_flux(), tmp_path / "flux.safetensors")
    assert {p.dtype for p in flux_files.TRANSFORMER.load(path, dtype=BF16).parameters()} == {BF16}


def test_plain_fp8_is_upcast_exactly(tmp_path: Path):
    state = flux_files.to_native_layout(tiny_flux().state_dict())
    state = {n: t.to(torch.float8_e4m3fn) if n.endswith("weight") else t for n, t in state.items()}
    save_file(state, tmp_path / "fp8.safetensors")
    loaded = flux_files.TRANSFORMER.load(tmp_path / "fp8.safetensors", dtype=BF16)
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
    loaded = flux_files.TRANSFORMER.load(tmp_path / "scaled.safetensors", dtype=F32)
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
    model = flux_files.TRANSFORMER.load(path, dtype=F32)
    swapped = {"norm_out.linear.weight", "norm_out.linear.bias"}
    assert all(p.untyped_storage().data_ptr() in seen for n, p in model.named_parameters() if n not in swapped)


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
    loaded = flux_files.VAE.load(tmp_path / "ae.safetensors", dtype=F32)
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        latent = vae.encode(pixels).latent_dist.mode()
        assert torch.equal(loaded.encode(pixels).latent_dist.mode(), latent)
        assert torch.equal(loaded.decode(latent).sample, vae.decode(latent).sample)
    assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (0.3611, 0.1159)
    assert networks.vae_downsampling(flux_files.VAE, tmp_path / "ae.safetensors") == 2


def test_vae_from_folders(tmp_path: Path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    for path in (tmp_path, tmp_path / "vae", tmp_path / "vae" / "diffusion_pytorch_model.safetensors"):
        loaded = flux_files.VAE.load(str(path), dtype=F32)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), vae.parameters(), strict=True))
        assert networks.vae_downsampling(flux_files.VAE, str(path)) == 2


def test_shipped_vae_is_flux1s():
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(files.shipped_config("flux_dev/vae"))
    assert sum(p.numel() for p in vae.parameters()) == 83_819_683


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
    for path in (tmp_path, tmp_path / "text_encoder_2"):
        assert "<edit>" in flux_files.load_t5(path, dtype=F32)[1].get_vocab()


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
        t5 = T5EncoderModel(T5Config(**files.shipped_config("flux_dev/t5_xxl")))
        clip = CLIPTextModel(CLIPTextConfig(**files.shipped_config("flux_dev/clip_l")))
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
