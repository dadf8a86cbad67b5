"""Frozen parts of any family from what people have on disk: paths and hub ids, single .safetensors files, tokenizers, fingerprints.

`path_or_id` is a diffusers folder (root, or the part's own folder), a hub id (`owner/name`), or one .safetensors file.
fp8 weights are upcast; scaled fp8 (`scale_weight`, `weight_scale`) is multiplied out. All else is refused by name.
Configurations and tokenizers of single files come from `assets/`; sizes are read off the tensors' shapes.
Models are built on the meta device and take each tensor as it is read: there is never a second copy. Each is looked at once for
NaN and infinite values; a folder's headers and index are read before its weights.
"""

from __future__ import annotations

import gzip
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from byg_plugin.documents import json_value
from byg_plugin.finite import first_not_finite, is_finite
from byg_plugin.places import HUB_ID
from byg_plugin.progress import quiet_loading
from byg_plugin.user_files import files_in, is_hidden


@dataclass(frozen=True, kw_only=True)
class Part:
    """How one part of a model lies on disk.

    Attributes:
        label: what messages call it.
        folder: its folder inside a diffusers root.
        tokenizer_folder: of a text encoder.
        prefixes: what a single file may put before every name.
        markers: layout -> a tensor that only this layout of this part has.
        suggested: what to use instead of a file that is refused.
        tokenizer: shipped file and special tokens, where none lies beside the weights.
        model_type: of a text encoder, what its config.json has to say; None: a class of transformers takes what it needs of several.
    """

    label: str
    folder: str
    tokenizer_folder: str | None = None
    prefixes: tuple[str, ...]
    markers: Mapping[str, str]
    suggested: str
    tokenizer: tuple[str, Mapping[str, str]] | None = None
    model_type: str | None = None


_DIT_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
_T5_SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_QWEN_SPECIAL = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_LANGUAGE_PREFIXES = ("model.language_model.", "language_model.", "model.", "")
_WAN_VAE_MARKERS = {"native": "decoder.middle.0.residual.0.gamma", "diffusers": "decoder.mid_block.resnets.0.norm1.gamma"}
_WAN_MARKERS = {"native": "blocks.0.self_attn.q.weight", "diffusers": "blocks.0.attn1.to_q.weight"}

