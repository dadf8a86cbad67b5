"""FLUX.1's files that are damaged or of something else: refused by name before weights are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from byg_plugin.models import flux_files
from tests.support.flux_files import BF16, F32, flux_output, native_file, tiny_clip, tiny_flux, tiny_t5, tiny_vae

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
        flux_files.TRANSFORMER.load(path, dtype=F32)
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
        flux_files.TRANSFORMER.load(tmp_path / "file.safetensors", dtype=F32)
    assert "file.safetensors" in str(refusal.value)
    assert "flux1-dev.safetensors" in str(refusal.value)


def test_missing_places(tmp_path: Path):
    with pytest.raises(ValueError, match="no such file or folder"):
        flux_files.VAE.load(tmp_path / "no" / "such" / "ae.safetensors", dtype=F32)
    with pytest.raises(ValueError, match="has no vae/config.json"):
        flux_files.VAE.load(tmp_path, dtype=F32)
    (tmp_path / "broken.safetensors").write_bytes(b"\x01\x02")
    with pytest.raises(ValueError, match="not a readable .safetensors"):
        flux_files.VAE.load(tmp_path / "broken.safetensors", dtype=F32)


def test_a_folder_with_pickles_only(tmp_path: Path):
    tiny_vae().save_config(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="only diffusion_pytorch_model.bin, which are not read"):
        flux_files.VAE.load(tmp_path, dtype=F32)
    with pytest.raises(ValueError, match="holds a AutoencoderKL, not a FluxTransformer2DModel"):
        flux_files.TRANSFORMER.load(tmp_path, dtype=F32)


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
        flux_files.TRANSFORMER.load(tmp_path / "f.safetensors", dtype=F32)


def test_scaled_fp8_that_cannot_be_undone(tmp_path: Path):
    state = flux_files.to_native_layout(tiny_flux().state_dict())
    state["img_in.weight"] = state["img_in.weight"].to(torch.float8_e4m3fn)
    save_file(state | {"scaled_fp8": torch.zeros(0)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="img_in.weight has no scale_weight"):
        flux_files.TRANSFORMER.load(tmp_path / "f.safetensors", dtype=F32)
    save_file(state | {"img_in.weight_scale": torch.ones(4, 4)}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="scales blocks of a weight"):
        flux_files.TRANSFORMER.load(tmp_path / "f.safetensors", dtype=F32)


def test_heads_whose_positions_cannot_be_told(tmp_path: Path):
    model = tiny_flux(attention_head_dim=16, axes_dims_rope=(4, 6, 6))
    with pytest.raises(ValueError, match="heads of 16 channels"):
        flux_files.TRANSFORMER.load(native_file(model, tmp_path / "f.safetensors"), dtype=F32)


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
        flux_files.TRANSFORMER.load(path, dtype=BF16)


def test_values_that_the_asked_dtype_cannot_hold(tmp_path: Path):
    state = flux_files.to_native_layout(tiny_flux().state_dict())
    state["img_in.weight"][0, 0] = 1e5
    save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "flux.safetensors")
    assert flux_files.TRANSFORMER.load(tmp_path / "flux.safetensors", dtype=BF16) is not None
    with pytest.raises(ValueError, match=r"img_in.weight holds NaN or infinite values as torch.float16; .*set model.dtype"):
        flux_files.TRANSFORMER.load(tmp_path / "flux.safetensors", dtype=torch.float16)


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
            flux_files.TRANSFORMER.load(tmp_path, dtype=dtype)


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
        lambda: flux_files.TRANSFORMER.on_meta(tmp_path),
        lambda: flux_files.TRANSFORMER.load(tmp_path, dtype=F32),
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
    assert torch.equal(flux_output(flux_files.TRANSFORMER.load(tmp_path, dtype=F32)), flux_output(tiny_flux()))
    assert flux_files.load_t5(tmp_path, dtype=F32)[0] is not None


def test_weights_of_a_variant_are_a_named_error(tmp_path: Path):
    folder = tmp_path / "transformer"
    tiny_flux().save_pretrained(folder, variant="fp16")
    with pytest.raises(ValueError, match=f"^{re.escape(str(folder))}: cannot be loaded"):
        flux_files.TRANSFORMER.load(tmp_path, dtype=F32)


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
        assert flux_files.TRANSFORMER.load(path, dtype=F32) is not None
        return
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*(_quantization_metadata|img_in.comfy_quant)"):
        flux_files.TRANSFORMER.on_meta(path)


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
        flux_files.TRANSFORMER.load(path, dtype=F32)


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
        flux_files.VAE.load(path, dtype=F32)
