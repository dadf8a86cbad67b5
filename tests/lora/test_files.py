"""What LoRA files hold: values that no training makes, alpha outside the tensors, other models, and diffusers' own reading."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from byg_plugin import convert_lora
from byg_plugin.lora import diffusers as lora_diffusers
from byg_plugin.lora import files as lora_files
from byg_plugin.lora import flux_layout, layouts
from byg_plugin.lora import formats as lora_formats
from byg_plugin.lora.check import check
from byg_plugin.musubi.options import _needed
from tests.support.lora_files import DOUBLE_ONLY, METADATA, full_size_peft, output, peft_lora, status, tiny_flux

Q = "transformer.transformer_blocks.0.attn.to_q"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
NAN, INF = float("nan"), float("inf")
DEEP = '{"r":' + "[" * 100_000 + "]" * 100_000 + "}"


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=METADATA if metadata is None else metadata)
    return path


def header(**config: Any) -> dict[str, str]:
    return METADATA | {"lora_adapter_metadata": json.dumps(config)}


def one_element(tensor: Tensor, value: float) -> Tensor:
    out = tensor.clone()
    out[-1, -1] = value
    return out


def layers_of(tensors: dict[str, Tensor]) -> list[str]:
    return [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]


# --- values ---

# change of a good file's tensors -> what the message names
DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "all NaN": (lambda t: {k: torch.full_like(v, NAN) for k, v in t.items()}, "tensor transformer.* NaN or infinite"),
    "one NaN": (lambda t: t | {A: one_element(t[A], NAN)}, f"tensor {A} holds NaN or infinite"),
    "one inf": (lambda t: t | {B: one_element(t[B], -INF)}, f"tensor {B} holds NaN or infinite"),
    "fp8 NaN": (lambda t: t | {B: one_element(t[B], NAN).to(torch.float8_e4m3fn)}, f"tensor {B} holds NaN or infinite"),
    "foreign NaN": (lambda t: t | {"transformer.x.diff_b": torch.tensor([NAN])}, "tensor transformer.x.diff_b holds NaN"),
    "1e30": (lambda t: t | {B: torch.full_like(t[B], 1e30)}, f"tensor {B}: .* 1e\\+30"),
    "one 1e30": (lambda t: t | {A: one_element(t[A], -1e30)}, f"tensor {A}: .* 1e\\+30"),
    "one beyond": (lambda t: t | {A: one_element(t[A], 1.1e4)}, f"tensor {A}: .* 1.1e\\+04"),
    "1e300 in float64": (lambda t: t | {A: one_element(t[A].double(), 1e300)}, f"tensor {A}"),
    "alpha NaN": (lambda t: t | {f"{Q}.alpha": torch.tensor(NAN)}, f"tensor {Q}.alpha holds NaN"),
    "alpha inf": (lambda t: t | {f"{Q}.alpha": torch.tensor(INF)}, f"tensor {Q}.alpha holds NaN or infinite"),
    "alpha -1": (lambda t: t | {f"{Q}.alpha": torch.tensor(-1.0)}, f"tensor {Q}.alpha is -1.0"),
    "alpha 1e6": (lambda t: t | {f"{Q}.alpha": torch.tensor(1e6)}, f"tensor {Q}.alpha: .* 2.5e\\+05"),
    "alphas": (lambda t: t | {f"{Q}.alpha": torch.ones(2)}, f"tensor {Q}.alpha has shape \\(2,\\), and alpha is one number"),
    "no alpha": (lambda t: t | {f"{Q}.alpha": torch.ones(0)}, f"tensor {Q}.alpha has shape \\(0,\\)"),
    "int8": (lambda t: t | {A: torch.ones(t[A].shape, dtype=torch.int8)}, f"tensor {A} is stored as torch.int8"),
    "scaled fp8": (lambda t: t | {f"{Q}.lora_A.scale_weight": torch.ones(1)}, "lora_A.scale_weight belongs to scaled fp8"),
}
HEADERS: dict[str, tuple[str, str]] = {
    "NaN": ('{"r": 4, "lora_alpha": NaN}', "lora_alpha = nan is damaged"),
    "inf": ('{"transformer.r": 4, "transformer.lora_alpha": Infinity}', "lora_alpha = inf is damaged"),
    "absurd": ('{"r": 4, "lora_alpha": 1e8}', "2.5e\\+07"),
    "1e300": ('{"r": 4, "lora_alpha": 1e300}', "lora_alpha = 1e\\+300 is damaged"),
    "negative": ('{"r": 4, "lora_alpha": -4}', "lora_alpha = -4 is damaged"),
    "text": ('{"r": "4", "lora_alpha": 4}', "r = 4 is damaged"),
    "true": ('{"r": true, "lora_alpha": 4}', "r = True is damaged"),
    "rank 0": ('{"r": 0, "lora_alpha": 4}', "r = 0 is damaged"),
    "alone": ('{"r": 4}', "lora_alpha = None is damaged"),
    "deep": (DEEP, "lora_adapter_metadata is damaged \\(nested too deeply"),
    "digits": ('{"r": 4, "lora_alpha": ' + "9" * 5000 + "}", "lora_adapter_metadata is damaged"),
    "list": ("[1]", "lora_adapter_metadata is damaged"),
    "no JSON": ("{", "lora_adapter_metadata is damaged"),
    "other rank": ('{"r": 8, "lora_alpha": 8}', "says rank 8 of transformer.*, whose matrix has shape \\(4, "),
    "LoKr": ('{"r": 4, "lora_alpha": 4, "peft_type": "LOKR"}', "peft_type = 'LOKR'"),
    "expression": ('{"r": 4, "lora_alpha": 4, "alpha_pattern": {"(a+)+$": 2}}', "regular expression '\\(a\\+\\)\\+\\$', which is not read"),
    "no layer": ('{"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_x": 2}}', "alpha_pattern for to_x, which no layer"),
    "pattern": ('{"r": 4, "lora_alpha": 4, "rank_pattern": [1]}', "rank_pattern is damaged"),
}


def refused_everywhere(path: Path, message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """By whoever reads it, in one line that names the file; nothing is written."""
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}"):
        lora_files.read_lora(path)
    out = path.with_name("out.safetensors")
    for options in (["--check"], ["--to", "musubi", "--out", out], ["--to", "comfyui", "--out", out, "--allow-loss"]):
        assert status(path, *options) == 2
        said = capfd.readouterr().err
        assert said.startswith(f"error: {path}: ") and said.count("\n") == 1 and re.search(message, said)
    assert not out.exists()


@pytest.mark.parametrize("damage", DAMAGED)
def test_values_that_no_training_makes(tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]):
    change, message = DAMAGED[damage]
    refused_everywhere(write(tmp_path / "lora.safetensors", change(peft_lora()[0])), message, capfd)


@pytest.mark.parametrize("damage", HEADERS)
def test_headers_that_tell_no_alpha(tmp_path: Path, damage: str, capfd: pytest.CaptureFixture[str]):
    text, message = HEADERS[damage]
    refused_everywhere(write(tmp_path / "lora.safetensors", peft_lora()[0], METADATA | {"lora_adapter_metadata": text}), message, capfd)


def test_what_trainings_make_is_read(tmp_path: Path):
    tensors, _ = peft_lora()
    kept = {A: one_element(tensors[A], 9e3), f"{Q}.alpha": torch.tensor([400]), f"{Q[:-1]}k.alpha": torch.tensor(0.0)}
    found, _ = lora_files.read_lora(write(tmp_path / "lora.safetensors", tensors | kept))
    assert torch.equal(found[A], kept[A]) and found[f"{Q}.alpha"].item() == 400


def test_the_host_of_musubi_gets_no_damaged_start(tmp_path: Path):
    layer = "lora_unet_double_blocks_0_img_attn_proj"
    own = {f"{layer}.lora_down.weight": torch.ones(2, 4), f"{layer}.lora_up.weight": torch.ones(4, 2), f"{layer}.alpha": torch.tensor(1.0)}
    good = write(tmp_path / "good.safetensors", own)
    bad = write(tmp_path / "bad.safetensors", DAMAGED["one NaN"][0](peft_lora()[0]))
    said = {}
    for path in (good, bad):
        options = {"network_weights": str(path), "network_dim": 2}
        config = SimpleNamespace(musubi=options, model=SimpleNamespace(family="flux"), conditioning=SimpleNamespace(position="same"))
        said[path] = [line for line in _needed(config) if "weights" in line]
    assert not said[good]
    (line,) = said[bad]
    assert f"musubi.network_weights = {bad}: tensor {A} holds NaN" in line


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("to", lora_formats.FORMATS)
def test_fp8_is_upcast(tmp_path: Path, dtype: torch.dtype, to: lora_formats.Format):
    tensors = {name: tensor.to(dtype) for name, tensor in peft_lora()[0].items()}
    path = write(tmp_path / "lora.safetensors", tensors)
    assert status(path, "--to", to, "--out", tmp_path / "out.safetensors") == 0
    back = lora_formats.convert(lora_files.read_lora(tmp_path / "out.safetensors")[0], "diffusers")
    assert all(torch.equal(back[name].float(), tensor.float()) for name, tensor in tensors.items())


# --- alpha outside the tensors ---


def bare(config: LoraConfig) -> Any:
    """The tiny FLUX with an adapter of this configuration that does something."""
    model = tiny_flux()
    model.add_adapter(config)
    return model


SOME = r".*transformer_blocks\.\d\.attn\.(to_q|to_k|to_v)"
CONFIGS: dict[str, dict[str, Any]] = {
    "alpha 16": {"lora_alpha": 16},
    "alpha 1": {"lora_alpha": 1},
    "alpha is rank": {"lora_alpha": 4},
    "rslora": {"lora_alpha": 16, "use_rslora": True},
    "alpha by layer": {"lora_alpha": 8, "alpha_pattern": {"transformer_blocks.0.attn.to_q": 2, "to_k": 1}},
    "rank by layer": {"lora_alpha": 8, "rank_pattern": {"^transformer_blocks.1.attn.to_v": 2}},
    "all": {"lora_alpha": 8, "use_rslora": True, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"^transformer_blocks.0.attn.to_q": 3}},
}


def saved_by_diffusers(config: LoraConfig, folder: Path, prefix: str) -> tuple[Path, Tensor]:
    model = bare(config)
    edited = output(model)
    if not prefix:
        model.save_lora_adapter(folder)
        return folder / "pytorch_lora_weights.safetensors", edited
    from peft.utils import get_peft_model_state_dict

    FluxPipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    return folder / "pytorch_lora_weights.safetensors", edited


def saved_by_peft(config: LoraConfig, folder: Path) -> tuple[Path, Tensor]:
    model = get_peft_model(tiny_flux(), config)
    edited = output(model.base_model.model)
    model.save_pretrained(folder)
    return folder / "adapter_model.safetensors", edited


def applied(path: Path) -> Tensor:
    """The tiny FLUX's output with what we read of a file added to its weights by the definition."""
    tensors, _ = lora_files.read_lora(path)
    model = tiny_flux()
    with torch.no_grad():
        for module in lora_formats.parse(lora_formats.convert(tensors, "diffusers"))[0]:
            weight = model.get_submodule(module.linear.parts[module.part]).weight
            weight += module.scale * module.up @ module.down
    return output(model)


