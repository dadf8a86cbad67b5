"""LoRA files in the key formats of diffusers, ComfyUI and musubi-tuner: reading and converting.

| format | a key | layers |
|---|---|---|
| `diffusers` (ours) | `transformer.<diffusers layer>.lora_A.weight` | diffusers' |
| `comfyui` | `diffusion_model.<native layer>.lora_down.weight` + `.alpha` | native, fused |
| `musubi` (kohya) | `lora_unet_<native layer with _ for dots>.lora_down.weight` + `.alpha` | native, fused |

Two experts are two files, `<name>_high_noise` and `<name>_low_noise`, with the same keys; in memory the second one's are
`transformer_2.…`. What a family has of its own is in its `layout.Layout`.

A LoRA adds `alpha / rank * up @ down` to a weight; without `.alpha`, alpha is the rank. Where native layers fuse
what diffusers keeps apart, the conversion is exact: different `down` matrices are stacked (rank 3r or 4r) and the `up`
matrices become the diagonal blocks; the way back leaves the zero blocks out again.

Pure functions on dictionaries of tensors; imports no host.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from byg_plugin import families
from byg_plugin.families import EXPERT_SUFFIXES
from byg_plugin.lora import files as lora_files
from byg_plugin.lora.card import KEYS, LoraCard
from byg_plugin.lora.layout import Layout, Linear, Module
from byg_plugin.lora.layouts import DEFAULT_FAMILY, families_of_names, layout_of

Format = families.LoraFormat
FORMATS = families.LORA_FORMATS
PREFIXES: dict[Format, str] = {"diffusers": "transformer.", "comfyui": "diffusion_model.", "musubi": "lora_unet_"}
"""What the keys of a format start with."""

# How keys start -> whose layer names follow. The order matters: the first that fits is taken.
_NAMINGS = (
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


@dataclass(frozen=True)
class Lost:
    """A layer, or a tensor that belongs to no layer, that a tool would not load, or not as it was trained."""

    name: str
    why: str


# --- reading keys ---


def parse(tensors: Mapping[str, Tensor], family: str = DEFAULT_FAMILY) -> tuple[list[Module], list[Lost]]:
    """The layers of a file, in its order, and what in it is no plain LoRA of this family.

    Raises:
        ValueError: an unknown family, no layer of this family at all, an alpha that is not one number, or a DoRA.
    """
    layout = layout_of(family)
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
        module = _module(name, roles, layout)
        if isinstance(module, Module):
            modules.append(module)
        else:
            lost.append(module)
    if not modules:
        example = next(iter(tensors), "none")
        raise ValueError(f"no LoRA of {family} in this file: none of its {len(tensors)} tensors fits, such as {example}")
    return modules, lost


def _module(name: str, roles: Mapping[str, tuple[str, Tensor]], layout: Layout) -> Module | Lost:
    if "down" not in roles or "up" not in roles:
        missing = " and ".join(role for role in ("down", "up") if role not in roles)
        return Lost(name, f"its {missing} matrix is missing")
    (suffix, down), (_, up) = roles["down"], roles["up"]
    if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        return Lost(name, f"matrices of shapes {tuple(down.shape)} and {tuple(up.shape)} do not multiply")
    alpha = lora_files.alpha_value(f"{name}.alpha", roles["alpha"][1]) if "alpha" in roles else None
    for prefix, names in _NAMINGS:
        if not name.startswith(prefix):
            continue
        bare = name[len(prefix) :]
        if (names == "parts" or prefix in layout.part_prefixes) and (found := layout.find_part(bare)) is not None:
            return Module(name, prefix, suffix, *found, down, up, alpha)
        if (names == "native" or prefix in layout.native_prefixes) and (linear := layout.find_native(bare)) is not None:
            return Module(name, prefix, suffix, linear, None, down, up, alpha)
        return Lost(name, f"no layer of {layout.name} has this name")
    raise AssertionError("the empty prefix fits every name")


def detect_format(tensors: Mapping[str, Tensor], family: str = DEFAULT_FAMILY) -> str:
    """`diffusers`, `comfyui`, `musubi`, or `other:<prefix>` for a naming that is only read.

    Raises:
        ValueError: no layer of this family, or several namings in one file.
    """
    modules, _ = parse(tensors, family)
    prefixes = dict.fromkeys(module.prefix for module in modules)
    if len(prefixes) > 1:
        raise ValueError(f"several namings in one file: {', '.join(repr(prefix) for prefix in prefixes)}; split it first")
    return format_of(modules[0].prefix)


def format_of(prefix: str) -> str:
    """The format whose keys start so, or `other:<prefix>`."""
    return next((name for name, own in PREFIXES.items() if own == prefix), f"other:{prefix}")


# --- converting ---


def convert(tensors: Mapping[str, Tensor], to: Format, *, family: str = DEFAULT_FAMILY, allow_loss: bool = False) -> dict[str, Tensor]:
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
    peft = to in layout_of(family).peft
    return {key: tensor for layer in layers for key, tensor in _write(layer, to, peft).items()}


def losses(tensors: Mapping[str, Tensor], to: Format, *, family: str = DEFAULT_FAMILY) -> list[Lost]:
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
    in_parts = to == "diffusers" or (to == "musubi" and PREFIXES[to] in layout_of(family).part_prefixes)
    layers = _to_parts(modules) if in_parts else _to_native(modules)
    converted = []
    for layer in layers:
        why = outside_network(layer, to, layout_of(family))
        if why is None:
            converted.append(layer)
        else:
            lost.append(Lost(layer.name, why))
    return converted, lost


def _refuse_doubles(modules: Iterable[Module]) -> None:
    """Two entries for one layer (two namings in one file) would silently overwrite each other."""
    seen: dict[str, str] = {}
    for module in modules:
        for part in module.parts:
            if part in seen:
                raise ValueError(f"{module.name} and {seen[part]} are the same layer; split the file first")
            seen[part] = module.name


def outside_network(layer: Module, to: Format, layout: Layout) -> str | None:
    """Why the tool of the format has no such layer, however it is named."""
    if to == "musubi" and not layer.linear.native.startswith(layout.blocks):
        return "musubi-tuner's network covers the blocks only"
    return None


def _write(layer: Module, to: Format, peft: bool) -> dict[str, Tensor]:
    """The keys of one layer; `peft`: A and B with the scale multiplied in, else down, up and alpha."""
    name = PREFIXES[to] + (layer.name.replace(".", "_") if to == "musubi" else layer.name)
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
        up = _swapped(native, first.up) if linear.swap else first.up
        return Module(native, "", "", linear, None, first.down, up, first.alpha)
    return _fused(native, linear, {module.part: module for module in group if module.part is not None})


def _fused(native: str, linear: Linear, parts: Mapping[int, Module]) -> Module:
    """The parts' updates stacked on the rows of the native layer; parts without LoRA get zero rows."""
    present = list(parts.values())
    units = {module.up.shape[0] / linear.widths[index] for index, module in parts.items()}
    if len(units) != 1 or not next(iter(units)).is_integer():
        sizes = {linear.parts[index]: module.up.shape[0] for index, module in parts.items()}
        raise ValueError(f"the layers of {native} have rows that do not fit together: {sizes}")
    inputs = {linear.parts[index]: module.down.shape[1] for index, module in parts.items()}
    if len(set(inputs.values())) != 1:
        raise ValueError(f"the layers of {native} have inputs that do not fit together: {inputs}")
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
            up = _swapped(linear.native, module.up) if linear.swap else module.up
            out.append(Module(linear.parts[0], "", "", linear, 0, module.down, up, module.alpha))
        else:
            out.extend(_split(module))
    return out


