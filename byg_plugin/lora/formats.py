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

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from byg_plugin import families
from byg_plugin.lora import files as lora_files
from byg_plugin.lora import flux_names, wan_names
from byg_plugin.lora.card import KEYS, LoraCard

# Reading and writing stay names of this module too: who converts needs all three.
from byg_plugin.lora.files import naming
from byg_plugin.lora.files import read_lora as read_lora
from byg_plugin.lora.files import write_lora as write_lora

Format = families.LoraFormat
FORMATS = families.LORA_FORMATS


@dataclass(frozen=True)
class Network:
    """The sizes that a family's authors publish.

    Attributes:
        name: for messages.
        blocks: how many there are, by the start of their layers' native names.
        shapes: (inputs, outputs) of the linears inside blocks, by the end of the native name.
    """

    name: str
    blocks: Mapping[str, int]
    shapes: Mapping[str, tuple[int, int]]

    def misfit(self, module: Module) -> str | None:
        """Why a file's layer is none of this network; None when it is, or lies outside the blocks."""
        native = module.linear.native
        start = next((start for start in self.blocks if native.startswith(start)), None)
        if start is None:
            return None
        if (block := int(native.split(".")[1])) >= self.blocks[start]:
            return f"{module.name} is in block {block}, and {self.name} has {self.blocks[start]} of these"
        inputs, outputs = next(shape for end, shape in self.shapes.items() if native.endswith(end))
        if module.part is not None:
            outputs = outputs // sum(module.linear.widths) * module.linear.widths[module.part]
        found = module.down.shape[1], module.up.shape[0]
        return None if found == (inputs, outputs) else f"{module.name} is {found[0]} -> {found[1]}, in {self.name} {inputs} -> {outputs}"


def _flux_network(double: int, single: int, width: int) -> Network:
    times = {
        "attn.qkv": (1, 3),
        "attn.proj": (1, 1),
        "mlp.0": (1, 4),
        "mlp.2": (4, 1),
        "mod.lin": (1, 6),
        "linear1": (1, 7),
        "linear2": (5, 1),
        "modulation.lin": (1, 3),
    }
    shapes = {end: (inputs * width, outputs * width) for end, (inputs, outputs) in times.items()}
    return Network("FLUX.1", {"double_blocks.": double, "single_blocks.": single}, shapes)


def _wan_network(name: str, blocks: int, width: int, inner: int) -> Network:
    attention = {f"attn.{end}": (width, width) for end in "qkvo"}
    return Network(name, {"blocks.": blocks}, attention | {"ffn.0": (width, inner), "ffn.2": (inner, width)})


@dataclass(frozen=True)
class Family:
    """What the formats need to know of a model family; a second family is a second entry of `FAMILIES`.

    Attributes:
        find_native: the fused layer with a native name, dotted or flattened with `_`; None for a foreign name.
        find_part: (fused layer, index of the part) of a diffusers name, likewise.
        blocks: name starts of the native layers inside blocks, the only ones musubi's networks cover.
        diffusers_width: rows of one unit of an unevenly split layer that diffusers' converter has written in.
        networks: the published ones.
        linears: every linear of the largest.
    """

    name: str
    find_native: Callable[[str], flux_names.Linear | None]
    find_part: Callable[[str], tuple[flux_names.Linear, int] | None]
    blocks: tuple[str, ...]
    diffusers_width: int
    networks: tuple[Network, ...]
    linears: Callable[[], Iterable[flux_names.Linear]]

    @property
    def is_wan(self) -> bool:
        return self.name == "wan"