@pytest.mark.parametrize("writer", ["save_lora_adapter", "save_lora_weights", "peft"])
@pytest.mark.parametrize("case", CONFIGS)
def test_alpha_outside_the_tensors_is_honoured(tmp_path: Path, writer: str, case: str):
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=SOME, **CONFIGS[case])
    if writer == "peft":
        path, edited = saved_by_peft(config, tmp_path)
    else:
        path, edited = saved_by_diffusers(config, tmp_path, "transformer." if writer == "save_lora_weights" else "")
    assert (edited - output(tiny_flux())).abs().max() > 1e-3
    torch.testing.assert_close(applied(path), edited, rtol=0, atol=2e-6)
    assert "lora_adapter_metadata" not in lora_files.read_lora(path)[1]


@pytest.mark.parametrize(
    ("writer", "line"),
    [
        ("peft", "alpha / rank = 4 in 15 layers, from adapter_config.json beside the file"),
        ("diffusers", "alpha / rank = 4 in 15 layers, from the header (lora_adapter_metadata)"),
        ("ours", "alpha / rank = 1 in 39 layers, from no alpha, which means the rank"),
        ("kohya", "alpha / rank = 0.5 in 22 layers, from .alpha"),
    ],
)
def test_check_says_which_alpha_and_from_where(
    tmp_path: Path, writer: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    small = replace(flux_layout.LAYOUT, networks=(flux_layout.network(2, 3, 64),))
    monkeypatch.setitem(layouts.LAYOUTS, "flux", small)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=SOME, lora_alpha=16)
    if writer == "peft":
        path, _ = saved_by_peft(config, tmp_path)
    elif writer == "diffusers":
        path, _ = saved_by_diffusers(config, tmp_path, "transformer.")
    elif writer == "ours":
        path = write(tmp_path / "lora.safetensors", peft_lora()[0])
    else:
        halved = lora_formats.convert(peft_lora()[0], "musubi")
        path = write(tmp_path / "lora.safetensors", {n: t / 2 if n.endswith("alpha") else t for n, t in halved.items()})
    assert status(path, "--check", "--tools", "comfyui") == (0 if writer in ("ours", "kohya") else 1)
    said = capsys.readouterr().out
    assert line in said
    if writer == "diffusers":
        assert "lost 15: its alpha is in the header (lora_adapter_metadata) only, which comfyui ignores" in said


