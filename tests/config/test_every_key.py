"""Every key of every section: for each choice of family, objective, optimizer and host it is read, or refused by its name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from byg_plugin import cache_latents, cache_text_encoder_outputs, families, train_network
from byg_plugin.config.fields import Section
from byg_plugin.config.loading import parse_config
from byg_plugin.config.objective import OBJECTIVES
from byg_plugin.config.sections import Config, keys_of, models_of
from tests.support.tiny import model_folder, write_tuples
from tests.support.tiny_critics import critic_folder
from tests.support.tiny_wan import TEXT_TOKENS, wan_folder


@dataclass(frozen=True)
class Choice:
    family: str
    objective: str
    optimizer: str = "adamw"

    def raw(self, folder: Path) -> dict[str, dict[str, Any]]:
        """A run of a few steps that does all that a run can do: validation, previews, scores, checkpoints."""
        spec = families.named(self.family)
        model = model_folder() if not spec.takes_clips else wan_folder(len(spec.experts))
        raw: dict[str, dict[str, Any]] = {
            "model": {"family": self.family, "path": str(model), "dtype": "float32", "device": "cpu"},
            "dataset": {
                "tuples": str(folder / "tuples.jsonl"),
                "cache_dir": str(folder / "cache"),
                "resolution": 32,
                "validation_items": 1,
            },
            "conditioning": {"max_text_tokens": TEXT_TOKENS},
            "objective": {"name": self.objective},
            "lora": {"rank": 2},
            "train": {"steps": 2, "global_batch_size": 1, "mixed_precision": "no", "optimizer": self.optimizer},
            "sample": {"every": 2, "items": 1, "steps": 2},
            "evaluate": {"every": 2, "items": 1, "metrics": ["error"], "select": ["error_source"]},
            "output": {"dir": str(folder / "out")},
        }
        raw["train"] |= {"save_every": 1, "validate_every": 2, "tracker": "none"}
        if self.objective == "unpaired_cycle":
            raw["objective"] |= {"rollout_steps": 2, "identity_warmup_steps": 1}
        if self.objective == "np_edit":
            raw["objective"] |= {"fake_updates": 1, "identity_warmup_steps": 0}
            # A random one knows no answers.
            raw["critic"] = {"path": str(critic_folder("qwen3_vl")), "dtype": "float32", "image_size": 32, "least_accuracy": 0.01}
        return raw


CHOICES = [
    Choice("flux", "unpaired_cycle"),
    Choice("flux", "paired", "muon"),
    Choice("wan2.2-t2v-a14b", "unpaired_cycle"),
    Choice("wan2.1-t2v-1.3b", "paired"),
]
CHOICES += [Choice("flux", name) for name in OBJECTIVES if name not in {choice.objective for choice in CHOICES}]


CANDIDATES = (True, False, 3, 2, 64, 0.5, 0.25, 1.5, 7.0, "other", "cpu", [0.5, 0.5], ["replace"], ["error"], {"replace": 3.0})


def others(section: str, key: str, raw: dict[str, dict[str, Any]]) -> list[Any]:
    """Values of a key that its section takes and that are not the default."""
    field = keys_of(section)[key]
    kinds = [field.annotation, *get_args(field.annotation)]
    literal = next((kind for kind in kinds if get_origin(kind) is Literal), None)
    candidates = get_args(literal) if literal else CANDIDATES
    found = []
    for value in candidates:
        if value == field.default:
            continue
        for model in models_of(section):
            kept = {k: v for k, v in raw.get(section, {}).items() if k in model.model_fields and (section, k) != ("objective", "name")}
            try:
                model.model_validate(kept | {key: value})
            except ValueError:
                continue
            found.append(value)
            break
    return found if literal else found[:1]


def refused_alone(section: str, key: str, raw: dict[str, dict[str, Any]]) -> bool:
    """Whether a section without a value that it takes is one that says to leave the key out."""
    for value in CANDIDATES:
        try:
            parse_config({**raw, section: {**raw.get(section, {}), key: value}})
        except ValueError as error:
            if f"{section}.{key}" in str(error) and "leave it out" in str(error):
                return True
    return False


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[tuple[str, str]]]:
    """(section, key) of what is read of a configuration once it is made."""
    sections = {model: section for section in Config.model_fields for model in models_of(section)}
    read: set[tuple[str, str]] = set()
    plain = Section.__getattribute__

    def noted(self: Section, name: str) -> Any:
        section = sections.get(type(self))
        if section is not None and name in type(self).model_fields and not being_made():
            read.add((section, name))
        return plain(self, name)

    monkeypatch.setattr(Section, "__getattribute__", noted)
    yield read
    monkeypatch.undo()


def being_made() -> bool:
    """Whether a validator is on the stack: what it reads, also by way of others, is no use of a key."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is parse_config.__code__:
            return True
        frame = frame.f_back
    return False


