"""LoRA files in the key formats of diffusers, ComfyUI and musubi-tuner: reading, converting, and what each would load.

| format | a key | layers |
|---|---|---|
| `diffusers` (ours) | `transformer.<diffusers layer>.lora_A.weight` | diffusers' |
| `comfyui` | `diffusion_model.<native layer>.lora_down.weight` + `.alpha` | native, fused |
| `musubi` (kohya) | `lora_unet_<native layer with _ for dots>.lora_down.weight` + `.alpha` | native, fused |

Of Wan, whose layers are not fused, `comfyui` is ours: `diffusion_model.<native layer>.lora_A.weight` without alpha, which
ComfyUI and diffusers both read, whatever layers there are. Its two experts are two files, `<name>_high_noise` and
`<name>_low_noise`, with the same keys; in memory the second one's are `transformer_2.…`.

A LoRA adds `alpha / rank * up @ down` to a weight; without `.alpha`, alpha is the rank. Where native layers fuse
what diffusers keeps apart, the conversion is exact: different `down` matrices are stacked (rank 3r or 4r) and the `up`
matrices become the diagonal blocks; the way back leaves the zero blocks out again.

Pure functions on dictionaries of tensors; imports no host.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from byg_plugin import families
from byg_plugin.models import flux_names, wan_names

Format = families.LoraFormat
FORMATS = families.LORA_FORMATS


@dataclass(frozen=True)
class Family:
    """What the formats need to know of a model family; a second family is a second entry of `FAMILIES`.

    Attributes:
        find_native: the fused layer with a native name, dotted or flattened with `_`; None for a foreign name.
        find_part: (fused layer, index of the part) of a diffusers name, likewise.
        blocks: name starts of the native layers inside blocks, the only ones musubi's networks cover.
        diffusers_width: rows of one unit of an unevenly split layer that diffusers' converter has written in.
    """

    name: str
    find_native: Callable[[str], flux_names.Linear | None]
    find_part: Callable[[str], tuple[flux_names.Linear, int] | None]
    blocks: tuple[str, ...]
    diffusers_width: int

    @property
    def is_wan(self) -> bool:
        return self.name == "wan"


_WAN = Family("wan", wan_names.find_native, wan_names.find_part, ("blocks.",), 0)
FAMILIES = {
    "flux": Family("flux", flux_names.find_native, flux_names.find_part, ("double_blocks.", "single_blocks."), 3072),
    **dict.fromkeys(families.WAN, _WAN),
}
EXPERT_SUFFIXES = families.EXPERT_SUFFIXES

# Naming of the keys: prefix -> whose layer names follow. The order matters: the first that fits is taken.
_PREFIXES = (
    ("lora_unet__", "native"),  # Wan-Fun's tools
    ("lora_unet_", "native"),
    ("lora_transformer_", "parts"),
    ("lycoris_", "parts"),
    ("diffusion_model.", "native"),
    ("base_model.model.", "parts"),
    ("transformer_2.", "parts"),
    ("transformer.", "parts"),
    ("", "parts"),
)
_EITHER = ("base_model.model.", "")  # Wan's native names are written under these too
# suffix -> role. A `down` is (rank, inputs), an `up` is (outputs, rank).
_SUFFIXES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".alpha": "alpha",
}


@dataclass(frozen=True)
class Module:
    """One adapted layer of a file.

    Attributes:
        name: the key without its suffix, as it stands in the file.
        prefix: the naming's prefix, a key of `_PREFIXES`.
        suffix: of the `down` tensor.
        linear: the fused native layer, or the one this layer is a part of.
        part: index among `linear.parts`; None when the file has the native layer.
        down: (rank, inputs).
        up: (outputs, rank).
        alpha: None where the file has none, which means the rank.
    """

    name: str
    prefix: str
    suffix: str
    linear: flux_names.Linear
    part: int | None
    down: Tensor
    up: Tensor
    alpha: float | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclass(frozen=True)
class Lost:
    """A layer, or a tensor that belongs to no layer, that a tool would not load, or not as it was trained."""

    name: str
    why: str


@dataclass(frozen=True)
class ToolReport:
    """What one tool would do with a file.

    Attributes:
        tool: `diffusers`, `comfyui` or `musubi`.
        loaded: names of the layers it would load, as they stand in the file.
        lost: what it would drop, or load with another strength.
        runtime: whether edits then run in the stock tool.
    """

    tool: Format
    loaded: tuple[str, ...]
    lost: tuple[Lost, ...]
    runtime: str


@dataclass(frozen=True)
class Report:
    """`check`'s answer.

    Attributes:
        format: as `detect_format`.
        modules: number of layers the file adapts.
        tools: one report for each tool asked about.
    """

    format: str
    modules: int
    tools: tuple[ToolReport, ...]

    @property
    def loses(self) -> bool:
        return any(tool.lost for tool in self.tools)


# --- files ---


def read_lora(path: str | Path, *, as_stored: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header metadata of a LoRA file.

    An alpha that only the header tells (diffusers' `lora_adapter_metadata`) is put beside its layers as `.alpha` and leaves
    the metadata, so that no later step can forget it; `as_stored` reads the file as it is.

    Raises:
        ValueError: no such file, not a readable .safetensors file, a file without tensors, or a header with alphas by layer.
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
        raise ValueError(f"{path}: not a readable .safetensors file ({error})") from error
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    if as_stored:
        return tensors, metadata
    try:
        tensors = _with_header_alpha(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tensors, {key: value for key, value in metadata.items() if key != "lora_adapter_metadata"}


def _with_header_alpha(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """`.alpha` beside each PEFT layer. ComfyUI and musubi-tuner never read that header, diffusers only from files."""
    scale = _header_scale(metadata)
    if scale == 1.0:
        return dict(tensors)
    out = dict(tensors)
    for key, tensor in tensors.items():
        layer = key.removesuffix(".lora_A.weight")
        if layer != key and f"{layer}.alpha" not in tensors:
            out[f"{layer}.alpha"] = torch.tensor(scale * tensor.shape[0])
    return out


def _header_scale(metadata: Mapping[str, str]) -> float:
    """alpha / rank of PEFT's configuration in a header; 1 without one."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        rank = config.get("transformer.r", 1)
        alpha = config.get("transformer.lora_alpha", rank)
        patterns = config.get("transformer.alpha_pattern") or config.get("transformer.rank_pattern")
        scale = float(alpha) / float(rank)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"metadata key lora_adapter_metadata is damaged ({error}); remove it or save the LoRA again") from error
    if patterns and config.get("transformer.alpha_pattern") != config.get("transformer.rank_pattern"):
        raise ValueError(f"metadata key lora_adapter_metadata gives layers their own alpha ({patterns}); save with alpha == rank")
    return scale


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
        beside.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata=dict(metadata)))
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written ({error})") from error
    finally:
        beside.unlink(missing_ok=True)


