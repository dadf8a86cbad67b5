"""FLUX.1's frozen parts from what people have on disk, without a hub.

A *place* is a diffusers folder (root, or the part's own folder), a hub id (`owner/name`), or one .safetensors file:

- transformer: Black Forest Labs' layout (`double_blocks.…`, bare or under `model.diffusion_model.`, also inside an
  all-in-one checkpoint) or diffusers' layout
- VAE: `ae.safetensors` (`decoder.up.0.…`; also under `vae.`) or diffusers' layout
- CLIP-L, T5-XXL: `clip_l.safetensors`, `t5xxl_*.safetensors`, or the copies inside an all-in-one checkpoint

fp8 weights are upcast; scaled fp8 (`scale_weight`, `weight_scale`) is multiplied out. All else is refused by name.
Configurations and tokenizers of single files come from `assets/`; sizes are read off the tensors' shapes.
Models are built on the meta device and take each tensor as it is read: there is never a second copy.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from byg_plugin.models import flux_names

# part -> (weights' and tokenizer's folders inside a diffusers root, prefixes a single file may put before every name)
_SUBFOLDERS = {
    "transformer": ("transformer", None),
    "vae": ("vae", None),
    "clip": ("text_encoder", "tokenizer"),
    "t5": ("text_encoder_2", "tokenizer_2"),
}
_PREFIXES = {
    "transformer": ("", "model.diffusion_model.", "diffusion_model.", "transformer."),
    "vae": ("", "vae.", "first_stage_model."),
    "clip": ("", "text_encoders.clip_l.transformer.", "text_encoders.clip_l."),
    "t5": ("", "text_encoders.t5xxl.transformer.", "text_encoders.t5xxl."),
}
# A tensor that only this layout of this part has.
_MARKERS = {
    "transformer": {
        "native": "double_blocks.0.img_attn.qkv.weight",
        "diffusers": "transformer_blocks.0.attn.to_q.weight",
    },
    "vae": {"native": "decoder.up.0.block.0.conv1.weight", "diffusers": "decoder.up_blocks.0.resnets.0.conv1.weight"},
    "clip": {
        "native": "text_model.embeddings.token_embedding.weight",
        "diffusers": "embeddings.token_embedding.weight",
    },
    "t5": {"native": "encoder.block.0.layer.0.SelfAttention.q.weight"},
}
_SUGGESTED = {
    "transformer": "flux1-dev.safetensors (bf16 or fp8) or a diffusers folder",
    "vae": "FLUX's ae.safetensors or a diffusers folder",
    "clip": "clip_l.safetensors or a diffusers folder",
    "t5": "t5xxl_fp16.safetensors, t5xxl_fp8_e4m3fn.safetensors or a diffusers folder",
}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_FP8 = {"F8_E4M3", "F8_E5M2"}
_SCALES = (".scale_weight", ".weight_scale")  # older and newer name of the same factor beside `<layer>.weight`
# What a file may hold beside the weights of a part: scales (read where they belong) and what FLUX does not use.
_BESIDE = (*_SCALES, ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8", "spiece_model", "logit_scale")
_BESIDE_CLIP = ("text_projection.weight", "position_ids")


# --- public: one function a part ---


def load_flux_transformer(place: str | Path, *, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The FLUX.1 transformer in `dtype`, on the CPU, in eval mode.

    A file without `guidance_in` (schnell) gives a model with `config.guidance_embeds` False.

    Raises:
        ValueError: nothing is at `place`, or it is not FLUX.1 in a layout named at the top of this module.
    """
    file = _single_file(place, "transformer")
    if file is None:
        model = _from_folder(FluxTransformer2DModel, place, "transformer", torch_dtype=dtype)
    else:
        with _Weights(file, "transformer") as weights:
            config = _config_beside(weights) or _transformer_config(weights)
            state = _native_transformer(weights, config, dtype) if weights.layout == "native" else weights.all(dtype)
            model = _build(lambda: FluxTransformer2DModel.from_config(config), state, weights)
    _refuse_extra_channels(model.config, place)
    return model.eval()