def test_whose_alpha_the_configuration_beside_is(tmp_path: Path):
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=SOME, lora_alpha=16)
    path, edited = saved_by_peft(config, tmp_path)
    renamed = path.rename(tmp_path / "mine.safetensors")
    torch.testing.assert_close(applied(renamed), edited, rtol=0, atol=2e-6)
    other = write(tmp_path / "other.safetensors", peft_lora(SOME)[0], {})
    for file in (renamed, other):
        with pytest.raises(
            ValueError, match=f"^{re.escape(str(file))}: beside several LoRAs lies adapter_config.json.*a folder of its own"
        ):
            lora_files.read_lora(file)
    kept = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text('{"r": 64, "lora_alpha": 128}')
    assert not lora_files.read_stored(other).outside.alphas, "a configuration of another rank is another file's"
    other.unlink()
    with pytest.raises(ValueError, match="says rank 64 of .*; where adapter_config.json is another LoRA's, move it away"):
        lora_files.read_lora(renamed)
    write(other, peft_lora(SOME)[0], {})
    (tmp_path / "adapter_config.json").write_text(kept)
    renamed.rename(path)
    assert not lora_files.read_stored(other).outside.alphas, "the configuration is adapter_model.safetensors'"
    torch.testing.assert_close(applied(path), edited, rtol=0, atol=2e-6)
    ours = write(path, load_file(path), METADATA)
    assert not lora_files.read_stored(ours).outside.alphas, "our files have alpha folded in"
    write(path, load_file(path), {})
    for text in ("{", "[]", DEEP, '{"r": 8, "lora_alpha": 8}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*adapter_config.json"):
            lora_files.read_lora(path)


def test_two_alphas_that_contradict_each_other(tmp_path: Path):
    tensors, _ = peft_lora()
    both = tensors | {f"{layer}.alpha": torch.tensor(2.0) for layer in layers_of(tensors)}
    same, other = (write(tmp_path / f"{a}.safetensors", both, header(r=4, lora_alpha=a)) for a in (2, 4))
    assert lora_files.read_lora(same)[0].keys() == both.keys()
    with pytest.raises(ValueError, match="says alpha 4 of transformer.*, its .alpha is 2"):
        lora_files.read_lora(other)


# --- other models with the same names ---


def sized(native: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    out = {}
    for name, (inputs, outputs) in native.items():
        out[f"diffusion_model.{name}.lora_down.weight"] = torch.ones(1, 1).expand(1, inputs)
        out[f"diffusion_model.{name}.lora_up.weight"] = torch.ones(1, 1).expand(outputs, 1)
    return out


def parts(names: list[str], width: int) -> dict[str, Tensor]:
    matrices = {"A": torch.ones(1, 1).expand(1, width), "B": torch.ones(1, 1).expand(width, 1)}
    return {f"transformer.{name}.lora_{m}.weight": tensor for name in names for m, tensor in matrices.items()}


OTHERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "FLUX.2 dev": (sized({"double_blocks.0.img_attn.qkv": (6144, 3 * 6144)}), "is 6144 -> 18432, in FLUX.1 3072 -> 9216"),
    "FLUX.2 dev, depth": (sized({"single_blocks.47.linear2": (15360, 3072)}), "is in block 47, and FLUX.1 has 38"),
    "Qwen-Image, depth": (parts([f"transformer_blocks.{i}.attn.to_q" for i in range(61)], 3072), "is in block 19, and FLUX.1 has 19"),
    "Qwen-Image, names": (parts(["transformer_blocks.60.img_mlp.net.2"], 3072), "is in block 60, and Qwen-Image has 60"),
    "a narrower FLUX": (parts(["transformer_blocks.0.attn.add_k_proj"], 1536), "is 1536 -> 1536, in FLUX.1 3072 -> 3072"),
    "Wan of no size": (sized({"blocks.0.self_attn.q": (2048, 2048)}), "in Wan 14B 5120 -> 5120; .*in Wan 1.3B 1536 -> 1536; .*Wan 5B"),
    "Wan 1.3B, depth": (sized({"blocks.30.cross_attn.k": (1536, 1536)}), "is in block 30, and Wan 1.3B has 30"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_models_with_the_same_names_are_not_taken_for_ours(tmp_path: Path, case: str, capfd: pytest.CaptureFixture[str]):
    tensors, message = OTHERS[case]
    path = write(tmp_path / "lora.safetensors", {name: tensor.clone() for name, tensor in tensors.items()}, {})
    for options in (["--check"], ["--to", "comfyui", "--out", tmp_path / "out.safetensors", "--allow-loss"]):
        assert status(path, *options) == 2
        assert re.search(f"^error: {re.escape(str(path))}: a LoRA of another model.*{message}", capfd.readouterr().err)
    assert lora_formats.guess_family(tensors, {"byg.family": "flux"}) == "flux", "the network that is loaded decides"


def test_published_sizes_are_the_shipped_configurations():
    assert lora_formats.guess_family(full_size_peft(), {}) == "flux"
    for name, (blocks, width, inner) in {"wan2.2-t2v-a14b": (40, 5120, 13824), "1.3b": (30, 1536, 8960), "5b": (30, 3072, 14336)}.items():
        last = f"blocks.{blocks - 1}"
        file = sized({f"{last}.self_attn.o": (width, width), f"{last}.ffn.0": (width, inner), f"{last}.ffn.2": (inner, width)})
        assert lora_formats.guess_family(file, {}) == "wan2.2-t2v-a14b", name


# --- diffusers' own reading ---


def some(tensors: dict[str, Tensor], alpha: float, count: int) -> dict[str, Tensor]:
    return tensors | {f"{layer}.alpha": torch.tensor(alpha) for layer in layers_of(tensors)[:count]}


def full_header(tensors: dict[str, Tensor], prefix: str = "transformer.", **config: Any) -> dict[str, str]:
    targets = [layer.removeprefix("transformer.") for layer in layers_of(tensors)]
    return header(**{f"{prefix}{key}": value for key, value in {"r": 4, "target_modules": targets, **config}.items()})


PEFT, _ = peft_lora(DOUBLE_ONLY)
NATIVE = lora_formats.convert(PEFT, "musubi")
# file and header -> (layers that diffusers applies as they were trained, words of the reason of the others)
READ: dict[str, tuple[dict[str, Tensor], dict[str, str], int, str]] = {
    "ours": (PEFT, METADATA, 24, ""),
    "alpha everywhere": (some(PEFT, 2.0, 24), METADATA, 24, ""),
    "alpha in some": (some(PEFT, 2.0, 3), METADATA, 3, "at 0.5 times the strength it was trained at"),
    "alpha in most": (some(PEFT, 8.0, 20), METADATA, 20, "at 2 times the strength"),
    "alpha and header": (some(PEFT, 4.0, 24), full_header(PEFT, lora_alpha=4), 0, "refuses the whole file: ValueError: Both"),
    "header": (PEFT, full_header(PEFT, lora_alpha=2), 24, ""),
    "header, rslora": (PEFT, full_header(PEFT, lora_alpha=2, use_rslora=True), 24, ""),
    "header without layers": (PEFT, header(**{"transformer.r": 4, "transformer.lora_alpha": 2}), 0, "refuses the whole file"),
    "header of a model": (PEFT, full_header(PEFT, "", lora_alpha=16), 0, "refuses the whole file"),
    "whole numbers": (PEFT | {f"{Q}.alpha": torch.tensor(4)}, METADATA, 0, "refuses the whole file: ValueError: The alpha key"),
    "kohya": (NATIVE, METADATA, 16, ""),
    "kohya, alpha in some": ({n: v for n, v in NATIVE.items() if "img_mlp" not in n or "alpha" not in n}, METADATA, 16, ""),
    "kohya, half": ({n: v / 2 if n.endswith("alpha") else v for n, v in NATIVE.items()}, METADATA, 16, ""),
    "kohya suffix": ({n.replace("_A", "_down").replace("_B", "_up"): v for n, v in PEFT.items()}, METADATA, 24, ""),
    "kohya suffix, alpha": (
        {n.replace("_A", "_down").replace("_B", "_up"): v for n, v in some(PEFT, 2.0, 5).items()},
        METADATA,
        19,
        "ignores alpha in this naming",
    ),
    "fp8": ({n: v.to(torch.float8_e4m3fn) for n, v in PEFT.items()}, METADATA, 24, ""),
    "fp8, kohya": ({n: v if "alpha" in n else v.to(torch.float8_e4m3fn) for n, v in NATIVE.items()}, METADATA, 0, "refuses the whole file"),
    "bare names": ({n.removeprefix("transformer."): v for n, v in PEFT.items()}, METADATA, 0, "loads nothing under this naming"),
    "half of a layer": ({n: v for n, v in PEFT.items() if n != B}, METADATA, 0, ""),
    "zeros": ({n: v if "lora_A" in n else torch.zeros_like(v) for n, v in PEFT.items()}, METADATA, 24, ""),
}


def by_diffusers(path: Path) -> dict[str, Tensor]:
    """What the real pipeline adds to each weight of the real tiny FLUX; nothing where it raises."""
    model = tiny_flux()
    try:
        FluxPipeline(None, None, None, None, None, None, model).load_lora_weights(str(path))
    except Exception:  # noqa: BLE001 - whatever it raises, it has loaded nothing
        return {}
    adapted = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return {
        name: layer.scaling["default_0"] * layer.lora_B["default_0"].weight.data.float() @ layer.lora_A["default_0"].weight.data.float()
        for name, layer in adapted.items()
    }


@pytest.mark.parametrize("case", READ)
def test_the_report_is_what_diffusers_applies(tmp_path: Path, case: str):
    tensors, metadata, count, why = READ[case]
    path = write(tmp_path / "lora.safetensors", tensors, metadata)
    stored = lora_files.read_stored(path)
    before = {name: tensor.clone() for name, tensor in stored.tensors.items()}
    (report,) = check(stored.tensors, stored.metadata, ["diffusers"], outside=stored.outside).tools
    assert all(torch.equal(before[name].float(), tensor.float()) for name, tensor in stored.tensors.items()), "the caller's are changed"
    assert len(report.loaded) == count and all(why in item.why for item in report.lost)
    # The real network agrees, layer by layer.
    real = by_diffusers(path)
    plain, _ = lora_files.read_lora(path)
    for module in lora_formats.parse(plain)[0]:
        update = module.scale * module.up.float() @ module.down.float()
        names = module.linear.parts if module.part is None else (module.linear.parts[module.part],)
        rows = update.split(update.shape[0] // len(names))
        same = all(n in real and torch.allclose(real[n], row, rtol=0.02, atol=1e-4) for n, row in zip(names, rows, strict=True))
        assert same == (module.name in report.loaded), module.name


def test_without_diffusers_the_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    path = write(tmp_path / "lora.safetensors", PEFT)
    monkeypatch.setattr(lora_diffusers.importlib.util, "find_spec", lambda name: None)
    assert status(path, "--check") == 1
    said = capfd.readouterr().out
    assert "diffusers: not asked, because diffusers and peft are not installed: pip install" in said and "comfyui: loads 24" in said
    assert status(path, "--check", "--tools", "diffusers") == 2
    assert "is asked of diffusers, and diffusers and peft are not installed" in capfd.readouterr().err


# --- the command ---


@pytest.mark.parametrize("arguments", [["--check"], ["--to", "musubi"], ["--to", "musubi", "--out", "no/out.safetensors"]])
def test_errors_are_one_line_also_as_a_file(tmp_path: Path, arguments: list[str]):
    write(tmp_path / "lora.safetensors", PEFT, METADATA | ({} if arguments != ["--check"] else {"lora_adapter_metadata": DEEP}))
    command = [sys.executable, str(Path(convert_lora.__file__).resolve()), "lora.safetensors", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_wrapper_of_commands_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lora_files, "read_stored", interrupted)
    assert status(write(tmp_path / "lora.safetensors", PEFT), "--check") == 130
    assert not capfd.readouterr().err
