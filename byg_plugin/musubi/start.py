"""The LoRA that `musubi.network_weights` starts from. The host reads it once the DiT is loaded, and of it only the tensors that its own
network has by name: the others are passed over in silence. It scales by `network_alpha`, whatever the file says, and saves the file's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from byg_plugin import families
from byg_plugin.config.sections import Config
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.files import alpha_value, naming, read_lora
from byg_plugin.lora.formats import PREFIXES, convert, losses, parse
from byg_plugin.musubi.family import musubi_family

_PREFIX = PREFIXES["musubi"]
# Of the host's networks: how the tensors of a layer end, and the one that has the rank as its first side.
_LORA = ("lora_down.weight", "lora_up.weight", "alpha")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")
_LOKR = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "alpha")
_RANKED = ("lora_down.weight", "hada_w1_b", "lokr_w2_b")
_GO_ON = 'go on with model.host = "diffusers" and lora.init_from'


def problems_of_start(config: Config, path: str) -> list[str]:
    """What is wrong with `musubi.network_weights`, a sentence; empty: nothing.

    Args:
        config: the whole configuration.
        path: a file.
    """
    try:
        with naming(path, "musubi.network_weights = "):
            tensors, metadata = read_lora(path)
            why = _trained_otherwise(config, LoraCard.from_metadata(metadata)) or _unfit(config, tensors, path)
    except ValueError as error:
        return [str(error)]
    return [f"musubi.network_weights = {path}{why}"] if why else []


def own_module(config: Config) -> str:
    """The module of the host's LoRA, under the short name that the host's documents have."""
    assert (spec := families.named(config.model.family).musubi) is not None
    return str(config.musubi.get("network_module") or spec.network_module).removeprefix("musubi_tuner.")


def _trained_otherwise(config: Config, card: LoraCard) -> str | None:
    """Family and position must be this run's, as `lora.start` asks for with the embedded host."""
    family, position = config.model.family, config.conditioning.position
    if card.family not in (None, family):
        return f" was trained for {card.family!r}, model.family is {family!r}"
    if card.position not in (None, position):
        return f" was trained with conditioning.position = {card.position!r}, here it is {position!r}: set it to {card.position!r}"
    return None


def _unfit(config: Config, tensors: Mapping[str, Tensor], path: str) -> str | None:
    """What the host's network would pass over, stop at, or scale otherwise; None: nothing, or it is a network of the user's own."""
    assert (spec := families.named(config.model.family).musubi) is not None
    module = own_module(config)
    ends = _LORA if module.startswith("networks.lora") else {"networks.loha": _LOHA, "networks.lokr": _LOKR}.get(module)
    if ends is None:
        return None
    named = re.compile(rf"{_PREFIX}[^.]+\.({'|'.join(map(re.escape, ends))})")
    if (foreign := next((key for key in tensors if not named.fullmatch(key)), None)) is not None:
        return _misnamed(config.model.family, tensors, path, foreign, module)
    if module == spec.network_module and not _has_patterns(config.musubi) and (why := _passed_over(config, tensors)):
        return why
    return _other_rank(config.musubi, tensors) or _other_alpha(config.musubi, tensors)


def _misnamed(family: str, tensors: Mapping[str, Tensor], path: str, foreign: str, module: str) -> str:
    for mark, kind in ((".hada_w", "networks.loha"), (".lokr_w", "networks.lokr")):
        if any(mark in key for key in tensors) and kind != module:
            return f": {foreign} is of another kind of network than {module}: set musubi.network_module = {kind!r}"
    if ".lora_down." in foreign and foreign.startswith(_PREFIX):
        return f": {foreign} is of another kind of network than {module}: leave musubi.network_module out"
    what = f": the host has no tensor of the name {foreign}, and would pass over it in silence"
    ranks = {len(tensor) for key, tensor in convert(tensors, "musubi", family=family).items() if key.endswith(_RANKED)}
    if len(ranks) > 1:
        return f"{what}; in the host's fused layers it has ranks {_listed(ranks)}, and the host's network has one: {_GO_ON}"
    return f"{what}: byg_plugin/convert_lora.py {path} --to musubi --out NEW.safetensors, and set musubi.network_dim = {ranks.pop()}"


def _has_patterns(options: Mapping[str, Any]) -> bool:
    """Whether the user says which layers there are: then a layer that ours do not know may be meant."""
    given = options.get("network_args")
    return isinstance(given, list) and any(str(one).startswith(("exclude_patterns=", "include_patterns=")) for one in given)


def _passed_over(config: Config, tensors: Mapping[str, Tensor]) -> str | None:
    """A layer of the file that the host's network has not, as it is made here."""
    left_out = [re.compile(pattern) for pattern in musubi_family(config.model.family).left_out(config.musubi)]
    for module in parse(tensors, config.model.family)[0]:
        name = module.linear.native if module.part is None else module.linear.parts[module.part]
        if any(pattern.fullmatch(name) for pattern in left_out):
            return (
                f": {module.name} is not adapted here, and the host would pass over it in silence: give musubi.network_args the "
                "exclude_patterns that the file was trained with"
            )
    if lost := losses(tensors, "musubi", family=config.model.family):
        return f": the host would pass over {lost[0].name} in silence ({lost[0].why}): take a LoRA of its blocks alone"
    return None


def _other_rank(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    ranks, dim = {len(tensor) for key, tensor in tensors.items() if key.endswith(_RANKED)}, options.get("network_dim")
    if not isinstance(dim, int) or ranks <= {dim}:
        return None
    if len(ranks) > 1:
        return f" has layers of ranks {_listed(ranks)}, and the host's network has one: {_GO_ON}"
    return f" has rank {ranks.pop()}, musubi.network_dim is {dim}: set it to the file's"


def _other_alpha(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """The host would train with one strength, and save the other."""
    dim, alpha = options.get("network_dim"), options.get("network_alpha", 1)
    if not isinstance(dim, int) or not isinstance(alpha, int | float):
        return None
    ranked = {key.partition(".")[0] for key in tensors if key.endswith(_RANKED)}  # a whole lokr_w2 is not scaled
    alphas = {layer: alpha_value(key, tensors[key]) if (key := f"{layer}.alpha") in tensors else float(dim) for layer in ranked}
    here = float(alpha or dim)  # 0 is the rank, the host says; it saves its alpha in the LoRA's dtype, bfloat16 is off by up to 0.4 %
    other = sorted({value or float(dim) for value in alphas.values() if not math.isclose(value or dim, here, rel_tol=5e-3)})
    if not other:
        return None
    if len(set(alphas.values())) > 1:
        return f" has layers of several alphas, such as {other[0]:g}, and the host's network has one: {_GO_ON}"
    return f" has alpha {other[0]:g}, and musubi.network_alpha is {here:g}: set musubi.network_alpha to the file's, {other[0]:g}"


def _listed(numbers: set[int]) -> str:
    return " and ".join(map(str, sorted(numbers)))