def flux_transformer_on_meta(place: str | Path) -> FluxTransformer2DModel:
    """The transformer that `load_flux_transformer` would load, on the meta device: names and shapes, no weights read.

    Raises:
        ValueError: as `load_flux_transformer`, as far as configuration or header tell.
    """
    config = _config_only(place, "transformer", FluxTransformer2DModel, _transformer_config)
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    _refuse_extra_channels(model.config, place)
    return model.eval()


def load_flux_vae(place: str | Path, *, dtype: torch.dtype) -> AutoencoderKL:
    """FLUX.1's autoencoder in `dtype`, on the CPU, in eval mode.

    A single file carries no latent scale: FLUX.1's (0.3611, shift 0.1159) is assumed. SD3's autoencoder has the same
    shapes and would be taken for it.

    Raises:
        ValueError: nothing is at `place`, or it is not a 16-channel autoencoder without quantisation convolutions.
    """
    file = _single_file(place, "vae")
    if file is None:
        return _from_folder(AutoencoderKL, place, "vae", torch_dtype=dtype).eval()
    with _Weights(file, "vae") as weights:
        config = _config_beside(weights) or _vae_config(weights)
        state = weights.all(dtype)
        if weights.layout == "native":
            state = convert_ldm_vae_checkpoint(state, config)
        return _build(lambda: AutoencoderKL.from_config(config), state, weights).eval()


def load_clip_l(place: str | Path, *, dtype: torch.dtype) -> tuple[CLIPTextModel, PreTrainedTokenizerBase]:
    """CLIP-L's text model in `dtype`, on the CPU, in eval mode, and its tokenizer.

    Raises:
        ValueError: nothing is at `place`, it is not CLIP-L, or the tokenizer does not fit its vocabulary.
    """
    file = _single_file(place, "clip")
    if file is None:
        model = _from_folder(CLIPTextModel, place, "clip", dtype=dtype)
    else:
        with _Weights(file, "clip") as weights:
            config = CLIPTextConfig(**(_config_beside(weights) or _clip_config(weights)))
            state = weights.all(dtype, skip=_BESIDE_CLIP)
            model = _build(lambda: CLIPTextModel(config), state, weights, rename=_clip_names)
            # Not in the file (transformers keeps it out of checkpoints), so it is still on the meta device.
            body = getattr(model, "text_model", model)
            body.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    tokenizer = _tokenizer(place, "clip", model.config.max_position_embeddings)
    return model.eval(), _fitting(tokenizer, model.config.vocab_size, place)


def load_t5(place: str | Path, *, dtype: torch.dtype) -> tuple[T5EncoderModel, PreTrainedTokenizerBase]:
    """The T5 v1.1 encoder in `dtype`, on the CPU, in eval mode, and its tokenizer.

    Raises:
        ValueError: nothing is at `place`, it is not a T5 v1.1 encoder, or the tokenizer does not fit its vocabulary.
    """
    file = _single_file(place, "t5")
    if file is None:
        model = _from_folder(T5EncoderModel, place, "t5", dtype=dtype)
    else:
        with _Weights(file, "t5") as weights:
            config = T5Config(**(_config_beside(weights) or _t5_config(weights)))
            state = weights.all(dtype, skip=("decoder.",))
            model = _build(lambda: T5EncoderModel(config), state, weights, rename=_t5_names)
    return model.eval(), _fitting(_tokenizer(place, "t5", 512), model.config.vocab_size, place)


def vae_downsampling(place: str | Path) -> int:
    """Pixels a latent side stands for (8 for FLUX.1), from the configuration or a file's header; reads no weights.

    Raises:
        ValueError: nothing is at `place`, or it is not FLUX.1's kind of autoencoder.
    """
    config = _config_only(place, "vae", AutoencoderKL, _vae_config)
    return 2 ** (len(config["block_out_channels"]) - 1)