def _split(module: Module) -> list[Module]:
    """The parts of a fused module. Columns of `up` that are zero in a part add nothing to it and are left out.

    A part without any is left out whole, unless the module is zero everywhere (a fresh LoRA).
    """
    rows = module.rows_of_parts()
    scaled = _scaled(module.up, module.scale)
    fresh = not bool(scaled.any())
    out = []
    for index, (name, up) in enumerate(zip(rows, scaled.split(list(rows.values())), strict=True)):
        used = torch.ones(module.rank, dtype=torch.bool) if fresh else up.ne(0).any(dim=0)
        # A rank component that happens to be zero in every part belongs to all of them.
        used |= scaled.eq(0).all(dim=0) & bool(used.any())
        if used.any():
            out.append(Module(name, "", "", module.linear, index, module.down[used].clone(), up[:, used].clone(), None))
    return out


def _swapped(native: str, up: Tensor) -> Tensor:
    if len(up) % 2:
        raise ValueError(f"{native} holds shift and scale, so an even number of rows: {len(up)} in this file; it is damaged")
    return swap_halves(up)


def swap_halves(rows: Tensor) -> Tensor:
    """Native modulation is (shift, scale), diffusers' is (scale, shift)."""
    first, second = rows.chunk(2)
    return torch.cat([second, first])