PARTS = {
    "transformer": Part(
        label="FLUX.1's transformer",
        folder="transformer",
        prefixes=_DIT_PREFIXES,
        markers={"native": "double_blocks.0.img_attn.qkv.weight", "diffusers": "transformer_blocks.0.attn.to_q.weight"},
        suggested="flux1-dev.safetensors (bf16 or fp8) or a diffusers folder",
    ),
    "vae": Part(
        label="FLUX.1's vae",
        folder="vae",
        prefixes=("", "vae.", "first_stage_model."),
        markers={"native": "decoder.up.0.block.0.conv1.weight", "diffusers": "decoder.up_blocks.0.resnets.0.conv1.weight"},
        suggested="FLUX's ae.safetensors or a diffusers folder",
    ),
    "clip": Part(
        label="FLUX.1's clip",
        folder="text_encoder",
        tokenizer_folder="tokenizer",
        prefixes=("", "text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
        markers={"native": "text_model.embeddings.token_embedding.weight", "diffusers": "embeddings.token_embedding.weight"},
        suggested="clip_l.safetensors or a diffusers folder",
        tokenizer=(
            "clip_tokenizer.json.gz",
            {"bos_token": "<|startoftext|>", **dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")},
        ),
    ),
    "t5": Part(
        label="FLUX.1's t5",
        folder="text_encoder_2",
        tokenizer_folder="tokenizer_2",
        prefixes=("", "text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
        markers={"native": "encoder.block.0.layer.0.SelfAttention.q.weight"},
        suggested="t5xxl_fp16.safetensors, t5xxl_fp8_e4m3fn.safetensors or a diffusers folder",
        tokenizer=("t5_tokenizer.json.gz", _T5_SPECIAL),
        model_type="t5",
    ),
    "flux2_transformer": Part(
        label="FLUX.2 klein's transformer",
        folder="transformer",
        prefixes=_DIT_PREFIXES,
        markers={"native": "double_stream_modulation_img.lin.weight", "diffusers": "double_stream_modulation_img.linear.weight"},
        suggested="flux-2-klein-base-4b.safetensors (bf16 or fp8) or a diffusers folder",
    ),
    "flux2_vae": Part(
        label="FLUX.2's vae",
        folder="vae",
        prefixes=("", "vae.", "first_stage_model."),
        markers={"native": "decoder.up.0.block.0.conv1.weight", "diffusers": "decoder.up_blocks.0.resnets.0.conv1.weight"},
        suggested="flux2-vae.safetensors or a diffusers folder",
    ),
    "zimage_transformer": Part(
        label="Z-Image's transformer",
        folder="transformer",
        prefixes=_DIT_PREFIXES,
        markers={"native": "noise_refiner.0.attention.qkv.weight", "diffusers": "noise_refiner.0.attention.to_q.weight"},
        suggested="z_image_bf16.safetensors (bf16 or fp8) or a diffusers folder",
    ),
    "qwen3": Part(
        label="the text encoder Qwen3",
        folder="text_encoder",
        tokenizer_folder="tokenizer",
        prefixes=("model.", ""),
        markers={"native": "layers.0.self_attn.q_norm.weight"},
        suggested="qwen_3_4b.safetensors (bf16 or fp8) or a diffusers folder",
        tokenizer=("qwen_tokenizer.json.gz", _QWEN_SPECIAL),
        model_type="qwen3",
    ),
    "wan_transformer": Part(
        label="a Wan text-to-video transformer",
        folder="transformer",
        prefixes=_DIT_PREFIXES,
        markers=_WAN_MARKERS,
        suggested="e.g. wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors or a diffusers folder",
    ),
    "wan_transformer_2": Part(
        label="Wan2.2's low-noise transformer",
        folder="transformer_2",
        prefixes=_DIT_PREFIXES,
        markers=_WAN_MARKERS,
        suggested="e.g. wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors or a diffusers folder",
    ),
    "wan_vae": Part(
        label="Wan's vae",
        folder="vae",
        prefixes=("", "vae.", "first_stage_model."),
        markers=_WAN_VAE_MARKERS,
        suggested="wan_2.1_vae.safetensors or a diffusers folder",
    ),
    "umt5": Part(
        label="Wan's text encoder (UMT5)",
        folder="text_encoder",
        tokenizer_folder="tokenizer",
        prefixes=("", "text_encoders.umt5xxl.transformer.", "text_encoders.umt5xxl."),
        markers={"native": "encoder.block.0.layer.0.SelfAttention.q.weight"},
        suggested="umt5_xxl_fp16.safetensors, umt5_xxl_fp8_e4m3fn_scaled.safetensors or a diffusers folder",
        tokenizer=("umt5_tokenizer.json.gz", _T5_SPECIAL),
        model_type="umt5",
    ),
    "qwen_transformer": Part(
        label="Qwen-Image's transformer",
        folder="transformer",
        prefixes=_DIT_PREFIXES,
        markers={"diffusers": "transformer_blocks.0.img_mod.1.weight"},
        suggested="qwen_image_bf16.safetensors, qwen_image_fp8_e4m3fn.safetensors or a diffusers folder",
    ),
    "krea2_transformer": Part(
        label="Krea 2's transformer",
        folder="transformer",
        prefixes=_DIT_PREFIXES,
        markers={"native": "txtfusion.projector.weight", "diffusers": "text_fusion.projector.weight"},
        suggested="Krea 2's transformer as one .safetensors file or a diffusers folder",
    ),
    "qwen_vae": Part(
        label="Qwen-Image's vae",
        folder="vae",
        prefixes=("", "vae.", "first_stage_model."),
        markers=_WAN_VAE_MARKERS,
        suggested="qwen_image_vae.safetensors or a diffusers folder",
    ),
    "qwen25_vl": Part(
        label="Qwen-Image's text encoder (Qwen2.5-VL)",
        folder="text_encoder",
        tokenizer_folder="tokenizer",
        prefixes=_LANGUAGE_PREFIXES,
        markers={"native": "layers.0.self_attn.q_proj.bias"},
        suggested="qwen_2.5_vl_7b.safetensors, qwen_2.5_vl_7b_fp8_scaled.safetensors or a diffusers folder",
        tokenizer=("qwen_tokenizer.json.gz", _QWEN_SPECIAL),
        model_type="qwen2_5_vl",
    ),
    "qwen3_vl": Part(
        label="Krea 2's text encoder (Qwen3-VL 4B)",
        folder="text_encoder",
        tokenizer_folder="tokenizer",
        prefixes=_LANGUAGE_PREFIXES,
        markers={"native": "layers.0.self_attn.q_norm.weight"},
        suggested="Qwen3-VL 4B as one .safetensors file or a diffusers folder",
        tokenizer=("qwen_tokenizer.json.gz", _QWEN_SPECIAL),
        model_type="qwen3_vl",
    ),
}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_FP8 = {"F8_E4M3", "F8_E5M2"}
_EYES = re.compile(r"(model\.)?visual\.")  # of a vision-language model, whatever its language model is called beside them
_SCALES = (".scale_weight", ".weight_scale")  # older and newer name of the same factor beside `<layer>.weight`
# What a file may hold beside the weights of a part: scales (read where they belong) and what no family here uses.
BESIDE = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8", "spiece_model", "logit_scale")


# --- paths and hub ids ---


def single_file(path_or_id: str | Path, part: str) -> Path | None:
    """The file at `path_or_id`, or None for a folder or hub id; everything that cannot be read is refused here by name."""
    path = Path(path_or_id).expanduser()
    use = f"use {PARTS[part].suggested}"
    suffix = path.suffix.lower()
    if path.is_dir():
        return None
    if suffix in _PICKLES:
        raise ValueError(f"{path}: looks like a pickle ({suffix}), which can run code when it is read; {use}")
    if suffix == ".gguf":
        raise ValueError(f"{path}: GGUF files are quantised for inference and are not read; {use}")
    if not path.is_file():
        if HUB_ID.match(str(path_or_id)) and suffix != ".safetensors":
            return None
        raise ValueError(f"{path_or_id}: no such file or folder (for {PARTS[part].label}); {use}, or a hub id like owner/name")
    if suffix not in (".safetensors", ".sft"):
        raise ValueError(f"{path}: not a .safetensors file; {use}")
    if re.search(r"-\d{5}-of-\d{5}\.", path.name):
        raise ValueError(f"{path}: one shard of several; give the folder that holds them all ({path.parent})")
    return path


def part_folder(path_or_id: str | Path, part: str) -> Path | None:
    """The folder with the part's config.json, or None for a hub id."""
    root = Path(path_or_id).expanduser()
    if not root.is_dir():
        return None
    for folder in (root / PARTS[part].folder, root):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{root}: has no {PARTS[part].folder}/config.json or config.json ({part}); use {PARTS[part].suggested}")


def local_folder(path_or_id: str | Path, part: str) -> Path | None:
    """`part_folder`, and None for a single file too.

    Raises:
        ValueError: see `single_file` and `part_folder`.
    """
    return None if single_file(path_or_id, part) is not None else part_folder(path_or_id, part)


def from_folder(kind: Any, path_or_id: str | Path, part: str, **dtype: torch.dtype) -> Any:
    """`kind.from_pretrained` of a local folder or hub id, safetensors only.

    Raises:
        ValueError: it holds another model, a file is missing or damaged, or a weight is NaN or infinite.
    """
    folder = part_folder(path_or_id, part)
    # Both libraries fill what a folder lacks with random numbers, or with nothing, and say so in a log at most.
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True, **dtype}
    if folder is None:
        inside = PARTS[part].folder
        model, found = from_hub(
            lambda: kind.from_pretrained(str(path_or_id), subfolder=inside, use_safetensors=True, **options), path_or_id
        )
        _refuse_incomplete(model, found, path_or_id)
        refuse_not_finite(model, Path(path_or_id))
        return model
    config = read_json(folder / "config.json")
    _refuse_other_class(config, kind, folder)
    if (wanted := PARTS[part].model_type) is not None and config.get("model_type") != wanted:
        raise ValueError(f"{folder}: holds a {config.get('model_type')}, not {PARTS[part].label}; use {PARTS[part].suggested}")
    _weight_files(folder)
    try:
        with quiet_loading():
            model, found = kind.from_pretrained(str(folder), use_safetensors=True, local_files_only=True, **options)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be loaded ({error}); download this part again") from error
    _refuse_incomplete(model, found, folder)
    refuse_not_finite(model, folder)
    return model


# Of a language model, what no encoding of a text is made with; of a normalisation, a counter that only training reads.
_UNREAD = re.compile(r"((^|\.)(lm_head|visual)\.)|num_batches_tracked$")


def _refuse_incomplete(model: nn.Module, found: Mapping[str, Any], where: object) -> None:
    """Refuse what the loader has made up.

    Args:
        found: its `output_loading_info`.

    Raises:
        ValueError: a weight is missing, or has the shape of another model.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = {name for name in found["missing_keys"] if not _UNREAD.search(name)}
    # Weights that are tied to one that is there are missing in name only.
    present = {id(parameter) for name, parameter in parameters.items() if name not in missing}
    lacking = sorted(name for name in missing if id(parameters.get(name)) not in present)
    others = sorted(each if isinstance(each, str) else each[0] for each in found["mismatched_keys"])  # transformers 4: names alone
    _refuse_tensors(where, {"are missing": lacking, "have another shape than its config.json says": others})


def _refuse_tensors(where: object, kinds: Mapping[str, Sequence[str]]) -> None:
    if said := _said(kinds):
        raise ValueError(f"{where}: {said}; download this part again, its config.json too")


def _said(kinds: Mapping[str, Sequence[str]]) -> str:
    """How many tensors are wrong in which way, with a few of each; empty: none."""
    return "; ".join(f"{len(names)} tensors {what}, such as {', '.join(names[:3])}" for what, names in kinds.items() if names)


def check_tensors(model: nn.Module, folder: Path) -> None:
    """Compare a folder's headers with the network that its config.json describes; reads no weights. A config.json alone will do.

    Args:
        model: of diffusers, on any device.

    Raises:
        ValueError: tensors are missing, belong to no layer, or have another shape.
    """
    given = {name: shape for file in _files_that_diffusers_reads(folder) for name, shape in _shapes(file).items()}
    # None yet, where one plans before one downloads; or those of an autoencoder of before diffusers 0.15, which the library renames.
    if not given or any(name.endswith((".query.weight", ".proj_attn.weight")) for name in given):
        return
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = [re.compile(pattern) for pattern in getattr(type(model), "_keys_to_ignore_on_load_unexpected", None) or ()]
    _refuse_tensors(
        folder,
        {
            "are missing": [name for name in expected if name not in given and not _UNREAD.search(name)],
            "belong to no layer of its config.json": [
                name for name in given if name not in expected and not any(pattern.search(name) for pattern in ignored)
            ],
            "have another shape than its config.json says": [n for n in expected if n in given and given[n] != expected[n]],
        },
    )


def _files_that_diffusers_reads(folder: Path) -> list[Path]:
    """Others may lie beside them: the same weights in their author's layout, a LoRA. `config_only` has checked the index."""
    index, whole = folder / f"{_INDEXED[0]}.index.json", folder / _INDEXED[0]
    if index.is_file():
        return sorted({folder / shard for shard in read_json(index)["weight_map"].values()})
    return [whole] if whole.is_file() else []


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in set(file.keys())}


def refuse_not_finite(model: nn.Module, path: Path) -> None:
    """Weights that a library has read, each looked at once where it lies."""
    name = first_not_finite(model.state_dict())
    if name is None:
        return
    holders = [file for file in files_in(path, _WEIGHTS) if name in _header(file)] if path.is_dir() else []
    dtype = model.state_dict()[name].dtype
    raise ValueError(f"{holders[0] if holders else path}: tensor {name} holds NaN or infinite values as {dtype}; {_OTHER_WEIGHTS}")


_OTHER_WEIGHTS = "download it again, or set model.dtype to the one it was saved in"


def config_only(path_or_id: str | Path, part: str, kind: Any, infer: Callable[[Weights], dict[str, Any]]) -> dict[str, Any]:
    """The part's configuration without its weights; from a single file's header where there is none."""
    file = single_file(path_or_id, part)
    if file is not None:
        with Weights(file, part) as weights:
            return config_beside(weights) or infer(weights)
    folder = part_folder(path_or_id, part)
    if folder is None:
        return from_hub(lambda: kind.load_config(str(path_or_id), subfolder=PARTS[part].folder), path_or_id)
    config = read_json(folder / "config.json")
    _refuse_other_class(config, kind, folder)
    _check_shards(folder)
    return config


def _refuse_other_class(config: Mapping[str, Any], kind: Any, folder: Path) -> None:
    architectures = config.get("architectures")
    named = {str(name) for name in (config.get("_class_name"), *(architectures if isinstance(architectures, list) else ())) if name}
    # A text encoder may be saved as the whole CLIP or T5; transformers then takes the half it needs.
    if named and issubclass(kind, ModelMixin) and kind.__name__ not in named:
        raise ValueError(f"{folder}: holds a {', '.join(sorted(named))}, not a {kind.__name__}")


def from_hub(load: Callable[[], Any], path_or_id: str | Path) -> Any:
    """What a library loads by a hub id.

    Raises:
        ValueError: it cannot; says what to do.
    """
    try:
        return load()
    except OSError as error:
        raise ValueError(
            f"{path_or_id}: no such folder here, and as a hub id it cannot be loaded ({error}); accept its licence and run "
            f"`hf auth login`, download it with `hf download {path_or_id}`, or give a folder or file"
        ) from error


def _cached_folder(repo: str, part: str) -> Path:
    found = try_to_load_from_cache(repo, f"{PARTS[part].folder}/config.json")
    if not isinstance(found, str):
        raise _not_cached(repo, part)
    return Path(found).parent


def _not_cached(repo: str, part: str) -> ValueError:
    return ValueError(f"{repo}: the {part} is not in the local hub cache; run `hf download {repo}`, or give a folder")


def _weight_files(folder: Path) -> list[Path]:
    files = files_in(folder, _WEIGHTS)
    if not files:
        others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in {*_PICKLES, ".gguf"})
        found = f"only {', '.join(others)}, which are not read" if others else "none"
        raise ValueError(f"{folder}: no .safetensors weights ({found}); download the safetensors files of this part")
    _check_shards(folder)
    return files