def weights_fingerprint(place: str | Path, part: str) -> str:
    """Identity of the weights of `vae`, `clip` or `t5` (texts: and tokenizer): 32 hex digits, wherever they lie.

    Configuration, tensor names, sizes and 4 MiB sampled over each weights file are hashed, not the whole: a change of a
    few bytes in a large file can go unseen, another model or finetune cannot.

    Raises:
        ValueError: nothing is at `place`, or it is a hub id that is not in the local cache yet.
    """
    digest = hashlib.sha256(part.encode())
    file = _single_file(place, part)
    if file is not None:
        _hash_sampled(digest, file)
        tokenizer = None
    else:
        folder = _part_folder(place, part)
        tokenizer = _tokenizer_folder(place, part) if folder is not None and part in _SHIPPED_TOKENIZERS else None
        if folder is None:
            folder = _cached_folder(str(place), part)
            tokenizer = _beside(folder, part)
            if part in _SHIPPED_TOKENIZERS and tokenizer is None:
                raise _not_cached(str(place), "tokenizer of its " + part)
        for path in _weight_files(folder):
            _hash_sampled(digest, path)
        # Private keys and the library's version change with every saving and say nothing of the weights.
        config = _json(folder / "config.json")
        kept = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
        digest.update(json.dumps(kept, sort_keys=True).encode())
    if part in _SHIPPED_TOKENIZERS:
        _hash_tokenizer(digest, tokenizer, part)
    return digest.hexdigest()[:32]


def shipped_config(name: str) -> dict[str, Any]:
    """FLUX.1-dev's configuration of `transformer`, `vae`, `clip_l`, `t5_xxl` or `scheduler`."""
    return json.loads((_assets() / "flux_dev" / f"{name}.json").read_text(encoding="utf-8"))


def to_native_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers FLUX.1 state dict in Black Forest Labs' layout (the inverse of what the loader does)."""
    native: dict[str, Tensor] = {}
    double = _count(state, r"transformer_blocks\.(\d+)\.")
    single = _count(state, r"single_transformer_blocks\.(\d+)\.")
    for linear in flux_names.linears(double, single, any("guidance_embedder" in name for name in state)):
        for kind in ("weight", "bias"):
            rows = torch.cat([state[f"{part}.{kind}"] for part in linear.parts])
            native[f"{linear.native}.{kind}"] = _swap_halves(rows) if linear.swap else rows
    for name, ours in flux_names.norms(double, single):
        native[f"{name}.scale"] = state[f"{ours}.weight"]
    return native


# --- places ---


def _single_file(place: str | Path, part: str) -> Path | None:
    """The file at `place`, or None for a folder or hub id; everything that cannot be read is refused here by name."""
    path = Path(place).expanduser()
    use = f"use {_SUGGESTED[part]}"
    suffix = path.suffix.lower()
    if path.is_dir():
        return None
    if suffix in _PICKLES:
        raise ValueError(f"{path}: looks like a pickle ({suffix}), which can run code when it is read; {use}")
    if suffix == ".gguf":
        raise ValueError(f"{path}: GGUF files are quantised for inference and are not read; {use}")
    if not path.is_file():
        if _HUB_ID.match(str(place)) and suffix != ".safetensors":
            return None
        raise ValueError(f"{place}: no such file or folder (for the {part}); {use}, or a hub id like owner/name")
    if suffix not in (".safetensors", ".sft"):
        raise ValueError(f"{path}: not a .safetensors file; {use}")
    if re.search(r"-\d{5}-of-\d{5}\.", path.name):
        raise ValueError(f"{path}: one shard of several; give the folder that holds them all ({path.parent})")
    return path


def _part_folder(place: str | Path, part: str) -> Path | None:
    """The folder with the part's config.json, or None for a hub id."""
    root = Path(place).expanduser()
    if not root.is_dir():
        return None
    for folder in (root / _SUBFOLDERS[part][0], root):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{root}: has no {_SUBFOLDERS[part][0]}/config.json or config.json ({part}); use {_SUGGESTED[part]}")


def _from_folder(kind: Any, place: str | Path, part: str, **dtype: torch.dtype) -> Any:
    """`kind.from_pretrained` of a local folder or hub id, safetensors only."""
    folder = _part_folder(place, part)
    if folder is None:
        options = {"subfolder": _SUBFOLDERS[part][0], "use_safetensors": True, **dtype}
        return _hub(lambda: kind.from_pretrained(str(place), **options), place)
    _refuse_other_class(_json(folder / "config.json"), kind, folder)
    _weight_files(folder)
    return kind.from_pretrained(str(folder), use_safetensors=True, local_files_only=True, **dtype)


