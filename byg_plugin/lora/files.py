"""LoRA files on disk: their tensors, that those are numbers of a trained LoRA, and the alpha that stands outside them.

A layer without `.alpha` may have it in the header (diffusers' `lora_adapter_metadata`, with a pipeline's `transformer.` before the
keys or, as a model's own `save_lora_adapter` writes it, without) or in the `adapter_config.json` that PEFT writes beside a file.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from byg_plugin.documents import json_value
from byg_plugin.finite import refuse_not_finite
from byg_plugin.lora.card import has_card

# What follows a layer's name -> role. A `down` is (rank, inputs), an `up` is (outputs, rank).
SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}
# A starts within 1 of zero and B at zero; training moves neither by orders of magnitude, nor is alpha a thousand ranks. Many
# LoRAs are kept in float16, which ends at 65504.
LARGEST = 1e4
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = (".scale_weight", ".weight_scale", "scaled_fp8")
_HEADER = "lora_adapter_metadata"
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata keys that hold a hash of the tensors, as sd-scripts and musubi-tuner compute it."""
_AGAIN = "train it, save it or download it again"


@dataclass(frozen=True)
class OutsideAlpha:
    """The alphas that no tensor of a file tells.

    Attributes:
        where: where they stand, in words.
        alphas: alpha by layer (the key without its suffix); rank-stabilised ones as the alpha of the same strength.
    """

    where: str
    alphas: Mapping[str, float]


@dataclass(frozen=True)
class StoredLora:
    """A file as it is.

    Attributes:
        tensors: in the file's names and dtypes.
        metadata: of the header.
        outside: alphas of the layers that have none in a tensor.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    outside: OutsideAlpha


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata in the header of a .safetensors file.

    Raises:
        ValueError: it is not readable.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable .safetensors file ({error}); {_AGAIN}") from error


def read_stored(path: str | Path) -> StoredLora:
    """A LoRA file as it is, checked.

    Raises:
        ValueError: no such file, not a readable .safetensors file, a file without tensors; NaN, infinite or absurd values; a
            quantised format; or an alpha outside the tensors that is damaged or contradicts them.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give a LoRA as .safetensors")
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path}: not a .safetensors file; other formats can run code when read and are not opened")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Clones: views of the mapped file would change or crash if it is overwritten in place.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable .safetensors file ({error}); {_AGAIN}") from error
    if not tensors:
        raise ValueError(f"{path}: holds no tensors; {_AGAIN}")
    with naming(path):
        _check_values(tensors, path)
        outside = header_alpha(tensors, metadata)
        if not outside.alphas:
            outside = _alpha_beside(path, tensors, metadata)
    return StoredLora(tensors, metadata, outside)


def read_lora(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a LoRA file; fp8 is upcast to bfloat16, which holds all of its values.

    An alpha that stands outside the tensors is put beside its layer as `.alpha`, and the header's leaves the metadata, so that
    no later step can forget it.

    Raises:
        ValueError: as `read_stored`.
    """
    stored = read_stored(path)
    tensors = {name: tensor.bfloat16() if tensor.dtype in _FP8 else tensor for name, tensor in stored.tensors.items()}
    ranks = {layer: len(tensor) for layer, tensor in _downs(tensors) if tensor.ndim == 2}
    tensors |= {f"{layer}.alpha": torch.tensor(alpha) for layer, alpha in stored.outside.alphas.items() if alpha != ranks[layer]}
    return tensors, {key: value for key, value in stored.metadata.items() if key != _HEADER}


def write_lora(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA beside `path` and rename it there, so that a full disk leaves an earlier file whole.

    Raises:
        ValueError: the folder does not exist or cannot be written.
    """
    path = Path(path).expanduser()
    if not path.parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} does not exist; make it first")
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Not save_file: it makes files that only their owner may read, whatever the umask.
        beside.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=hashed(tensors, metadata)))
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written ({error})") from error
    finally:
        beside.unlink(missing_ok=True)