_WEIGHTS = (".safetensors",)
_INDEXED = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def _check_shards(folder: Path) -> None:
    """Headers of the weight files, and that an index names no shard or tensor that is not there. Reads no weights.

    Raises:
        ValueError: a file is damaged or missing; names it.
    """
    tensors = {file.name: _header(file) for file in files_in(folder, _WEIGHTS)}
    for name in _INDEXED:
        index = folder / f"{name}.index.json"
        # transformers prefers a whole file to an index beside it, diffusers the index.
        if not index.is_file() or (name == "model.safetensors" and name in tensors):
            continue
        content = read_json(index)
        shards = content.get("weight_map")
        if not isinstance(content.get("metadata"), dict):
            raise ValueError(f"{index}: has no metadata, which the loader asks for; download it again")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{index}: its weight_map names no files; download it again")
        for tensor, shard in shards.items():
            if shard not in tensors:
                raise ValueError(f"{folder / shard}: missing, and {index.name} names it; download the folder again")
            if tensor not in tensors[shard]:
                raise ValueError(f"{folder / shard}: has no tensor {tensor}, which {index.name} says is in it; download both again")


def _header(path: Path) -> set[str]:
    """Names of the tensors of a file that is whole."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable .safetensors file ({error}); download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON that others wrote.

    Raises:
        ValueError: the file cannot be read as one; names it.
    """
    try:
        value = json_value(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no object of JSON; download it again")
    return value


# --- one safetensors file ---


class Weights:
    """One open .safetensors file seen as one part: names without prefix, fp8 upcast, scales multiplied out.

    Attributes:
        prefix: of the part's names.
        layout: a key of its markers.
        names: of its tensors, without prefix.
        sees: whether a vision tower is in the file.
    """

    def __init__(self, path: Path, part: str):
        self.path, self.part = path, part
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a readable .safetensors file ({error}); download it again") from error
        self._handle = self._file.__enter__()
        try:
            every = list(self._handle.keys())
            self.prefix, self.layout = _recognise(path, part, every)
            self.names = {name[len(self.prefix) :] for name in every if name.startswith(self.prefix)}
            self.sees = any(_EYES.match(name) for name in every)
            self._refuse_unknown_quantisation()
        except BaseException:
            self._file.__exit__(None, None, None)
            raise

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.__exit__(kind, error, trace)
        # Sizes are read off the shapes, and names converted, as those of a whole file of this part.
        if isinstance(error, (ValueError, LookupError, ZeroDivisionError)) and not str(error).startswith(str(self.path)):
            raise self.error(f"its tensors' names or shapes are none of {PARTS[self.part].label} ({error})") from error

    def error(self, reason: str) -> ValueError:
        """The refusal of this file: its path, why, and what to use instead."""
        return ValueError(f"{self.path}: {reason}; use {PARTS[self.part].suggested}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor from the header.

        Raises:
            ValueError: the file has no such tensor.
        """
        if name not in self.names:
            raise self.error(f"has no tensor {name}, so it is not the whole of {PARTS[self.part].label}")
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows, in `dtype` with its fp8 scale multiplied out in float32.

        Raises:
            ValueError: the file has no such tensor, a quantised one, or one with NaN or infinite values.
        """
        self.shape(name)
        stored = self._slice(name)
        if stored.get_dtype() not in _FLOATS:
            raise self.error(f"{name} is stored as {stored.get_dtype()}, a quantised format that is not read")
        tensor = self._handle.get_tensor(self.prefix + name) if rows is None else stored[rows]
        scale = self._scale(name)
        if scale is not None:
            tensor = tensor.float() * (scale[rows] if scale.numel() > 1 and rows is not None else scale)
        tensor = tensor.to(dtype)
        if not is_finite(tensor):
            raise ValueError(f"{self.path}: tensor {self.prefix}{name} holds NaN or infinite values as {dtype}; {_OTHER_WEIGHTS}")
        return tensor

    def all(self, dtype: torch.dtype, skip: Iterable[str] = ()) -> dict[str, Tensor]:
        """Every weight of the part."""
        beside = (*BESIDE, *skip)
        return {name: self.read(name, dtype) for name in sorted(self.names) if not is_beside(name, beside)}

    def _slice(self, name: str) -> Any:
        return self._handle.get_slice(self.prefix + name)

    def _scale(self, name: str) -> Tensor | None:
        """The factor of an fp8 weight: one number, or one a row as (rows, 1)."""
        if self._slice(name).get_dtype() not in _FP8:
            return None
        if not self.shape(name):
            raise self.error(f"{name} is one number in fp8")
        layer = name.removesuffix(".weight")
        found = [layer + suffix for suffix in _SCALES if layer + suffix in self.names]
        if not found:
            if "scaled_fp8" in self.names:
                raise ValueError(f"{self.path}: marked as scaled fp8, but {name} has no scale_weight; the file is damaged")
            return None
        scale = self._handle.get_tensor(self.prefix + found[0]).float()
        rows = self.shape(name)[0]
        if scale.numel() == 1:
            return scale.reshape(())
        if scale.numel() == rows and scale.shape[0] == rows:
            return scale.reshape(rows, *[1] * (len(self.shape(name)) - 1))
        raise self.error(f"{found[0]} of shape {tuple(scale.shape)} scales blocks of a weight, which is not read")

    def _refuse_unknown_quantisation(self) -> None:
        """ComfyUI writes each quantised layer's format beside it, or all formats into the header."""
        header = self._quantisation((self._handle.metadata() or {}).get("_quantization_metadata", "{}"), "_quantization_metadata")
        layers = header.get("layers") or {}
        if not isinstance(layers, dict) or not all(isinstance(spec, dict) for spec in layers.values()):
            raise self.error("the header's _quantization_metadata is damaged")
        formats = {layer: spec.get("format") for layer, spec in layers.items() if layer.startswith(self.prefix)}
        for name in self.names:
            if name.endswith(".comfy_quant"):
                stored = self._handle.get_tensor(self.prefix + name)
                text = bytes(stored.flatten().view(torch.uint8).tolist())
                formats[name.removesuffix(".comfy_quant")] = self._quantisation(text, name).get("format")
        for layer, name in formats.items():
            if name not in ("float8_e4m3fn", "float8_e5m2"):
                raise self.error(f"{layer} is quantised as {name}, which is not read")

    def _quantisation(self, text: str | bytes, where: str) -> dict[str, Any]:
        try:
            value = json_value(text)
        except ValueError as error:
            raise self.error(f"{where} cannot be read as JSON ({error})") from error
        if not isinstance(value, dict):
            raise self.error(f"{where} holds no object of JSON")
        return value


def is_beside(name: str, beside: Iterable[str]) -> bool:
    return any(name.endswith(word) or (word.endswith(".") and name.startswith(word)) for word in beside)


def _recognise(path: Path, part: str, names: list[str]) -> tuple[str, str]:
    """(prefix, layout) of the part inside a file with these tensor names."""
    present = set(names)
    for layout, marker in PARTS[part].markers.items():
        for prefix in PARTS[part].prefixes:
            if prefix + marker in present:
                return prefix, layout
    raise ValueError(f"{path}: {looks_like(names)}, not {PARTS[part].label}; use {PARTS[part].suggested}")


# (what one tensor name of the file contains, what the file then is); the first match counts.
_KNOWN = (
    (r"\.qweight$|\.wscales$|smooth_factor", "looks like a nunchaku / SVDQuant file, quantised for inference"),
    (r"\.absmax$|quant_state\.", "looks like a bitsandbytes 4-bit file (quantise at load time instead)"),
    (r"lora_(A|B|down|up)\b", "looks like a LoRA (lora.init_from takes one)"),
    (r"(^|\.)double_stream_modulation_img\.", "looks like a FLUX.2 transformer"),
    (r"(^|\.)(txtfusion|text_fusion)\.", "looks like a Krea 2 transformer"),
    (r"(^|\.)transformer_blocks\.0\.img_mod\.", "looks like a Qwen-Image transformer"),
    (r"(^|\.)noise_refiner\.0\.", "looks like a Z-Image or Lumina transformer"),
    (r"(^|\.)double_blocks\.0\.", "looks like a relative of FLUX with other modules"),
    (r"transformer\.resblocks\.", "looks like an OpenCLIP file"),
    (r"(^|\.)bn\.running_mean", "looks like FLUX.2's VAE"),
    (r"(^|\.)quant_conv\.", "looks like a Stable Diffusion VAE"),
    (r"^(decoder|encoder)\.(middle|downsamples)", "looks like a Wan VAE"),
    (r"(^|\.)blocks\.0\.self_attn", "looks like a Wan transformer"),
    (r"(^|\.)(double|single)_blocks\.|transformer_blocks\.", "looks like a transformer"),
    (r"decoder\.up", "looks like a VAE"),
    (r"text_model\.encoder\.layers", "looks like a CLIP text encoder"),
    (r"encoder\.block\.0\.layer\.0", "looks like a T5 encoder"),
    (r"(^|\.)layers\.0\.self_attn\.q_proj\.bias", "looks like Qwen2.5-VL"),
    (r"(^|\.)layers\.0\.self_attn\.q_norm\.", "looks like Qwen3 or Qwen3-VL"),
)


def looks_like(names: list[str]) -> str:
    for pattern, answer in _KNOWN:
        if any(re.search(pattern, name) for name in names):
            return answer
    return f"has an unknown layout (tensors such as {', '.join(sorted(names)[:3]) or 'none at all'})"


def config_beside(weights: Weights) -> dict[str, Any] | None:
    """The config.json beside a file in diffusers' or transformers' own layout and under its own name."""
    beside = weights.path.with_name("config.json")
    own_name = weights.path.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")
    return read_json(beside) if own_name and not weights.prefix and beside.is_file() else None


def count_blocks(names: Iterable[str], pattern: str) -> int:
    """Number of blocks: the highest number that `pattern`'s group matches at the start of a name, plus one."""
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


# --- building ---


def parameters_of(kind: Any) -> Mapping[str, inspect.Parameter]:
    """What a class of diffusers is configured with, by name."""
    return {name: one for name, one in inspect.signature(kind.__init__).parameters.items() if name != "self"}


def build(
    make: Callable[[], Any],
    state: dict[str, Tensor],
    weights: Weights,
    rename: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
) -> Any:
    """`make()` on the meta device, then every tensor assigned, not copied."""
    with torch.device("meta"):
        model = make()
    if rename is not None:
        state = rename(state, model)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    kinds = {
        "are missing": [name for name in expected if name not in given],
        "belong to no layer": [name for name in given if name not in expected],
        "have another shape": [name for name in expected if name in given and expected[name] != given[name]],
    }
    if found := _said(kinds):
        raise weights.error(found)
    model.load_state_dict(state, strict=True, assign=True)
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    return model


# --- tokenizers ---


def assets() -> Any:
    return resources.files("byg_plugin.models") / "assets"


def shipped_config(name: str) -> dict[str, Any]:
    """A published configuration, by its name in `assets` without `.json`, e.g. `flux_dev/transformer`."""
    return json.loads((assets() / f"{name}.json").read_text(encoding="utf-8"))


def _tokenizer_folder(path_or_id: str | Path, part: str) -> Path | None:
    """The tokenizer's folder of a local path: in the root, beside or in the text encoder's. None: shipped one."""
    root = Path(path_or_id).expanduser()
    if not root.is_dir():
        return None
    inside = root / str(PARTS[part].tokenizer_folder)
    return inside if inside.is_dir() else _beside(root, part)


def _beside(folder: Path, part: str) -> Path | None:
    beside = folder.parent / str(PARTS[part].tokenizer_folder)
    if folder.name == PARTS[part].folder and beside.is_dir():
        return beside
    return folder if (folder / "tokenizer_config.json").is_file() else None


def load_tokenizer(path_or_id: str | Path, part: str, length: int) -> PreTrainedTokenizerBase:
    """Its own tokenizer, or the shipped one where a file or folder has none."""
    folder = _tokenizer_folder(path_or_id, part)
    if folder is not None:
        for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            if (folder / name).is_file():
                read_json(folder / name)  # the library's own reader ends in a traceback
        try:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except (ValueError, LookupError, TypeError) as error:  # a JSON that is no tokenizer's, too
            reason = " ".join(str(error).split())[:300]
            remedy = "use the base model's tokenizer; code from a model folder is never run"
            raise ValueError(f"{folder}: its tokenizer cannot be loaded ({reason}); {remedy}") from error
    path = Path(path_or_id).expanduser()
    if not path.exists():
        inside = str(PARTS[part].tokenizer_folder)
        return from_hub(lambda: AutoTokenizer.from_pretrained(str(path_or_id), subfolder=inside, trust_remote_code=False), path_or_id)
    return shipped_tokenizer(part, length)


def shipped_tokenizer(part: str, length: int) -> PreTrainedTokenizerBase:
    """The tokenizer that this package has for a text encoder."""
    shipped = PARTS[part].tokenizer
    assert shipped is not None, part
    name, special = shipped
    backend = Tokenizer.from_str(gzip.decompress((assets() / "tokenizers" / name).read_bytes()).decode())
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, padding_side="right", **special)


def fitting(tokenizer: PreTrainedTokenizerBase, vocabulary: int, path_or_id: str | Path) -> PreTrainedTokenizerBase:
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"{path_or_id}: the tokenizer has {len(tokenizer)} tokens, the text encoder knows {vocabulary}; "
            "give a diffusers folder that holds both"
        )
    return tokenizer