def toml(raw: dict[str, dict[str, Any]]) -> str:
    return "".join(f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()) for name, keys in raw.items())


def run(command: Any, config: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "--config", str(config), *arguments])
    command.main()


@lru_cache(maxsize=len(CHOICES))
def read_by(choice: Choice, folder: Path) -> frozenset[tuple[str, str]]:
    """What caching and a training read of the configuration."""
    folder.mkdir()
    write_tuples(folder, [(64, 64), (48, 48), (64, 64)])
    lines = [json.loads(line) for line in (folder / "tuples.jsonl").read_text(encoding="utf-8").splitlines()]
    (folder / "tuples.jsonl").write_text("\n".join(json.dumps(line | {"target": "photo1.png"}) for line in lines), encoding="utf-8")
    raw = choice.raw(folder)
    config = folder / "config.toml"
    config.write_text(toml(raw), encoding="utf-8")
    with pytest.MonkeyPatch.context() as monkeypatch, recorded(monkeypatch) as read:
        for command in (cache_latents, cache_text_encoder_outputs, train_network):
            run(command, config, monkeypatch)
    return frozenset(read)


# Read of clips alone, or in a branch that another key opens; what reads it has tests of its own.
ELSEWHERE = {
    ("dataset", "min_frames"): "a clip that is shorter than dataset.frames",
    ("dataset", "max_lost"): "a picture that cannot be read",
}


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_key_is_read_or_refused(choice: Choice, tmp_path_factory: pytest.TempPathFactory):
    read = read_by(choice, tmp_path_factory.getbasetemp() / f"keys-{CHOICES.index(choice)}")
    raw, ignored, tried = choice.raw(Path("x")), [], 0
    for section in Config.model_fields:
        for key in keys_of(section):
            values = others(section, key, raw)
            assert values or (section, key) == ("objective", "name") or refused_alone(section, key, raw), (
                f"no value of {section}.{key} fits"
            )
            for value in values:
                tried += 1
                try:
                    parse_config({**raw, section: {**raw.get(section, {}), key: value}})
                except ValueError as error:
                    assert f"{section}.{key}" in str(error), f"{section}.{key} = {value!r} is refused by another name: {error}"
                    continue
                if (section, key) not in read and (section, key) not in ELSEWHERE:
                    ignored.append(f"{section}.{key} = {value!r}")
    assert tried > 100
    assert not ignored, f"taken in silence: {', '.join(ignored)}"


@pytest.mark.parametrize("family", [name for name, spec in families.SPECS.items() if spec.musubi])
def test_with_musubi_a_key_is_read_or_refused(family: str, tmp_path_factory: pytest.TempPathFactory):
    """What its own options decide is refused; what the objective reads is read there as here."""
    shared = read_by(CHOICES[0], tmp_path_factory.getbasetemp() / "keys-0")
    base: dict[str, dict[str, Any]] = {"model": {"family": family, "host": "musubi"}, "dataset": {"tuples": "x"}, "musubi": {"dit": "x"}}
    parse_config(base)
    taken = set()
    for section in Config.model_fields:
        for key in keys_of(section):
            for value in others(section, key, base):
                try:
                    parse_config({**base, section: {**base.get(section, {}), key: value}})
                except ValueError as error:
                    assert f"{section}.{key}" in str(error) or key == "family", f"{section}.{key} = {value!r}: {error}"
                else:
                    taken.add((section, key))
    own = {("model", "host"), ("model", "host_path"), ("model", "device"), ("model", "family"), ("dataset", "tuples"), ("dataset", "rules")}
    common = {(section, key) for section, key in shared if section in ("conditioning", "objective")}
    assert taken <= own | common, taken - own - common
