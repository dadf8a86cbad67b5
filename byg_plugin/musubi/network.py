"""`musubi.network_module` and `musubi.network_args`, which the host looks at once the DiT is loaded, and of which it ignores what it
does not know."""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec

from byg_plugin import families
from byg_plugin.config.sections import Config
from byg_plugin.musubi.start import own_module
from byg_plugin.musubi.words import pairs

_AUTOMATIC = ("networks.loha", "networks.lokr")
# The host's kinds find their layers by the names of a network's classes: which it has not, that has none of them.
_ALIKE = ("networks.lora_flux", "networks.lora_flux_2")
_ANYWHERE = "networks.lora_krea2"  # every linear
_UNKNOWN_TO_AUTOMATIC = ("krea2",)


def problems_of_network(config: Config) -> list[str]:
    """What is wrong with the kind of network and its arguments, a sentence each."""
    if config.musubi.get("network_module") is not None and not isinstance(config.musubi["network_module"], str):
        return []  # told by the check against the host's parser
    wrong = _module(config)
    found, unreadable = pairs(config.musubi, "network_args")
    wrong += unreadable
    if (module := own_module(config)).startswith("networks."):
        wrong += _arguments(found, _ARGUMENTS | ({"factor": _whole} if module == "networks.lokr" else {}))
    dropout = config.musubi.get("network_dropout")
    if isinstance(dropout, int | float) and dropout >= 1:
        wrong.append(f"musubi.network_dropout = {dropout}: drops everything; must be below 1")
    return wrong


def _module(config: Config) -> list[str]:
    family = config.model.family
    assert (spec := families.named(family).musubi) is not None
    module, own = own_module(config), spec.network_module
    said = f"musubi.network_module = {config.musubi.get('network_module')!r}"
    if module in _AUTOMATIC and family in _UNKNOWN_TO_AUTOMATIC:
        return [f"{said}: the host has it not for {family}: leave it out"]
    known = {own, _ANYWHERE, *_AUTOMATIC, *(_ALIKE if own in _ALIKE else ())}
    if module in known:
        return []
    if module.startswith("networks."):
        others = {other.musubi.network_module for other in families.SPECS.values() if other.musubi is not None}
        if module in others:
            return [f"{said}: it is another family's, and would find no layer in {family}: leave it out"]
        close = difflib.get_close_matches(module, known, n=1, cutoff=0.8)
        return [f"{said}: no kind of network for {family}; {f'did you mean {close[0]!r}?' if close else f'leave it out for {own!r}'}"]
    return [] if importable(module) else [f"{said}: no such module here; leave it out, or install what has it"]


def importable(module: str) -> bool:
    """Whether a module can be found; the packages that it is in are imported for it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _arguments(given: Mapping[str, str], known: Mapping[str, Callable[[str], str | None]]) -> list[str]:
    wrong = []
    for key, text in given.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            wrong.append(f"musubi.network_args: {key}={text}: the host would ignore it in silence; {hint}")
        elif why := known[key](text):
            wrong.append(f"musubi.network_args: {key}={text}: {why}")
    return wrong


def _share(text: str) -> str | None:
    return None if (value := _as_number(text)) is not None and 0 <= value < 1 else "must be a number from 0 to below 1"


def _above_0(text: str) -> str | None:
    return None if (value := _as_number(text)) is not None and value > 0 else "must be a number above 0"


def _whole(text: str) -> str | None:
    return None if re.fullmatch(r"\s*-?\d{1,9}\s*", text) else "must be a whole number"


def _as_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _patterns(text: str) -> str | None:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
        return "must be a list of texts as Python writes it, ['.*img_mod.*']"
    for pattern in value:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            return f"{pattern!r} is not a regular expression ({error})"
    return None


def _anything(text: str) -> str | None:
    return None


_ARGUMENTS: dict[str, Callable[[str], str | None]] = {
    "rank_dropout": _share,
    "module_dropout": _share,
    "exclude_patterns": _patterns,
    "include_patterns": _patterns,
    "loraplus_lr_ratio": _above_0,
    "conv_dim": _whole,
    "conv_alpha": _above_0,
    "verbose": _anything,
}