# --- fingerprints ---

_SAMPLES, _SAMPLE_BYTES = 1024, 4096


def _hash_sampled(digest: Any, path: Path) -> None:
    """Size, header and evenly spaced samples of a safetensors file; all of a small one."""
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            digest.update(file.read())
            return
        length = int.from_bytes(file.read(8), "little")  # of the JSON header that follows
        digest.update(file.read(min(length, size)))
        for index in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))


def _hash_tokenizer(digest: Any, folder: Path | None, part: str) -> None:
    if folder is None:
        shipped = PARTS[part].tokenizer
        assert shipped is not None, part
        digest.update((assets() / "tokenizers" / shipped[0]).read_bytes())
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model") and not is_hidden(path.name):
            digest.update(path.name.encode() + path.read_bytes())


def weights_fingerprint(path_or_id: str | Path, part: str) -> str:
    """Identity of the weights of `vae`, `clip` or `t5` (texts: and tokenizer): 32 hex digits, wherever they lie.

    Configuration, tensor names, sizes and 4 MiB sampled over each weights file are hashed, not the whole: a change of a
    few bytes in a large file can go unseen, another model or finetune cannot.

    Raises:
        ValueError: nothing is at `path_or_id`, or it is a hub id that is not in the local cache yet.
    """
    digest = hashlib.sha256(part.encode())
    file = single_file(path_or_id, part)
    if file is not None:
        _hash_sampled(digest, file)
        tokenizer = None
    else:
        folder = part_folder(path_or_id, part)
        tokenizer = _tokenizer_folder(path_or_id, part) if folder is not None and PARTS[part].tokenizer else None
        if folder is None:
            folder = _cached_folder(str(path_or_id), part)
            tokenizer = _beside(folder, part)
            if PARTS[part].tokenizer and tokenizer is None:
                raise _not_cached(str(path_or_id), "tokenizer of its " + part)
        for path in _weight_files(folder):
            _hash_sampled(digest, path)
        # Private keys and the library's version change with every saving and say nothing of the weights.
        config = read_json(folder / "config.json")
        kept = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    if PARTS[part].tokenizer:
        _hash_tokenizer(digest, tokenizer, part)
    return digest.hexdigest()[:32]
