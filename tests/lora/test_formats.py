"""LoRA formats: exact conversions, files that other tools load, reports, refusals."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from byg_plugin.lora import files as lora_files
from byg_plugin.lora import formats as lora_formats
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.check import check, runtime
from byg_plugin.models import flux_files
from tests.support.lora_files import BLOCKS, DEFAULT, DOUBLE_ONLY, METADATA, SINGLES, full_size_peft, kohya, output, peft_lora, tiny_flux


def every_linear() -> list[str]:
    return [name for name, module in tiny_flux().named_modules() if isinstance(module, torch.nn.Linear)]


def updates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a native-named file adds to each native weight, computed from the definition alpha / rank * up @ down."""
    out = {}
    for key, down in tensors.items():
        if key.endswith(".lora_down.weight"):
            layer = key.removesuffix(".lora_down.weight")
            scale = tensors[f"{layer}.alpha"].item() / down.shape[0]
            out[layer] = scale * tensors[f"{layer}.lora_up.weight"] @ down
    return out


def merged_into_native_file(tensors: dict[str, Tensor], path: Path) -> Path:
    """The tiny FLUX in native layout with a musubi-named LoRA added by hand."""
    native = flux_files.to_native_layout(tiny_flux().state_dict())
    flat = {name.removesuffix(".weight").replace(".", "_"): name for name in native if name.endswith(".weight")}
    for layer, update in updates(tensors).items():
        name = flat[layer.removeprefix("lora_unet_")]
        native[name] = native[name] + update
    save_file({name: tensor.contiguous() for name, tensor in native.items()}, path)
    return path


# --- files that others load ---


def test_our_file_loads_in_diffusers_and_reproduces_the_output(tmp_path: Path):
    tensors, edited = peft_lora()
    lora_files.write_lora(tmp_path / "lora.safetensors", tensors, METADATA)
    model = tiny_flux()
    pipe = FluxPipeline(None, None, None, None, None, None, model)
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
    assert (output(model) - output(tiny_flux())).abs().max() > 1e-2
    torch.testing.assert_close(output(model), edited, rtol=0, atol=1e-6)


def test_musubi_conversion_added_to_native_weights_gives_the_same_output(tmp_path: Path):
    tensors, edited = peft_lora()
    converted = lora_formats.convert(tensors, "musubi")
    assert len(updates(converted)) == 8 * BLOCKS + 2 * SINGLES
    merged = flux_files.TRANSFORMER.load(merged_into_native_file(converted, tmp_path / "f.safetensors"), dtype=torch.float32)
    torch.testing.assert_close(output(merged), edited, rtol=0, atol=2e-5)


def test_layers_outside_the_blocks_convert_too_with_their_halves_swapped(tmp_path: Path):
    """`norm_out` is (scale, shift) in diffusers and (shift, scale) in native files."""
    tensors, edited = peft_lora(every_linear())
    named = {key.split(".lora_")[0] for key in tensors}
    assert {"transformer.norm_out.linear", "transformer.x_embedder", "transformer.proj_out"} <= named
    converted = lora_formats.convert(tensors, "comfyui")
    flat = {}
    for key, tensor in converted.items():
        suffix = next(s for s in (".lora_down.weight", ".lora_up.weight", ".alpha") if key.endswith(s))
        flat["lora_unet_" + key.removeprefix("diffusion_model.").removesuffix(suffix).replace(".", "_") + suffix] = tensor
    merged = flux_files.TRANSFORMER.load(merged_into_native_file(flat, tmp_path / "f.safetensors"), dtype=torch.float32)
    torch.testing.assert_close(output(merged), edited, rtol=0, atol=5e-5)