def hashed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with those of `HASHES` that are in it made the hashes of these tensors: converted, they are other bytes."""
    if not any(key in metadata for key in HASHES):
        return dict(metadata)
    immutable = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    written = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=immutable or None)
    start = 8 + int.from_bytes(written[:8], "little")
    digest = hashlib.sha256(memoryview(written)[start:]).hexdigest()
    legacy = hashlib.sha256(written[0x100000:0x110000]).hexdigest()[:8]
    found = dict(zip(HASHES, (f"0x{digest}", digest, legacy), strict=True))
    return dict(metadata) | {key: value for key, value in found.items() if key in metadata}


@contextmanager
def naming(path: str | Path, label: str = "") -> Iterator[None]:
    """Errors of a file name it, once; `label` stands before the path, e.g. `lora.init_from = `."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if label and text.startswith(label):
            raise
        # Without the suffix: of a pair, a message names the file that is at fault.
        named = text.startswith(str(Path(path).expanduser().with_suffix("")))
        raise ValueError(f"{label}{text}" if named else f"{label}{path}: {text}") from error


def role_of(key: str) -> tuple[str, str] | None:
    """(layer, role) of a tensor's name; None for a name that is none of a plain LoRA."""
    suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
    return None if suffix is None else (key.removesuffix(suffix), SUFFIXES[suffix])


def alpha_value(key: str, tensor: Tensor) -> float:
    """The number that an `.alpha` tensor holds.

    Raises:
        ValueError: it holds several, or none that an alpha can be.
    """
    if tensor.numel() != 1:
        raise ValueError(f"tensor {key} has shape {tuple(tensor.shape)}, and alpha is one number; {_AGAIN}")
    value = float(tensor.double().item())
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"tensor {key} is {value}, and alpha is a finite number of at least 0; {_AGAIN}")
    return value


def _check_values(tensors: Mapping[str, Tensor], path: Path) -> None:
    scaled = next((name for name in tensors if name.endswith(_SCALES)), None)
    if scaled is not None:
        raise ValueError(f"{path}: {scaled} belongs to scaled fp8, which is not read of a LoRA; use the file in 16 bits")
    refuse_not_finite(((n, t) for n, t in tensors.items() if t.dtype in (*_FLOATS, *_FP8)), path, _AGAIN)
    ranks = {layer: len(tensor) for layer, tensor in _downs(tensors) if tensor.ndim == 2}
    for name, tensor in tensors.items():
        layer, role = role_of(name) or ("", "")
        if role == "alpha":
            alpha = alpha_value(name, tensor)
            # Alone it belongs to another kind of adapter, some of which write numbers that mean nothing.
            _refuse_absurd(f"tensor {name}", alpha / max(1, ranks[layer]) if layer in ranks else 0.0)
        elif role:
            if tensor.dtype not in (*_FLOATS, *_FP8):
                raise ValueError(f"tensor {name} is stored as {tensor.dtype}, which is not read; use the LoRA in 16 or 32 bits")
            _refuse_absurd(f"tensor {name}", float(tensor.to(torch.float32).abs().max()) if tensor.numel() else 0.0)


def _refuse_absurd(what: str, value: float) -> None:
    if value > LARGEST:
        raise ValueError(
            f"{what}: a value or alpha / rank of {value:.3g}, where no trained LoRA goes beyond {LARGEST:g}: it is damaged or has "
            f"diverged; {_AGAIN}"
        )