# --- reading keys ---


def parse(tensors: Mapping[str, Tensor], family: str = "flux") -> tuple[list[Module], list[Lost]]:
    """The layers of a file, in its order, and what in it is no plain LoRA of this family.

    Raises:
        ValueError: an unknown family, no layer of this family at all, or a DoRA.
    """
    names = _family(family)
    groups: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)
    lost = []
    dora = next((key for key in tensors if "dora_scale" in key or "lora_magnitude_vector" in key), None)
    if dora is not None:
        raise ValueError(f"{dora}: a DoRA, which also rescales the frozen weight and has no plain LoRA equivalent")
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        if suffix is None:
            lost.append(Lost(key, "not a plain LoRA tensor (lora_A/lora_B, lora_down/lora_up or alpha)"))
        else:
            groups[key.removesuffix(suffix)][_SUFFIXES[suffix]] = (suffix, tensor)
    modules: list[Module] = []
    for name, roles in groups.items():
        found = _module(name, roles, names)
        if isinstance(found, Module):
            modules.append(found)
        else:
            lost.append(found)
    if not modules:
        example = next(iter(tensors), "none")
        raise ValueError(f"no LoRA of {family} in this file: none of its {len(tensors)} tensors fits, such as {example}")
    return modules, lost


def _module(name: str, roles: Mapping[str, tuple[str, Tensor]], family: Family) -> Module | Lost:
    if "down" not in roles or "up" not in roles:
        missing = " and ".join(role for role in ("down", "up") if role not in roles)
        return Lost(name, f"its {missing} matrix is missing")
    (suffix, down), (_, up) = roles["down"], roles["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
        return Lost(name, f"matrices of shapes {tuple(down.shape)} and {tuple(up.shape)} do not multiply")
    alpha = roles["alpha"][1].item() if "alpha" in roles else None
    for prefix, layers in _PREFIXES:
        if not name.startswith(prefix):
            continue
        bare = name[len(prefix) :]
        if layers == "native" and (linear := family.find_native(bare)) is not None:
            return Module(name, prefix, suffix, linear, None, down, up, alpha)
        if layers == "parts" and (found := family.find_part(bare)) is not None:
            return Module(name, prefix, suffix, *found, down, up, alpha)
        if family.is_wan and prefix in _EITHER and (linear := family.find_native(bare)) is not None:
            return Module(name, prefix, suffix, linear, None, down, up, alpha)
        return Lost(name, f"no layer of {family.name} has this name")
    raise AssertionError("the empty prefix fits every name")


def detect_format(tensors: Mapping[str, Tensor], family: str = "flux") -> str:
    """`diffusers`, `comfyui`, `musubi`, or `other:<prefix>` for a naming that is only read.

    Raises:
        ValueError: no layer of this family, or several namings in one file.
    """
    modules, _ = parse(tensors, family)
    prefixes = Counter(module.prefix for module in modules)
    if len(prefixes) > 1:
        raise ValueError(f"several namings in one file: {', '.join(repr(prefix) for prefix in prefixes)}; split it first")
    prefix = modules[0].prefix
    known = {"transformer.": "diffusers", "diffusion_model.": "comfyui", "lora_unet_": "musubi"}
    return known.get(prefix, f"other:{prefix}")


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"LoRA of the unknown family {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


# --- converting ---


def convert(tensors: Mapping[str, Tensor], to: Format, *, family: str = "flux", allow_loss: bool = False) -> dict[str, Tensor]:
    """The same LoRA in another format.

    Values change only where they must: `diffusers` has alpha == rank, so another scale is multiplied into `up` (kept in
    float32 where the file's dtype cannot hold the product).

    Args:
        tensors: a file's tensors in any naming that `parse` reads.
        to: the format to write.
        family: the model family of the LoRA.
        allow_loss: leave out what `to`'s tool would not load (see `losses`) instead of refusing.

    Raises:
        ValueError: no LoRA of the family, an unknown format, or something would be lost and `allow_loss` is false.
    """
    layers, lost = _converted(tensors, to, family)
    if lost and not allow_loss:
        raise ValueError(
            f"{to} would lose {len(lost)} of {len(layers) + len(lost)} layers: "
            + "; ".join(f"{item.name} ({item.why})" for item in lost[:3])
            + ("; …" if len(lost) > 3 else "")
            + ". Allow the loss (--allow-loss) or train without these layers"
        )
    peft = to == "diffusers" or (to == "comfyui" and _family(family).is_wan)
    return {key: tensor for layer in layers for key, tensor in _write(layer, to, peft).items()}


def losses(tensors: Mapping[str, Tensor], to: Format, *, family: str = "flux") -> list[Lost]:
    """What `convert` with `allow_loss` leaves out.

    Raises:
        ValueError: no LoRA of the family, or an unknown format.
    """
    return _converted(tensors, to, family)[1]


def _converted(tensors: Mapping[str, Tensor], to: Format, family: str) -> tuple[list[Module], list[Lost]]:
    """Layers under the bare names of the format, and what is lost."""
    if to not in FORMATS:
        raise ValueError(f"unknown LoRA format {to!r}; one of {', '.join(FORMATS)}")
    modules, lost = parse(tensors, family)
    _refuse_doubles(modules)
    layers = _to_parts(modules) if to == "diffusers" else _to_native(modules)
    converted = []
    for layer in layers:
        why = _unloadable(layer, to, _family(family))
        if why is None:
            converted.append(layer)
        else:
            lost.append(Lost(layer.name, why))
    return converted, lost


def _refuse_doubles(modules: Iterable[Module]) -> None:
    """Two entries for one layer (two namings in one file) would silently overwrite each other."""
    seen: dict[str, str] = {}
    for module in modules:
        parts = module.linear.parts if module.part is None else (module.linear.parts[module.part],)
        for part in parts:
            if part in seen:
                raise ValueError(f"{module.name} and {seen[part]} are the same layer; split the file first")
            seen[part] = module.name


def _write(layer: Module, to: Format, peft: bool) -> dict[str, Tensor]:
    """The keys of one layer; `peft`: A and B with the scale multiplied in, else down, up and alpha."""
    prefix = {"diffusers": "transformer.", "comfyui": "diffusion_model.", "musubi": "lora_unet_"}[to]
    name = prefix + (layer.name.replace(".", "_") if to == "musubi" else layer.name)
    if peft:
        return {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": _scaled(layer.up, layer.scale)}
    alpha = torch.tensor(float(layer.rank if layer.alpha is None else layer.alpha))
    return {f"{name}.lora_down.weight": layer.down, f"{name}.lora_up.weight": layer.up, f"{name}.alpha": alpha}


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """`tensor * scale`, in the tensor's dtype where that holds it exactly, else in float32."""
    if scale == 1.0:
        return tensor
    product = tensor.float() * scale
    same = product.to(tensor.dtype)
    return same if torch.equal(same.float(), product) else product


def _to_native(modules: Iterable[Module]) -> list[Module]:
    """One module a native layer, named by it."""
    groups: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        groups[module.linear.native].append(module)
    return [_native(native, group) for native, group in groups.items()]


def _native(native: str, group: list[Module]) -> Module:
    first = group[0]
    linear = first.linear
    if first.part is None:
        return Module(native, "", "", linear, None, first.down, first.up, first.alpha)
    if len(linear.parts) == 1:
        up = _swap_halves(first.up) if linear.swap else first.up
        return Module(native, "", "", linear, None, first.down, up, first.alpha)
    return _fused(native, linear, {module.part: module for module in group if module.part is not None})


def _fused(native: str, linear: flux_names.Linear, parts: Mapping[int, Module]) -> Module:
    """The parts' updates stacked on the rows of the native layer; parts without LoRA get zero rows."""
    present = list(parts.values())
    units = {module.up.shape[0] / linear.widths[index] for index, module in parts.items()}
    if len(units) != 1 or not next(iter(units)).is_integer():
        sizes = {linear.parts[index]: module.up.shape[0] for index, module in parts.items()}
        raise ValueError(f"the layers of {native} have rows that do not fit together: {sizes}")
    unit = int(units.pop())
    one = present[0]
    shared = all(torch.equal(module.down, one.down) and module.scale == one.scale for module in present)
    down = one.down if shared else torch.cat([module.down for module in present])
    dtype = one.up.dtype
    ups = {index: module.up if shared else _scaled(module.up, module.scale) for index, module in parts.items()}
    for up in ups.values():
        dtype = torch.promote_types(dtype, up.dtype)
    fused = torch.zeros(unit * sum(linear.widths), down.shape[0], dtype=dtype)
    column = 0
    for index, module in parts.items():
        row = unit * sum(linear.widths[:index])
        start = 0 if shared else column
        fused[row : row + module.up.shape[0], start : start + module.rank] = ups[index].to(dtype)
        column += module.rank
    return Module(native, "", "", linear, None, down, fused, one.alpha if shared else None)


def _to_parts(modules: Iterable[Module]) -> list[Module]:
    """One module a diffusers layer, named by it."""
    out = []
    for module in modules:
        linear = module.linear
        if module.part is not None:
            name = linear.parts[module.part]
            out.append(Module(name, "", "", linear, module.part, module.down, module.up, module.alpha))
        elif len(linear.parts) == 1:
            up = _swap_halves(module.up) if linear.swap else module.up
            out.append(Module(linear.parts[0], "", "", linear, 0, module.down, up, module.alpha))
        else:
            out.extend(_split(module))
    return out


def _split(module: Module) -> list[Module]:
    """The parts of a fused module. Columns of `up` that are zero in a part add nothing to it and are left out.

    A part without any is left out whole, unless the module is zero everywhere (a fresh LoRA).
    """
    linear = module.linear
    unit, remainder = divmod(module.up.shape[0], sum(linear.widths))
    if remainder:
        raise ValueError(f"{module.name} has {module.up.shape[0]} rows, which do not divide among {len(linear.parts)} layers")
    scaled = _scaled(module.up, module.scale)
    fresh = not bool(scaled.any())
    out = []
    pieces = scaled.split([width * unit for width in linear.widths])
    for index, (name, up) in enumerate(zip(linear.parts, pieces, strict=True)):
        used = torch.ones(module.rank, dtype=torch.bool) if fresh else up.ne(0).any(dim=0)
        # A rank component that happens to be zero in every part belongs to all of them.
        used |= scaled.eq(0).all(dim=0) & bool(used.any())
        if used.any():
            out.append(Module(name, "", "", linear, index, module.down[used].clone(), up[:, used].clone(), None))
    return out


def _swap_halves(rows: Tensor) -> Tensor:
    """Native modulation is (shift, scale), diffusers' is (scale, shift)."""
    first, second = rows.chunk(2)
    return torch.cat([second, first])


# --- two experts ---


def split_experts(tensors: Mapping[str, Tensor], family: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by our names (`<expert>.<layer>…`) of a Wan -> those of its LoRA files by what follows the files' stem.

    A network with one LoRA, or one LoRA shared by both experts, is one file: the suffix is empty.
    """
    by_expert: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        expert, _, layer = name.partition(".")
        by_expert[expert][f"transformer.{layer}"] = tensor
    files = {expert: convert(some, "comfyui", family=family) for expert, some in by_expert.items()}
    return {EXPERT_SUFFIXES[expert] if len(files) > 1 else "": some for expert, some in files.items()}


def expert_files(path: str | Path) -> dict[str, Path]:
    """The LoRA files that a path means, by the expert they are for.

    Either file of a pair, or their common name without `_high_noise`, means both. Any other file is one LoRA.

    Raises:
        ValueError: half of a pair is missing.
    """
    path = Path(path).expanduser()
    stem = path.stem
    for suffix in EXPERT_SUFFIXES.values():
        stem = stem.removesuffix(suffix)
    pair = {expert: path.with_name(f"{stem}{suffix}.safetensors") for expert, suffix in EXPERT_SUFFIXES.items()}
    there = {expert: file for expert, file in pair.items() if file.is_file()}
    if path.is_file() and path not in pair.values():
        return {"transformer": path}
    if len(there) == 1:
        missing = next(file for expert, file in pair.items() if expert not in there)
        raise ValueError(f"{path}: of two experts, and {missing.name} is not beside it; both are needed")
    return there or {"transformer": path}


def read_named(path: str | Path, family: str, label: str = "") -> tuple[dict[str, Tensor], dict[str, str]]:
    """A LoRA of a family by our names (`<expert>.<layer>.lora_A.weight`), from one file or a pair; metadata of the first.

    `label` stands before the path in the message that it was trained for another family.

    Raises:
        ValueError: see `read_lora`, `convert` and `expert_files`; it was trained for another family; or the files of a pair say
            that they are for each other's expert.
    """
    wan = _family(family).is_wan
    named: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for expert, file in (expert_files(path) if wan else {"transformer": Path(path)}).items():
        tensors, metadata = read_lora(file)
        if (trained := metadata.get("byg.family", family)) != family:
            raise ValueError(f"{label}{file} was trained for {trained!r}, model.family is {family!r}")
        said = metadata.get("byg.expert")
        if said in ("high_noise", "low_noise") and f"_{said}" != EXPERT_SUFFIXES[expert]:
            raise ValueError(f"{file}: its metadata say that it is for the {said.replace('_', '-')} expert; was it renamed?")
        for name, tensor in convert(tensors, "diffusers", family=family).items():
            named[expert + name.removeprefix("transformer")] = tensor
        first = first or metadata
    return named, first


def guess_family(tensors: Iterable[str], metadata: Mapping[str, str]) -> str:
    """The family of a LoRA file: what its metadata say, or what its layers' names look like (any Wan has the same)."""
    if "byg.family" in metadata:
        return metadata["byg.family"]
    wan = any(re.search(r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|attn1|attn2|ffn)[._]", name) for name in tensors)
    return next(iter(families.WAN)) if wan else "flux"


# --- checking ---


def check(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    tools: Iterable[Format] = FORMATS,
) -> Report:
    """What each tool would load of these tensors as they are named, without converting.

    The rules were observed on diffusers 0.42, ComfyUI 0.3.64 and 0.29, musubi-tuner 0.3.4.

    Raises:
        ValueError: the metadata's `byg.family` is unknown, or there is no LoRA of it in the tensors.
    """
    name = guess_family(tensors, metadata)
    family = _family(name)
    modules, foreign = parse(tensors, name)
    prefixes = Counter(module.prefix for module in modules)
    prefix = next(iter(prefixes)) if len(prefixes) == 1 else "several"
    known = {"transformer.": "diffusers", "diffusion_model.": "comfyui", "lora_unet_": "musubi", "several": "mixed"}
    header_scale = _header_scale(metadata)
    reports = []
    for tool in tools:
        loaded, lost = [], list(foreign)
        for module in modules:
            why = _TOOLS[tool](module, modules, family)
            if why is None and tool != "diffusers" and module.alpha is None and header_scale != 1.0:
                why = f"its alpha is in the header only, which {tool} ignores, so the strength would be wrong"
            if why is None:
                loaded.append(module.name)
            else:
                lost.append(Lost(module.name, why))
        reports.append(ToolReport(tool, tuple(loaded), tuple(lost), runtime(tool, metadata)))
    return Report(known.get(prefix, f"other:{prefix}"), len(modules), tuple(reports))


def _in_diffusers(module: Module, modules: Sequence[Module], family: Family) -> str | None:
    """Why diffusers would not load this module as it stands; None when it would."""
    if family.is_wan:
        return _wan_in_diffusers(module, modules, family)
    kohya = any(other.suffix == ".lora_down.weight" for other in modules)  # one such key switches the whole file's reader
    if module.prefix == "transformer.":
        if not kohya:
            return None if module.suffix == ".lora_A.weight" else f"diffusers does not read the suffix {module.suffix}"
        return None if module.scale == 1.0 else "diffusers ignores alpha in this naming, so the strength would be wrong"
    if module.prefix not in ("lora_unet_", "diffusion_model."):
        return "diffusers loads nothing under this naming, without an error"
    if module.suffix != ".lora_down.weight":
        return "diffusers reads native names only as lora_down/lora_up, and loads nothing of this without an error"
    return _in_diffusers_native(module, family)


def _wan_in_diffusers(module: Module, modules: Sequence[Module], family: Family) -> str | None:
    inside = module.linear.native.startswith(family.blocks)
    if module.prefix == "transformer.":
        if module.suffix != ".lora_A.weight":
            return f"diffusers does not read the suffix {module.suffix}"
        return None if all(other.alpha is None for other in modules) else "diffusers refuses a file with alpha in this naming"
    if module.prefix == "diffusion_model.":
        if module.suffix not in (".lora_A.weight", ".lora_down.weight"):
            return f"diffusers does not read the suffix {module.suffix}"
        return None if inside or module.alpha is None else "diffusers' converter has no alpha outside the blocks"
    if module.prefix == "lora_unet_":
        if not inside:
            return "diffusers' converter knows no layers outside the blocks in this naming"
        return None if _every_wan_layer(modules) else "diffusers fails on this naming unless every layer of every block is there with alpha"
    if module.prefix == "transformer_2.":
        return "diffusers loads nothing under transformer_2., without an error: convert it, and load with load_into_transformer_2=True"
    return "diffusers loads nothing under this naming, without an error"


def _every_wan_layer(modules: Sequence[Module]) -> bool:
    named = [module for module in modules if module.prefix == "lora_unet_" and module.linear.native.startswith("blocks.")]
    blocks = 1 + max((int(module.linear.native.split(".")[1]) for module in named), default=-1)
    with_alpha = {module.linear.native for module in named if module.alpha is not None}
    return {linear.at(block).native for block in range(blocks) for linear in wan_names.BLOCK} <= with_alpha


def _in_diffusers_native(module: Module, family: Family) -> str | None:
    linear = module.linear
    if not linear.native.startswith(family.blocks):
        return "diffusers' converter drops native layers outside the blocks"
    even = len(set(linear.widths)) == 1
    if not even and module.up.shape[0] != family.diffusers_width * sum(linear.widths):
        return f"diffusers' converter only splits it at the full width {family.diffusers_width}"
    return None


def _in_comfyui(module: Module, modules: Sequence[Module], family: Family) -> str | None:
    if family.is_wan and module.part is not None:
        return "ComfyUI has no diffusers names for Wan: convert with --to comfyui"
    if module.prefix in ("", "base_model.model."):
        return "ComfyUI's key map has no such names (the bare ones only in releases of 2026)"
    return None


def _in_musubi(module: Module, modules: Sequence[Module], family: Family) -> str | None:
    if module.prefix != "lora_unet_" or module.suffix != ".lora_down.weight":
        return "musubi-tuner reads lora_unet_….lora_down/lora_up only: convert with --to musubi"
    if not module.linear.native.startswith(family.blocks):
        return "musubi-tuner's network covers the blocks only"
    return None


_TOOLS: dict[Format, Callable[[Module, Sequence[Module], Family], str | None]] = {
    "diffusers": _in_diffusers,
    "comfyui": _in_comfyui,
    "musubi": _in_musubi,
}


def _unloadable(layer: Module, to: Format, family: Family) -> str | None:
    """Why the tool of the format would drop a converted layer (named by its bare native or diffusers name)."""
    if to == "musubi" and not layer.linear.native.startswith(family.blocks):
        return "musubi-tuner's network covers the blocks only"
    return None


_WAN_RUNTIME = {
    ("same", "diffusers"): "needs a patch: WanPipeline has no source tokens (byg_plugin.EditPipeline runs it)",
    ("same", "comfyui"): "needs a node: stock in-context latents are turned (train with conditioning.position = 'bernini')",
    ("same", "musubi"): "needs a patch: the Wan script has no source tokens",
    ("bernini", "diffusers"): "needs a patch: WanPipeline has no source tokens (byg_plugin.EditPipeline runs it)",
    ("bernini", "comfyui"): "runs stock: BerniniConditioning (releases after 0.24)",
    ("bernini", "musubi"): "needs a patch: the Wan script has no source tokens",
}


def runtime(tool: Format, metadata: Mapping[str, str]) -> str:
    """One sentence: whether a tool runs edits with this LoRA as it ships, by the `byg.position` it was trained with."""
    position = metadata.get("byg.position")
    if position is None:
        return "unknown: the file does not say how it was conditioned (no byg.position)"
    if metadata.get("byg.family") in families.WAN:
        return _WAN_RUNTIME.get((position, tool), f"unknown: byg.position is {position!r}")
    stock = {
        "diffusers": "runs stock: FluxKontextPipeline",
        "comfyui": "runs stock: ReferenceLatent",
        "musubi": "runs stock: the FLUX Kontext script",
    }
    if position == "kontext":
        return stock[tool]
    needs = {
        "diffusers": "needs a patch: FluxKontextPipeline gives the source position 1 (byg_plugin.EditPipeline runs it)",
        "comfyui": "needs a node: ReferenceLatent gives the source other positions (set its first id to 0)",
        "musubi": "needs a patch: the FLUX Kontext script gives the source position 1",
    }
    return needs[tool] if position == "same" else f"unknown: byg.position is {position!r}"