_WAN = Family(
    "wan",
    wan_names.find_native,
    wan_names.find_part,
    ("blocks.",),
    0,
    (
        _wan_network("Wan 14B", 40, 5120, 13824),
        _wan_network("Wan 1.3B", 30, 1536, 8960),
        _wan_network("Wan 5B", 30, 3072, 14336),
    ),
    partial(wan_names.linears, 40),
)
_FLUX = Family(
    "flux",
    flux_names.find_native,
    flux_names.find_part,
    ("double_blocks.", "single_blocks."),
    3072,
    (_flux_network(19, 38, 3072),),
    partial(flux_names.linears, 19, 38, guidance=True),
)
FAMILIES = {"flux": _FLUX, **dict.fromkeys(families.WAN, _WAN)}
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
        strengths: (where alpha stands, alpha / rank, number of layers) of the layers.
        tools: one report for each tool asked about.
    """

    format: str
    modules: int
    strengths: tuple[tuple[str, float, int], ...]
    tools: tuple[ToolReport, ...]

    @property
    def loses(self) -> bool:
        return any(tool.lost for tool in self.tools)


# --- reading keys ---


def parse(tensors: Mapping[str, Tensor], family: str = "flux") -> tuple[list[Module], list[Lost]]:
    """The layers of a file, in its order, and what in it is no plain LoRA of this family.

    Raises:
        ValueError: an unknown family, no layer of this family at all, an alpha that is not one number, or a DoRA.
    """
    names = _family(family)
    groups: dict[str, dict[str, tuple[str, Tensor]]] = defaultdict(dict)
    lost = []
    dora = next((key for key in tensors if "dora_scale" in key or "lora_magnitude_vector" in key), None)
    if dora is not None:
        raise ValueError(f"{dora}: a DoRA, which also rescales the frozen weight and has no plain LoRA equivalent")
    for key, tensor in tensors.items():
        found = lora_files.role_of(key)
        if found is None:
            lost.append(Lost(key, "not a plain LoRA tensor (lora_A/lora_B, lora_down/lora_up or alpha)"))
            continue
        layer, role = found
        if role == "alpha":
            lora_files.alpha_value(key, tensor)  # also of what is no layer: diffusers' reader halves a negative one for ever
        groups[layer][role] = (key.removeprefix(layer), tensor)
    modules: list[Module] = []
    for name, roles in groups.items():
        module = _module(name, roles, names)
        if isinstance(module, Module):
            modules.append(module)
        else:
            lost.append(module)
    if not modules:
        example = next(iter(tensors), "none")
        raise ValueError(f"no LoRA of {family} in this file: none of its {len(tensors)} tensors fits, such as {example}")
    return modules, lost


def _module(name: str, roles: Mapping[str, tuple[str, Tensor]], family: Family) -> Module | Lost:
    if "down" not in roles or "up" not in roles:
        missing = " and ".join(role for role in ("down", "up") if role not in roles)
        return Lost(name, f"its {missing} matrix is missing")
    (suffix, down), (_, up) = roles["down"], roles["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        return Lost(name, f"matrices of shapes {tuple(down.shape)} and {tuple(up.shape)} do not multiply")
    alpha = lora_files.alpha_value(f"{name}.alpha", roles["alpha"][1]) if "alpha" in roles else None
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
        ValueError: no LoRA of the family, an unknown format, or something would be lost and `allow_loss` is false, or all of it.
    """
    layers, lost = _converted(tensors, to, family)
    if lost and not allow_loss:
        raise ValueError(
            f"{to} would lose {len(lost)} of {len(layers) + len(lost)} layers: "
            + "; ".join(f"{item.name} ({item.why})" for item in lost[:3])
            + ("; …" if len(lost) > 3 else "")
            + f". convert_lora.py FILE --to {to} --allow-loss --out NEW writes the LoRA without them"
        )
    if not layers:
        raise ValueError(f"{to} would load none of its {len(lost)} layers, such as {lost[0].name} ({lost[0].why})")
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