def _downs(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(layer, its `down`) of every layer."""
    for key, tensor in tensors.items():
        found = role_of(key)
        if found is not None and found[1] == "down":
            yield found[0], tensor


# --- alpha outside the tensors ---


def header_config(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """PEFT's configuration as the header holds it; None without one.

    Raises:
        ValueError: it is damaged.
    """
    if _HEADER not in metadata:
        return None
    try:
        config = json_value(metadata[_HEADER])
    except ValueError as error:
        raise ValueError(f"metadata key {_HEADER} is damaged ({error}); remove it or save the LoRA again") from error
    if not isinstance(config, dict):
        raise ValueError(f"metadata key {_HEADER} is damaged (no object of JSON); remove it or save the LoRA again")
    return config


def header_alpha(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> OutsideAlpha:
    """The alphas that the header tells.

    Raises:
        ValueError: the header is damaged, does not fit the matrices, or contradicts an `.alpha`.
    """
    config = header_config(metadata) or {}
    of_pipeline = {key.removeprefix("transformer."): value for key, value in config.items() if key.startswith("transformer.")}
    where = f"the header ({_HEADER})"
    return OutsideAlpha(where, _alphas_of(of_pipeline or config, where, tensors))


def _alpha_beside(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> OutsideAlpha:
    """The alphas in PEFT's configuration beside a file, where that is this file's."""
    beside = path.with_name(_PEFT_CONFIG)
    where = f"{_PEFT_CONFIG} beside the file"
    bare = not has_card(metadata) and not any(key.endswith(".alpha") for key in tensors)
    is_peft = any(key.endswith((".lora_A.weight", ".lora_A.default.weight")) for key in tensors)
    anothers = path.name != _PEFT_FILE and path.with_name(_PEFT_FILE).is_file()
    if not beside.is_file() or not bare or not is_peft or anothers or _HEADER in metadata:
        return OutsideAlpha(where, {})
    try:
        config = json_value(beside.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no object of JSON")
    except (OSError, ValueError) as error:
        raise ValueError(f"its {_PEFT_CONFIG} cannot be read ({error}), and the LoRA's alpha is in it; {_AGAIN}") from error
    own = path.name == _PEFT_FILE
    several = not own and len(list(path.parent.glob("*.safetensors"))) > 1
    ranks = {layer: len(tensor) for layer, tensor in _downs(tensors) if tensor.ndim == 2}
    if several and not config.get("rank_pattern") and config.get("r") not in ranks.values():
        return OutsideAlpha(where, {})  # of another file there
    try:
        alphas = _alphas_of(config, where, tensors)
    except ValueError as error:
        raise ValueError(str(error) if own else f"{error}; where {_PEFT_CONFIG} is another LoRA's, move it away") from error
    if several and any(alpha != ranks[layer] for layer, alpha in alphas.items()):
        raise ValueError(f"beside several LoRAs lies {_PEFT_CONFIG}, and whose alpha it tells is unknown: give each a folder of its own")
    return OutsideAlpha(where, alphas)


def _alphas_of(config: Mapping[str, Any], where: str, tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Alpha by layer that PEFT's configuration gives; empty where it says nothing of rank and alpha."""
    if "r" not in config and "lora_alpha" not in config:
        return {}
    if (kind := config.get("peft_type") or "LORA") != "LORA":
        raise ValueError(f"{where} says peft_type = {kind!r}, which is no plain LoRA")
    default = {key: _number(config.get(key), key, where) for key in ("r", "lora_alpha")}
    patterns = {key: _pattern(config.get(key), key, where) for key in ("rank_pattern", "alpha_pattern")}
    modules = {layer: re.sub(r"^(base_model\.model\.|transformer(_2)?\.|diffusion_model\.)", "", layer) for layer, _ in _downs(tensors)}
    for key, pattern in patterns.items():
        for name in pattern:
            if not any(_matches(name, module) for module in modules.values()):
                raise ValueError(f"{where} has {key} for {name}, which no layer of the file has: {_FOLD}")
    alphas = {}
    for layer, down in _downs(tensors):
        rank, alpha = (
            next((value for name, value in patterns[pattern].items() if _matches(name, modules[layer])), default[key])
            for pattern, key in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        if down.ndim != 2 or rank != down.shape[0]:
            raise ValueError(f"{where} says rank {rank:g} of {layer}, whose matrix has shape {tuple(down.shape)}: {_FOLD}")
        # Rank-stabilised: alpha / sqrt(rank).
        effective = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
        _refuse_absurd(where, effective / rank)
        if (stored := tensors.get(f"{layer}.alpha")) is None:
            alphas[layer] = float(effective)
        elif not math.isclose(alpha_value(f"{layer}.alpha", stored), effective, rel_tol=1e-3):
            raise ValueError(f"{where} says alpha {effective:g} of {layer}, its .alpha is {alpha_value(layer, stored):g}; {_FOLD}")
    return alphas


_FOLD = "save the LoRA with alpha equal to the rank, or with the configuration it was trained with"


def _matches(pattern: str, module: str) -> bool:
    """As PEFT's `(.*\\.)?(pattern)$`, for the plain names that diffusers and trainers write."""
    plain = pattern.removeprefix("^")
    return module == plain or (plain == pattern and module.endswith(f".{plain}"))


def _pattern(value: Any, key: str, where: str) -> dict[str, float]:
    if not value:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {key} is damaged (no object of JSON); {_FOLD}")
    for name in value:
        if not re.fullmatch(r"\^?[\w.]+", name):
            raise ValueError(f"{where}: {key} names layers by the regular expression {name[:100]!r}, which is not read; {_FOLD}")
    return {name: _number(number, f"{key} of {name}", where) for name, number in value.items()}


def _number(value: Any, key: str, where: str) -> float:
    least = 0 if "alpha" in key else 1
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < 1e9:
        raise ValueError(f"{where}: {key} = {str(value)[:40]} is damaged: a finite number of at least {least} is expected; {_FOLD}")
    return float(value)