def _config_only(place: str | Path, part: str, kind: Any, infer: Callable[[_Weights], dict[str, Any]]) -> dict[str, Any]:
    """The part's configuration without its weights; from a single file's header where there is none."""
    file = _single_file(place, part)
    if file is not None:
        with _Weights(file, part) as weights:
            return _config_beside(weights) or infer(weights)
    folder = _part_folder(place, part)
    if folder is None:
        return _hub(lambda: kind.load_config(str(place), subfolder=_SUBFOLDERS[part][0]), place)
    config = _json(folder / "config.json")
    _refuse_other_class(config, kind, folder)
    return config


def _refuse_other_class(config: Mapping[str, Any], kind: Any, folder: Path) -> None:
    named = {config.get("_class_name"), *(config.get("architectures") or ())} - {None}
    # A text encoder may be saved as the whole CLIP or T5; transformers then takes the half it needs.
    if named and kind in (FluxTransformer2DModel, AutoencoderKL) and kind.__name__ not in named:
        raise ValueError(f"{folder}: holds a {', '.join(sorted(named))}, not a {kind.__name__}")


def _hub(load: Callable[[], Any], place: str | Path) -> Any:
    try:
        return load()
    except OSError as error:
        raise ValueError(
            f"{place}: no such folder here, and as a hub id it cannot be loaded ({error}); accept its licence and run "
            f"`hf auth login`, download it with `hf download {place}`, or give a folder or file"
        ) from error


def _cached_folder(repo: str, part: str) -> Path:
    found = try_to_load_from_cache(repo, f"{_SUBFOLDERS[part][0]}/config.json")
    if not isinstance(found, str):
        raise _not_cached(repo, part)
    return Path(found).parent


def _not_cached(repo: str, part: str) -> ValueError:
    return ValueError(f"{repo}: the {part} is not in the local hub cache; run `hf download {repo}`, or give a folder")


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in {*_PICKLES, ".gguf"})
        found = f"only {', '.join(others)}, which are not read" if others else "none"
        raise ValueError(f"{folder}: no .safetensors weights ({found}); download the safetensors files of this part")
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error


# --- one safetensors file ---