def read_named(path: str | Path, family: str, label: str = "") -> tuple[dict[str, Tensor], LoraCard]:
    """A LoRA of a family by our names (`<expert>.<layer>.lora_A.weight`), from one file or a pair; the card of the first.

    Every message names the file; `label` stands before its path.

    Raises:
        ValueError: see `read_lora`, `convert`, `expert_files` and `LoraCard.from_metadata`; it was trained for another family; or
            the files of a pair say that they are for each other's expert.
    """
    named: dict[str, Tensor] = {}
    cards: list[LoraCard] = []
    with naming(path, label):
        files = expert_files(path) if _family(family).is_wan else {"transformer": Path(path)}
    for expert, file in files.items():
        with naming(file, label):
            tensors, metadata = read_lora(file)
            card = LoraCard.from_metadata(metadata)
            if card.family not in (None, family):
                raise ValueError(f"{file} was trained for {card.family!r}, model.family is {family!r}")
            if card.expert in ("high_noise", "low_noise") and f"_{card.expert}" != EXPERT_SUFFIXES[expert]:
                raise ValueError(f"{file}: its metadata say that it is for the {card.expert.replace('_', '-')} expert; was it renamed?")
            for name, tensor in convert(tensors, "diffusers", family=family).items():
                named[expert + name.removeprefix("transformer")] = tensor
        cards.append(card)
    return named, cards[0]