def test_native_named_files_load_in_diffusers(tmp_path: Path):
    """Double blocks only: diffusers splits a single block's linear1 at FLUX.1's real width."""
    tensors, edited = peft_lora(DOUBLE_ONLY)
    for to in ("musubi", "comfyui"):
        converted = lora_formats.convert(tensors, to)
        lora_files.write_lora(tmp_path / f"{to}.safetensors", converted, METADATA)
        model = tiny_flux()
        FluxPipeline(None, None, None, None, None, None, model).load_lora_weights(str(tmp_path / f"{to}.safetensors"))
        torch.testing.assert_close(output(model), edited, rtol=0, atol=1e-6)
        assert not check(converted, METADATA, ["diffusers"]).loses


# --- exactness ---


def test_round_trip_is_bit_for_bit():
    tensors, _ = peft_lora(every_linear())
    converted = lora_formats.convert(tensors, "comfyui")
    back = lora_formats.convert(converted, "diffusers")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_fused_layers_stack_different_matrices_and_keep_shared_ones():
    tensors, _ = peft_lora()
    layer = "transformer.transformer_blocks.1.attn.to_{}.lora_A.weight"
    converted = lora_formats.convert(tensors, "musubi")
    qkv = "lora_unet_double_blocks_1_img_attn_qkv"
    assert converted[f"{qkv}.lora_down.weight"].shape == (12, 64)
    assert converted["lora_unet_single_blocks_0_linear1.lora_down.weight"].shape == (16, 64)
    expected = torch.cat([tensors[layer.format(n).replace("_A", "_B")] @ tensors[layer.format(n)] for n in "qkv"])
    torch.testing.assert_close(updates(converted)[qkv], expected)
    shared = dict(tensors) | {layer.format(n): tensors[layer.format("q")] for n in "kv"}
    converted = lora_formats.convert(shared, "musubi")
    assert converted[f"{qkv}.lora_down.weight"].shape == (4, 64)
    expected = torch.cat([shared[layer.format(n).replace("_A", "_B")] @ shared[layer.format(n)] for n in "qkv"])
    torch.testing.assert_close(updates(converted)[qkv], expected)


def test_parts_of_one_matrix_but_of_different_strength_are_not_merged():
    layer = "transformer.transformer_blocks.0.attn.to_"
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    tensors = {f"{layer}{n}.{m}.weight": t for n in "qkv" for m, t in (("lora_A", down), ("lora_B", up))}
    tensors[f"{layer}k.alpha"] = torch.tensor(1.0)
    update = updates(lora_formats.convert(tensors, "musubi"))["lora_unet_double_blocks_0_img_attn_qkv"]
    torch.testing.assert_close(update, torch.cat([up @ down, 0.5 * up @ down, up @ down]))


@pytest.mark.parametrize("missing", ["to_q", "to_k", "proj_mlp"])
def test_a_part_without_lora_gets_zero_rows(missing: str):
    layer = "transformer.single_transformer_blocks.0."
    tensors, _ = peft_lora()
    kept = {k: v for k, v in tensors.items() if k.startswith(layer) and missing not in k}
    native = updates(lora_formats.convert(kept, "musubi"))["lora_unet_single_blocks_0_linear1"]
    rows = dict(zip(("to_q", "to_k", "to_v", "proj_mlp"), native.split([64, 64, 64, 256]), strict=True))
    for name, piece in rows.items():
        if name == missing:
            assert not piece.any()
        else:
            stem = layer + (name if name == "proj_mlp" else f"attn.{name}")
            torch.testing.assert_close(piece, kept[f"{stem}.lora_B.weight"] @ kept[f"{stem}.lora_A.weight"])
    back = lora_formats.convert(lora_formats.convert(kept, "musubi"), "diffusers")
    assert back.keys() == kept.keys()


