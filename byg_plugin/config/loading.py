"""A TOML file and `--set` overrides become a `Config`, or one `ValueError` that names every bad key; and the reference of all keys."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from byg_plugin.config.objective import DEFAULT, OBJECTIVES
from byg_plugin.config.sections import HOSTS, Config, keys_of, models_of
from byg_plugin.documents import TooDeep, toml_table

_MOST_BYTES = 2**20
_MOST_PROBLEMS = 20


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a TOML file and `section.key=value` overrides into a `Config`.

    Args:
        path: the TOML file.
        overrides: `section.key=value`, the value in TOML syntax (a bare word is taken as a string); the last one of a key counts.

    Raises:
        ValueError: the file is missing or not TOML, or any key, type or combination is wrong.
    """
    return parse_config(read_config(path, overrides), origin=str(path))


def read_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The nested dictionary that a file and overrides say, not yet looked at; see `load_config`."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    if (size := path.stat().st_size) > _MOST_BYTES:
        raise ValueError(f"--config {path}: has {size:,} bytes, it is no configuration; give a TOML file")
    try:
        raw = toml_table(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"--config {path}: not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(raw, override)
    return raw


def parse_config(raw: dict[str, Any], origin: str = "configuration") -> Config:
    """Validate a nested dictionary; see `load_config`."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        lines = [_explain(item, raw) for item in problems[:_MOST_PROBLEMS]]
        more = f"\n  ... and {len(problems) - _MOST_PROBLEMS} more" if len(problems) > _MOST_PROBLEMS else ""
        raise ValueError(f"{origin}:\n" + "\n".join(f"  - {line}" for line in lines) + more) from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    section, dot, name = (part.strip() for part in key.partition("."))
    if not separator or not dot or not _BARE_KEY.fullmatch(section) or not _BARE_KEY.fullmatch(name):
        raise ValueError(f"--set {_short(override)}: expected section.key=value, e.g. --set train.steps=100")
    table = raw.setdefault(section, {})
    if not isinstance(table, dict):
        raise ValueError(f"--set {_short(override)}: [{section}] is not a section of the configuration")
    try:
        table[name] = _override_value(text.strip())
    except ValueError as error:
        raise ValueError(f"--set {_short(override)}: {error}") from error


_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ASSIGNMENT = re.compile(r"\s([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+\s*=")


def _override_value(text: str) -> Any:
    """A value in TOML syntax; what is none is a text, unless it looks like something that was meant otherwise."""
    try:
        found = toml_table(f"value = {text}")
    except ValueError as error:
        if text[:1] in ("'", '"') or text[-1:] in ("'", '"'):
            raise ValueError(f"broken quoting: {error}") from error
        if "\n" in text or any(match[1] in Config.model_fields for match in _ASSIGNMENT.finditer(text)):
            raise ValueError(_TWO) from error
        if isinstance(error, TooDeep):
            raise
        return text
    if len(found) > 1:
        raise ValueError(_TWO)
    return found["value"]


_TWO = "one assignment each: give --set once for every key; a text with blanks or line feeds stands in quotes"


def _explain(item: Any, raw: dict[str, Any]) -> str:
    """One validation error as a sentence with key, value and remedy."""
    location = [str(part) for part in item["loc"]]
    if location[0:1] == ["objective"] and location[1:2] and location[1] in OBJECTIVES:  # which of the sections, no key
        location.pop(1)
    key = _short(".".join(location))
    value = shown(item.get("input"))
    if item["type"] == "union_tag_invalid":
        return f"objective.name = {shown(item['ctx']['tag'])}: is none of {', '.join(map(repr, OBJECTIVES))}"
    if item["type"] == "extra_forbidden":
        if location[0] == "objective" and location[1] in keys_of("objective"):
            return f"{key} = {value} is not for objective.name = {raw['objective'].get('name', DEFAULT)!r}: leave it out"
        return f"unknown key {key} = {value}; {_nearest(location)}"
    if item["type"] == "missing":
        return f"{key} is missing: {_describe(location) or 'add this section'}"
    message = item["msg"].removeprefix("Value error, ")
    if not location or (item["type"] == "value_error" and len(location) == 1):
        return message
    described = _describe(location)
    host = model.get("host") if isinstance(model := raw.get("model"), dict) else None
    if isinstance(host, str) and host in HOSTS and (own := resolve_name(HOSTS[host]).OPTIONS.get(key)):  # filled from there
        key = f"{host}.{own}"
    return f"{key} = {value}: {message[0].lower()}{message[1:]}" + (f" ({described})" if described else "")


def shown(value: Any) -> str:
    """A value as Python writes it, shortened."""
    try:
        return _short(repr(value))
    except ValueError:  # Python's: more digits than it writes
        return "a number of thousands of digits"


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}... ({len(text):,} characters)"


_MOST_SHOWN = 200


def _describe(location: list[str]) -> str:
    known = keys_of(location[0])
    return (known[location[1]].description or "") if len(location) > 1 and location[1] in known else ""


# Names that other trainers give to our options and that no edit distance finds.
_KNOWN_ELSEWHERE_AS = {
    "learning_rate": "lr",
    "max_train_steps": "steps",
    "train_batch_size": "batch_size",
    "network_dim": "rank",
    "network_alpha": "alpha",
    "guidance_scale": "guidance",
}


def _nearest(location: list[str]) -> str:
    if len(location) == 1:
        names, where = list(Config.model_fields), "sections"
    else:
        names, where = list(keys_of(location[0])), f"keys of [{location[0]}]"
    homes = [f"{section}.{location[-1]}" for section in Config.model_fields if location[-1] in keys_of(section)]
    if homes:
        return f"did you mean {homes[0]}?"
    wanted = _KNOWN_ELSEWHERE_AS.get(location[-1], location[-1])
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {'.'.join([*location[:-1], close[0]])}?"
    return f"{where}: {', '.join(names)}"


def reference() -> str:
    """Every option with its type, default and sentence, as Markdown (for the documentation)."""
    lines = []
    for name in Config.model_fields:
        models = models_of(name)
        if not models:
            lines += [f"\n### [{name}]", "", Config.model_fields[name].description or ""]
        for model in models:
            chosen = f" with name = {json.dumps(model.model_fields['name'].default)}" if len(models) > 1 else ""
            lines += [f"\n### [{name}]{chosen}", "", (model.__doc__ or "").strip(), "", "| key | default | what |", "|---|---|---|"]
            lines += [_row(key, field) for key, field in model.model_fields.items()]
    return "\n".join(lines).strip() + "\n"


def _row(key: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else json.dumps(field.default)
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    options = f" One of {', '.join(map(json.dumps, choices))}." if len(choices) > 1 else ""
    return f"| `{key}` | `{default}` | {field.description}{options} |"