def guess_family(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The family of a LoRA file: what its metadata say, or what its layers' names look like (any Wan has the same).

    Raises:
        ValueError: it does not say, and its layers have the names of a published network and another depth or width: those of
            FLUX.2 and Qwen-Image are called as FLUX.1's.
    """
    if (family := metadata.get(KEYS["family"])) is not None:
        return family
    wan = any(re.search(r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|attn1|attn2|ffn)[._]", name) for name in tensors)
    name = next(iter(families.WAN)) if wan else "flux"
    modules, _ = parse(tensors, name)
    misfits = [next(filter(None, map(network.misfit, modules)), None) for network in _family(name).networks]
    if all(misfits):
        raise ValueError(f"a LoRA of another model, whose layers are called like those of this one: {'; '.join(map(str, misfits))}")
    return name


# --- checking ---


def check(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    tools: Iterable[Format] = FORMATS,
    *,
    outside: lora_files.OutsideAlpha | None = None,
) -> Report:
    """What each tool would load of these tensors as they are named, without converting.

    diffusers' own loader is asked. The rules of the others were observed on ComfyUI 0.3.64 and 0.29, musubi-tuner 0.3.4.

    Args:
        tensors: as stored.
        metadata: of the header.
        tools: to answer for.
        outside: alphas that no tensor tells; default: the header's.

    Raises:
        ValueError: the metadata's family is unknown, there is no LoRA of it in the tensors, a header is damaged, or
            diffusers is asked about and not installed.
    """
    card = LoraCard.from_metadata(metadata)
    name = guess_family(tensors, metadata)
    family = _family(name)
    outside = lora_files.header_alpha(tensors, metadata) if outside is None else outside
    modules, foreign = parse(tensors, name)
    prefixes = Counter(module.prefix for module in modules)
    prefix = next(iter(prefixes)) if len(prefixes) == 1 else "several"
    known = {"transformer.": "diffusers", "diffusion_model.": "comfyui", "lora_unet_": "musubi", "several": "mixed"}
    reports = []
    for tool in tools:
        reasons = [_TOOLS[tool](module, modules, family) for module in modules]
        if tool == "diffusers":
            reasons = _asked_of_diffusers(modules, reasons, tensors, metadata, outside, family)
        loaded, lost = [], list(foreign)
        for module, why in zip(modules, reasons, strict=True):
            if why is None and tool != "diffusers" and outside.alphas.get(module.name, module.rank) != module.rank:
                why = f"its alpha is in {outside.where} only, which {tool} ignores, so the strength would be wrong"
            if why is None:
                loaded.append(module.name)
            else:
                lost.append(Lost(module.name, why))
        reports.append(ToolReport(tool, tuple(loaded), tuple(lost), runtime(tool, card)))
    strengths = Counter(_strength(module, outside) for module in modules)
    told = tuple((where, scale, count) for (where, scale), count in strengths.items())
    return Report(known.get(prefix, f"other:{prefix}"), len(modules), told, tuple(reports))


def _strength(module: Module, outside: lora_files.OutsideAlpha) -> tuple[str, float]:
    """(where its alpha stands, alpha / rank)."""
    if module.name in outside.alphas:
        return outside.where, outside.alphas[module.name] / module.rank
    return ("no alpha, which means the rank" if module.alpha is None else ".alpha"), module.scale


def _asked_of_diffusers(
    modules: Sequence[Module],
    known: Sequence[str | None],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    outside: lora_files.OutsideAlpha,
    family: Family,
) -> list[str | None]:
    """Of each module why diffusers would not load it as it was trained; where that is so, in the words of `known` if there are any."""
    from byg_plugin.lora import diffusers as lora_diffusers

    if lacking := lora_diffusers.missing():
        raise ValueError(f"what diffusers loads is asked of diffusers, and {lacking}; or name the other tools with --tools")
    shapes = {part: (1, 1) for linear in family.linears() for part in linear.parts}
    for module in modules:
        shapes |= {part: (module.down.shape[1], rows) for part, rows in _rows_of_parts(module).items()}
    try:
        applied = lora_diffusers.load(tensors, lora_files.header_config(metadata), shapes, wan=family.is_wan)
    except lora_diffusers.Refused as error:
        return [why or f"diffusers refuses the whole file: {error}" for why in known]
    rng = torch.Generator().manual_seed(0)
    answers: list[str | None] = []
    for module, why in zip(modules, known, strict=True):
        probe = torch.randn(module.down.shape[1], generator=rng)
        ours = _strength(module, outside)[1] * (module.up.float() @ (module.down.float() @ probe))
        pieces = (_swap_halves(ours) if module.linear.swap and module.part is None else ours).split(list(_rows_of_parts(module).values()))
        found = (_difference(piece, applied.get(part), probe) for part, piece in zip(_rows_of_parts(module), pieces, strict=True))
        answer = next(filter(None, found), None)
        answers.append((why or answer) if answer else None)
    return answers


def _rows_of_parts(module: Module) -> dict[str, int]:
    """Rows of `up` by diffusers' layer."""
    linear, rows = module.linear, module.up.shape[0]
    if module.part is not None:
        return {linear.parts[module.part]: rows}
    if rows % sum(linear.widths):
        raise ValueError(f"{module.name} has {rows} rows, which do not divide among {len(linear.parts)} layers")
    return {part: rows // sum(linear.widths) * width for part, width in zip(linear.parts, linear.widths, strict=True)}


_ROUNDING = 0.02  # of a probe: a factor is multiplied into 16 bit matrices


def _difference(ours: Tensor, applied: tuple[Tensor, Tensor, float] | None, probe: Tensor) -> str | None:
    """How what diffusers applies to one layer differs from what the file means, seen on one input vector."""
    if applied is None:
        return "diffusers loads nothing of it, without an error" if ours.any() else None
    up, down, scaling = applied
    if (up.shape[0], down.shape[1]) != (len(ours), len(probe)):
        return f"diffusers would make it {down.shape[1]} -> {up.shape[0]}"
    theirs = scaling * (up.float() @ (down.float() @ probe))
    if (theirs - ours).norm() <= _ROUNDING * ours.norm():
        return None
    times = float(theirs @ ours / (ours @ ours).clamp_min(1e-30))
    if (theirs - times * ours).norm() <= _ROUNDING * theirs.norm():
        return f"diffusers would apply it at {times:.3g} times the strength it was trained at"
    return "diffusers would apply other values"


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


def runtime(tool: Format, card: LoraCard) -> str:
    """One sentence: whether a tool runs edits with this LoRA as it ships, by the position it was trained with."""
    position = card.position
    if position is None:
        return "unknown: the file does not say how it was conditioned (no byg.position)"
    if card.family in families.WAN:
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