class _Weights:
    """One open .safetensors file seen as one part: names without prefix, fp8 upcast, scales multiplied out."""

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
            self._refuse_unknown_quantisation()
        except BaseException:
            self._file.__exit__(None, None, None)
            raise

    def __enter__(self) -> _Weights:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def error(self, reason: str) -> ValueError:
        """The refusal of this file: its path, why, and what to use instead."""
        return ValueError(f"{self.path}: {reason}; use {_SUGGESTED[self.part]}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor from the header.

        Raises:
            ValueError: the file has no such tensor.
        """
        if name not in self.names:
            raise self.error(f"has no tensor {name}, so it is not a whole {self.part}")
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, dtype: torch.dtype, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows, in `dtype` with its fp8 scale multiplied out in float32."""
        self.shape(name)
        stored = self._slice(name)
        if stored.get_dtype() not in _FLOATS:
            raise self.error(f"{name} is stored as {stored.get_dtype()}, a quantised format that is not read")
        tensor = self._handle.get_tensor(self.prefix + name) if rows is None else stored[rows]
        scale = self._scale(name)
        if scale is None:
            return tensor.to(dtype)
        if scale.numel() > 1 and rows is not None:
            scale = scale[rows]
        return (tensor.float() * scale).to(dtype)

    def all(self, dtype: torch.dtype, skip: Iterable[str] = ()) -> dict[str, Tensor]:
        """Every weight of the part."""
        beside = (*_BESIDE, *skip)
        return {name: self.read(name, dtype) for name in sorted(self.names) if not _is_beside(name, beside)}

    def _slice(self, name: str) -> Any:
        return self._handle.get_slice(self.prefix + name)

    def _scale(self, name: str) -> Tensor | None:
        """The factor of an fp8 weight: one number, or one a row as (rows, 1)."""
        if self._slice(name).get_dtype() not in _FP8:
            return None
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
        header = json.loads((self._handle.metadata() or {}).get("_quantization_metadata", "{}"))
        layers = header.get("layers", {})
        formats = {layer: spec.get("format") for layer, spec in layers.items() if layer.startswith(self.prefix)}
        for name in self.names:
            if name.endswith(".comfy_quant"):
                spec = bytes(self._handle.get_tensor(self.prefix + name).view(torch.uint8).tolist())
                formats[name.removesuffix(".comfy_quant")] = json.loads(spec).get("format")
        for layer, name in formats.items():
            if name not in ("float8_e4m3fn", "float8_e5m2"):
                raise self.error(f"{layer} is quantised as {name}, which is not read")


def _is_beside(name: str, beside: Iterable[str]) -> bool:
    return any(name.endswith(word) or (word.endswith(".") and name.startswith(word)) for word in beside)


def _recognise(path: Path, part: str, names: list[str]) -> tuple[str, str]:
    """(prefix, layout) of the part inside a file with these tensor names."""
    present = set(names)
    for layout, marker in _MARKERS[part].items():
        for prefix in _PREFIXES[part]:
            if prefix + marker in present:
                return prefix, layout
    raise ValueError(f"{path}: {_looks_like(names)}, not FLUX.1's {part}; use {_SUGGESTED[part]}")


# (what one tensor name of the file contains, what the file then is); the first match counts.
_KNOWN = (
    (r"\.qweight$|\.wscales$|smooth_factor", "looks like a nunchaku / SVDQuant file, quantised for inference"),
    (r"\.absmax$|quant_state\.", "looks like a bitsandbytes 4-bit file (quantise at load time instead)"),
    (r"lora_(A|B|down|up)\b", "looks like a LoRA (lora.init_from takes one)"),
    (r"(^|\.)double_stream_modulation_img\.", "looks like a FLUX.2 transformer"),
    (r"(^|\.)double_blocks\.0\.", "looks like a relative of FLUX with other modules"),
    (r"transformer\.resblocks\.", "looks like an OpenCLIP file"),
    (r"(^|\.)quant_conv\.", "looks like a Stable Diffusion VAE"),
    (r"^(decoder|encoder)\.(middle|downsamples)", "looks like a Wan VAE"),
    (r"(^|\.)blocks\.0\.self_attn", "looks like a Wan transformer"),
    (r"(^|\.)(double|single)_blocks\.|transformer_blocks\.", "looks like a transformer"),
    (r"decoder\.up", "looks like a VAE"),
    (r"text_model\.encoder\.layers", "looks like a CLIP text encoder"),
    (r"encoder\.block\.0\.layer\.0", "looks like a T5 encoder"),
)


def _looks_like(names: list[str]) -> str:
    for pattern, answer in _KNOWN:
        if any(re.search(pattern, name) for name in names):
            return answer
    return f"has an unknown layout (tensors such as {', '.join(sorted(names)[:3]) or 'none at all'})"


def _config_beside(weights: _Weights) -> dict[str, Any] | None:
    """The config.json beside a file in diffusers' or transformers' own layout and under its own name."""
    beside = weights.path.with_name("config.json")
    own_name = weights.path.name in ("diffusion_pytorch_model.safetensors", "model.safetensors")
    return _json(beside) if own_name and not weights.prefix and beside.is_file() else None


# --- configurations from shapes ---


def _count(names: Iterable[str], pattern: str) -> int:
    """Number of blocks: the highest number that `pattern`'s group matches at the start of a name, plus one."""
    found = [int(match[1]) for name in names if (match := re.match(pattern, name))]
    return max(found, default=-1) + 1


def _transformer_config(weights: _Weights) -> dict[str, Any]:
    native = weights.layout == "native"
    stem = "" if native else "transformer_"
    guidance = "guidance_in.in_layer" if native else "time_text_embed.guidance_embedder.linear_1"

    def shape(linear: str) -> tuple[int, ...]:
        found = flux_names.find_native(linear)
        assert found is not None, linear
        return weights.shape((found.native if native else found.parts[0]) + ".weight")

    width, in_channels = shape("img_in")
    norm = "double_blocks.0.img_attn.norm.query_norm.scale" if native else "transformer_blocks.0.attn.norm_q.weight"
    head = weights.shape(norm)[0]
    out_channels = shape("final_layer.linear")[0]
    return shipped_config("transformer") | {
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": _count(weights.names, rf"{stem or 'double_'}blocks\.(\d+)\."),
        "num_single_layers": _count(weights.names, rf"single_{stem}blocks\.(\d+)\."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape("txt_in")[1],
        "pooled_projection_dim": shape("vector_in.in_layer")[1],
        "guidance_embeds": f"{guidance}.weight" in weights.names,
        "axes_dims_rope": _rope_axes(head, weights.path),
    }


def _rope_axes(head: int, path: Path) -> list[int]:
    """FLUX.1's split 16 : 56 : 56 of a head's channels; the file itself does not tell."""
    axes = [head // 8, head * 7 // 16, head * 7 // 16]
    if sum(axes) != head or any(axis % 2 for axis in axes):
        raise ValueError(
            f"{path}: heads of {head} channels are not FLUX.1's (128) and the file does not say how positions "
            "split them; give a diffusers folder, whose config.json does"
        )
    return axes


def _refuse_extra_channels(config: Any, place: str | Path) -> None:
    if config.out_channels not in (None, config.in_channels):
        raise ValueError(
            f"{place}: takes {config.in_channels} channels and returns {config.out_channels}, so it looks like FLUX.1 "
            "Fill, Depth or Canny, whose extra input is not supplied here; use FLUX.1-dev or FLUX.1-Kontext-dev"
        )


def _vae_config(weights: _Weights) -> dict[str, Any]:
    if weights.layout != "native":
        raise weights.error("diffusers' layout without its config.json beside it")
    if any(re.match(r"(post_)?quant_conv\.", name) for name in weights.names):
        raise weights.error("has quantisation convolutions, so it looks like a Stable Diffusion VAE")
    blocks = _count(weights.names, r"encoder\.down\.(\d+)\.")
    widths = [weights.shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(blocks)]
    latent = weights.shape("decoder.conv_in.weight")[1]
    if latent != 16:
        raise weights.error(f"a VAE of {latent} latent channels, FLUX.1 has 16")
    return shipped_config("vae") | {
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "block_out_channels": widths,
        "layers_per_block": _count(weights.names, r"encoder\.down\.0\.block\.(\d+)\."),
        "in_channels": weights.shape("encoder.conv_in.weight")[1],
        "out_channels": weights.shape("decoder.conv_out.weight")[0],
    }


def _clip_config(weights: _Weights) -> dict[str, Any]:
    body = "text_model." if weights.layout == "native" else ""
    vocabulary, width = weights.shape(f"{body}embeddings.token_embedding.weight")
    if width == 1280 or width % 64:
        raise weights.error(f"a text encoder of width {width}, CLIP-L has 768 (CLIP-G: 1280)")
    return shipped_config("clip_l") | {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "projection_dim": width,
        "intermediate_size": weights.shape(f"{body}encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _count(weights.names, re.escape(body) + r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": weights.shape(f"{body}embeddings.position_embedding.weight")[0],
    }


def _t5_config(weights: _Weights) -> dict[str, Any]:
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    if bias.format(1) in weights.names:
        raise weights.error("a position bias in every block, so it looks like UMT5 (Wan's text encoder)")
    if "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" not in weights.names:
        raise weights.error("feed-forward layers without gate, so it looks like T5 v1.0")
    buckets, heads = weights.shape(bias.format(0))
    inner, width = weights.shape("encoder.block.0.layer.0.SelfAttention.q.weight")
    embedding = "shared.weight" if "shared.weight" in weights.names else "encoder.embed_tokens.weight"
    return shipped_config("t5_xxl") | {
        "vocab_size": weights.shape(embedding)[0],
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": weights.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": _count(weights.names, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


# --- building ---


def _native_transformer(weights: _Weights, config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Diffusers' state dict, read piece by piece: a fused tensor is never whole in memory."""
    double, single = config["num_layers"], config["num_single_layers"]
    state: dict[str, Tensor] = {}
    used = set()
    for linear in flux_names.linears(double, single, config["guidance_embeds"]):
        for kind in ("weight", "bias"):
            name = f"{linear.native}.{kind}"
            used.add(name)
            state |= _split(weights, name, linear, kind, dtype)
    for native, ours in flux_names.norms(double, single):
        used.add(f"{native}.scale")
        state[f"{ours}.weight"] = weights.read(f"{native}.scale", dtype)
    unknown = sorted(name for name in weights.names - used if not _is_beside(name, _BESIDE))
    if unknown:
        raise weights.error(f"has {len(unknown)} tensors that FLUX.1 does not have, such as {', '.join(unknown[:3])}")
    return state


def _split(weights: _Weights, name: str, linear: flux_names.Linear, kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    total = weights.shape(name)[0]
    if len(linear.parts) == 1:
        whole = weights.read(name, dtype)
        return {f"{linear.parts[0]}.{kind}": _swap_halves(whole) if linear.swap else whole}
    unit, remainder = divmod(total, sum(linear.widths))
    if remainder:
        raise ValueError(f"{weights.path}: {name} has {total} rows, which do not divide into {len(linear.parts)} parts of FLUX.1")
    parts, start = {}, 0
    for part, width in zip(linear.parts, linear.widths, strict=True):
        parts[f"{part}.{kind}"] = weights.read(name, dtype, slice(start, start + width * unit))
        start += width * unit
    return parts


def _swap_halves(rows: Tensor) -> Tensor:
    first, second = rows.chunk(2)
    return torch.cat([second, first])


def _clip_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Names with or without `text_model.`, as this version of transformers has them."""
    body = "text_model." if hasattr(model, "text_model") else ""
    return {body + name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _t5_names(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """One embedding under its two names; files hold either or both."""
    names = ("shared.weight", "encoder.embed_tokens.weight")
    embedding = next(state[name] for name in names if name in state)
    return state | dict.fromkeys((name for name in names if name in model.state_dict()), embedding)


def _build(
    make: Callable[[], Any],
    state: dict[str, Tensor],
    weights: _Weights,
    rename: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
) -> Any:
    """`make()` on the meta device, then every tensor assigned, not copied."""
    with torch.device("meta"):
        model = make()
    if rename is not None:
        state = rename(state, model)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [name for name in (expected | given) if expected.get(name) != given.get(name)]
    if wrong:
        raise weights.error(f"{len(wrong)} tensors are missing, left over or of another shape, such as {', '.join(wrong[:3])}")
    model.load_state_dict(state, strict=True, assign=True)
    if isinstance(model, T5EncoderModel):
        model.tie_weights()
    return model


# --- tokenizers ---


def _assets() -> Any:
    return resources.files("byg_plugin.models") / "assets"


_SHIPPED_TOKENIZERS = {
    "clip": (
        "clip_tokenizer.json.gz",
        {"bos_token": "<|startoftext|>", **dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")},
    ),
    "t5": ("t5_tokenizer.json.gz", {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}),
}


def _tokenizer_folder(place: str | Path, part: str) -> Path | None:
    """The tokenizer's folder of a local place: in the root, beside or in the text encoder's. None: shipped one."""
    root = Path(place).expanduser()
    if not root.is_dir():
        return None
    inside = root / str(_SUBFOLDERS[part][1])
    return inside if inside.is_dir() else _beside(root, part)


def _beside(folder: Path, part: str) -> Path | None:
    beside = folder.parent / str(_SUBFOLDERS[part][1])
    if folder.name == _SUBFOLDERS[part][0] and beside.is_dir():
        return beside
    return folder if (folder / "tokenizer_config.json").is_file() else None


def _tokenizer(place: str | Path, part: str, length: int) -> PreTrainedTokenizerBase:
    """The place's own tokenizer, or the shipped one where a file or folder has none."""
    folder = _tokenizer_folder(place, part)
    if folder is not None:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    path = Path(place).expanduser()
    if not path.exists():
        return _hub(lambda: AutoTokenizer.from_pretrained(str(place), subfolder=str(_SUBFOLDERS[part][1])), place)
    name, special = _SHIPPED_TOKENIZERS[part]
    backend = Tokenizer.from_str(gzip.decompress((_assets() / "tokenizers" / name).read_bytes()).decode())
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, padding_side="right", **special)


def _fitting(tokenizer: PreTrainedTokenizerBase, vocabulary: int, place: str | Path) -> PreTrainedTokenizerBase:
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"{place}: the tokenizer has {len(tokenizer)} tokens, the text encoder knows {vocabulary}; "
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
        digest.update((_assets() / "tokenizers" / _SHIPPED_TOKENIZERS[part][0]).read_bytes())
        return
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model"):
            digest.update(path.name.encode() + path.read_bytes())