@pytest.mark.parametrize("alpha", [2.0, None])
def test_alpha_is_folded_for_diffusers_and_kept_between_native_formats(alpha: float | None):
    tensors = kohya(alpha=alpha)
    scale = 1.0 if alpha is None else alpha / 6
    peft = lora_formats.convert(tensors, "diffusers")
    assert not [key for key in peft if key.endswith("alpha")]
    q = "transformer.transformer_blocks.0.attn.to_q"
    expected = scale * tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"][:64]
    torch.testing.assert_close(peft[f"{q}.lora_B.weight"], expected)
    assert torch.equal(peft[f"{q}.lora_A.weight"], tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"])
    comfy = lora_formats.convert(tensors, "comfyui")
    assert comfy["diffusion_model.double_blocks.0.img_attn.qkv.alpha"].item() == (6.0 if alpha is None else alpha)
    back = lora_formats.convert(peft, "musubi")
    theirs = updates(kohya(alpha=6.0 if alpha is None else alpha))
    for layer, update in updates(back).items():
        torch.testing.assert_close(update, theirs[layer])


def test_folding_does_not_round_in_half_precision():
    halves = lora_formats.convert(kohya(rank=4, alpha=1.0, dtype=torch.bfloat16), "diffusers")
    assert {t.dtype for t in halves.values()} == {torch.bfloat16}, "a power of two is exact"
    thirds = lora_formats.convert(kohya(rank=6, alpha=2.0, dtype=torch.bfloat16), "diffusers")
    assert {t.dtype for k, t in thirds.items() if "lora_B" in k} == {torch.float32}


def test_a_fresh_lora_keeps_its_layers():
    tensors = {k: torch.zeros_like(v) if "lora_up" in k else v for k, v in kohya().items()}
    peft = lora_formats.convert(tensors, "diffusers")
    assert peft["transformer.transformer_blocks.0.attn.to_v.lora_A.weight"].shape == (6, 64)


@pytest.mark.parametrize(
    ("rename", "expected"),
    [
        (lambda k: k, "diffusers"),
        (lambda k: k.replace("transformer.", "", 1).replace(".weight", ".default.weight"), "other:"),
        (lambda k: k.replace("transformer.", "base_model.model.", 1), "other:base_model.model."),
        (
            lambda k: (
                "lora_transformer_"
                + k.removeprefix("transformer.").split(".lora_")[0].replace(".", "_")
                + (".lora_down.weight" if "lora_A" in k else ".lora_up.weight")
            ),
            "other:lora_transformer_",
        ),
    ],
)
def test_namings_that_are_read(rename, expected: str):
    tensors, _ = peft_lora()
    renamed = {rename(key): tensor for key, tensor in tensors.items()}
    assert lora_formats.detect_format(renamed) == expected
    back = lora_formats.convert(renamed, "diffusers")
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_detect_native_formats():
    assert lora_formats.detect_format(kohya()) == "musubi"
    assert lora_formats.detect_format(lora_formats.convert(kohya(), "comfyui")) == "comfyui"


def test_check_of_our_own_file():
    tensors = {k: v for k, v in full_size_peft().items() if re.fullmatch(DEFAULT, k.split(".", 1)[1].split(".lora_")[0])}
    report = check(tensors, METADATA)
    assert (report.format, report.modules) == ("diffusers", 418)
    loads = {tool.tool: len(tool.loaded) for tool in report.tools}
    assert loads == {"diffusers": 418, "comfyui": 418, "musubi": 0}
    assert report.loses
    assert not check(tensors, METADATA, ["diffusers", "comfyui"]).loses


def test_full_size_native_file_loads_everywhere():
    tensors = {k: v for k, v in full_size_peft().items() if re.fullmatch(DEFAULT, k.split(".", 1)[1].split(".lora_")[0])}
    native = lora_formats.convert(tensors, "musubi")
    report = check(native, METADATA)
    assert [(tool.tool, len(tool.loaded), len(tool.lost)) for tool in report.tools] == [
        ("diffusers", 228, 0),
        ("comfyui", 228, 0),
        ("musubi", 228, 0),
    ]


def test_layers_that_get_lost_are_named():
    tensors, _ = peft_lora(every_linear())
    native = lora_formats.convert(tensors, "comfyui")
    lost = {item.name: item.why for item in check(native, METADATA, ["diffusers"]).tools[0].lost}
    assert "outside the blocks" in lost["diffusion_model.img_in"]
    assert "full width 3072" in lost["diffusion_model.single_blocks.0.linear1"]
    with pytest.raises(ValueError, match=r"musubi would lose 10 of .*blocks only.*--allow-loss"):
        lora_formats.convert(tensors, "musubi")
    kept = lora_formats.convert(tensors, "musubi", allow_loss=True)
    assert len(lora_formats.losses(tensors, "musubi")) == 10
    assert not [key for key in kept if "blocks" not in key]


@pytest.mark.parametrize(
    ("rename", "tool", "why"),
    [
        (lambda k: k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"), "diffusers", None),
        (lambda k: k.replace("transformer.", "", 1), "diffusers", "loads nothing under this naming"),
        (lambda k: k.replace("transformer.", "base_model.model.", 1), "comfyui", "no such names"),
        (lambda k: k, "musubi", "--to musubi"),
    ],
)
def test_reasons(rename, tool: str, why: str | None):
    tensors = {rename(key): tensor for key, tensor in peft_lora()[0].items()}
    report = check(tensors, METADATA, [tool]).tools[0]
    assert [why in item.why for item in report.lost] == ([True] * 39 if why else [])


def test_strength_that_a_tool_would_get_wrong(tmp_path: Path):
    peft, _ = peft_lora()
    suffixed = {k.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): v for k, v in peft.items()}
    layer = "transformer.transformer_blocks.0.attn.to_q"
    suffixed[f"{layer}.alpha"] = torch.tensor(1.0)
    lost = check(suffixed, METADATA, ["diffusers"]).tools[0].lost
    assert [(item.name, "ignores alpha" in item.why) for item in lost] == [(layer, True)]
    targets = [key.removeprefix("transformer.").removesuffix(".lora_A.weight") for key in peft if key.endswith(".lora_A.weight")]
    config = {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.target_modules": targets}
    header = METADATA | {"lora_adapter_metadata": json.dumps(config)}
    report = check(peft, header, ["diffusers", "comfyui"])
    assert [len(tool.lost) for tool in report.tools] == [0, 39]
    lora_files.write_lora(tmp_path / "lora.safetensors", peft, header)
    tensors, metadata = lora_files.read_lora(tmp_path / "lora.safetensors")
    assert metadata == METADATA
    folded = lora_formats.convert(tensors, "diffusers")
    assert torch.equal(folded[f"{layer}.lora_B.weight"], 0.5 * peft[f"{layer}.lora_B.weight"])


@pytest.mark.parametrize("tool", lora_formats.FORMATS)
def test_runtime_follows_the_position(tool: lora_formats.Format):
    assert runtime(tool, LoraCard(position="same")).startswith("needs a")
    assert runtime(tool, LoraCard(position="kontext")).startswith("runs stock")
    assert runtime(tool, LoraCard()).startswith("unknown")


# --- refusals ---


def test_what_is_not_a_lora_of_flux():
    with pytest.raises(ValueError, match=r"no LoRA of flux .* such as diffusion_model.blocks.0.self_attn.q"):
        name = "diffusion_model.blocks.0.self_attn.q"
        lora_formats.detect_format({f"{name}.lora_A.weight": torch.ones(1, 2), f"{name}.lora_B.weight": torch.ones(2, 1)})
    with pytest.raises(ValueError, match="unknown family 'wan'"):
        check(kohya(), {"byg.family": "wan"})
    with pytest.raises(ValueError, match="DoRA"):
        lora_formats.convert(kohya() | {"lora_unet_double_blocks_0_img_attn_qkv.dora_scale": torch.ones(1)}, "diffusers")
    with pytest.raises(ValueError, match="unknown LoRA format 'xlabs'"):
        lora_formats.convert(kohya(), "xlabs")


def test_foreign_and_broken_tensors_are_losses():
    tensors = kohya()
    del tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    tensors["lora_te1_text_model.lora_down.weight"] = torch.ones(1, 1)
    tensors["lora_te1_text_model.lora_up.weight"] = torch.ones(1, 1)
    tensors["lora_unet_img_in.diff"] = torch.ones(1)
    with pytest.raises(ValueError, match="would lose 3"):
        lora_formats.convert(tensors, "diffusers")
    assert lora_formats.convert(tensors, "diffusers", allow_loss=True)
    assert {item.name for item in lora_formats.losses(tensors, "diffusers")} == {
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_te1_text_model",
        "lora_unet_img_in.diff",
    }


def test_one_layer_under_two_names_is_refused():
    tensors = peft_lora()[0] | kohya()
    with pytest.raises(ValueError, match="are the same layer"):
        lora_formats.convert(tensors, "comfyui")
    with pytest.raises(ValueError, match="several namings"):
        lora_formats.detect_format(tensors)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.safetensors", None, "no such file"),
        ("lora.pt", b"x", "not a .safetensors file"),
        ("bad.safetensors", b"xxxxxxxxxxxx", "not a readable"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes | None, message: str):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as refusal:
        lora_files.read_lora(path)
    assert name in str(refusal.value)


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "lora.safetensors"
    lora_files.write_lora(path, {"a": torch.ones(1)}, {})

    def full_disk(beside: Path, data: bytes):
        with open(beside, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(ValueError, match="No space left"):
        lora_files.write_lora(path, {"a": torch.zeros(1)}, {})
    assert load_file(path)["a"].item() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]
    with pytest.raises(ValueError, match="does not exist; make it"):
        lora_files.write_lora(tmp_path / "no" / "lora.safetensors", {}, {})


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o007])
def test_the_file_s_mode_follows_the_umask(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        lora_files.write_lora(tmp_path / "lora.safetensors", {"a": torch.ones(1)}, {})
    finally:
        os.umask(before)
    assert (tmp_path / "lora.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def _one_layer(name: str, inputs: int, rows: int) -> dict[str, torch.Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(4, inputs), f"{name}.lora_B.weight": torch.ones(rows, 4)}


@pytest.mark.parametrize(
    ("k", "message"),
    [
        ((16, 32), r"double_blocks\.0\.img_attn\.qkv have inputs that do not fit together: .*attn\.to_k': 16.*attn\.to_q': 32"),
        ((32, 16), r"double_blocks\.0\.img_attn\.qkv have rows that do not fit together: .*attn\.to_k': 16.*attn\.to_q': 32"),
    ],
)
def test_parts_of_a_fused_layer_that_do_not_fit_together(k: tuple[int, int], message: str):
    attention = "transformer.transformer_blocks.0.attn"
    tensors = _one_layer(f"{attention}.to_k", *k) | _one_layer(f"{attention}.to_q", 32, 32)
    with pytest.raises(ValueError, match=message):
        lora_formats.convert(tensors, "comfyui")


def test_a_layer_of_shift_and_scale_has_two_halves():
    native, ours = "diffusion_model.final_layer.adaLN_modulation.1", "transformer.norm_out.linear"
    for rows in (1, 5):
        with pytest.raises(ValueError, match=rf"final_layer\.adaLN_modulation\.1 holds shift and scale.*even number of rows: {rows} in"):
            lora_formats.convert(_one_layer(native, 32, rows), "diffusers")
        with pytest.raises(ValueError, match=rf"final_layer\.adaLN_modulation\.1 holds shift and scale.*even number of rows: {rows} in"):
            lora_formats.convert(_one_layer(ours, 32, rows), "comfyui")
    assert lora_formats.convert(_one_layer(native, 32, 6), "diffusers")[f"{ours}.lora_B.weight"].shape == (6, 4)