# --- two experts ---


def written_files(tensors: Mapping[str, Tensor], family: str) -> dict[str, dict[str, Tensor]]:
    """Tensors by our names (`<expert>.<layer>…`) -> those of the LoRA files that training writes, by what follows the files' stem.

    A network with one LoRA, or one LoRA shared by both experts, is one file: the suffix is empty.
    """
    layout = layout_of(family)
    if layout.written == "diffusers" and not layout.pairs:  # as they are named here
        return {"": dict(tensors)}
    by_expert: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        expert, _, layer = name.partition(".")
        by_expert[expert][f"transformer.{layer}"] = tensor
    files = {expert: convert(some, layout.written, family=family) for expert, some in by_expert.items()}
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
    present = {expert: file for expert, file in pair.items() if file.is_file()}
    if path.is_file() and path not in pair.values():
        return {"transformer": path}
    if len(present) == 1:
        missing = next(file for expert, file in pair.items() if expert not in present)
        raise ValueError(f"{path}: of two experts, and {missing.name} is not beside it; both are needed")
    return present or {"transformer": path}


def read_named(path: str | Path, family: str, label: str = "", *, alone: str | None = None) -> tuple[dict[str, Tensor], LoraCard]:
    """A LoRA of a family by our names (`<expert>.<layer>.lora_A.weight`), from one file or a pair; the card of the first.

    Every message names the file; `label` stands before its path. `alone`: the expert (`high_noise`, `low_noise`) whose file will do,
    under any name that is no half of a pair's.

    Raises:
        ValueError: see `files.read_lora`, `convert`, `expert_files` and `LoraCard.from_metadata`; it was trained for another family; or
            the files of a pair say that they are for each other's expert.
    """
    named: dict[str, Tensor] = {}
    cards: list[LoraCard] = []
    with lora_files.naming(path, label):
        files = expert_files(path) if layout_of(family).pairs else {"transformer": Path(path)}
    for expert, file in files.items():
        with lora_files.naming(file, label):
            tensors, metadata = lora_files.read_lora(file)
            card = LoraCard.from_metadata(metadata)
            if card.family not in (None, family):
                raise ValueError(f"{file} was trained for {card.family!r}, model.family is {family!r}")
            if len(files) == 1 and card.expert is not None and card.expert == alone:
                expert = next(one for one, suffix in EXPERT_SUFFIXES.items() if suffix == f"_{alone}")
            elif card.expert in ("high_noise", "low_noise") and (len(files) == 1 or f"_{card.expert}" != EXPERT_SUFFIXES[expert]):
                raise ValueError(
                    f"{file}: its metadata say that it is for the {card.expert.replace('_', '-')} expert; was it renamed? Its name is to "
                    f"end in _{card.expert}.safetensors, with the other expert's file beside it"
                )
            for name, tensor in convert(tensors, "diffusers", family=family).items():
                named[expert + name.removeprefix("transformer")] = tensor
        cards.append(card)
    return named, cards[0]


def guess_family(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The family of a LoRA file: what its metadata say, or what its layers' names and sizes look like (any Wan has the same).

    Of several whose layers have these names and sizes it is the one whose blocks the file fills, else the first.

    Raises:
        ValueError: it does not say, and its layers have the names of a published network and another depth or width.
    """
    if (family := metadata.get(KEYS["family"])) is not None:
        return family
    read: list[list[str]] = []
    unreadable: list[ValueError] = []
    fitting: list[str] = []
    for name in families_of_names(tensors):
        try:
            modules, _ = parse(tensors, name)
        except ValueError as error:
            unreadable.append(error)
            continue
        networks = layout_of(name).networks
        misfits = [next(filter(None, map(network.misfit, modules)), None) for network in networks]
        if any(why is None and network.filled_by(modules) for network, why in zip(networks, misfits, strict=True)):
            return name
        if all(misfits):
            read.append([why for why in misfits if why])
        else:
            fitting.append(name)
    if fitting:
        return fitting[0]
    if not read:
        raise unreadable[0]
    raise ValueError(f"a LoRA of another model, whose layers are called like those of this one: {'; '.join(read[0])}")
