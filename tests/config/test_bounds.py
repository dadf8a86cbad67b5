"""What is beyond reason is refused where it is written: numbers, texts, nesting, patterns, and settings that train nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
from torch import nn

from byg_plugin.config.loading import load_config, parse_config
from byg_plugin.config.sections import Config, keys_of
from byg_plugin.documents import toml_table
from byg_plugin.hosts import diffusers
from byg_plugin.hosts.patterns import full_matches
from tests.support import ROOT

MINIMAL = """
[model]
path = "m"
[dataset]
tuples = "t"
cache_dir = "c"
[train]
steps = 10
[output]
dir = "o"
"""
WAN = {"model": {"family": "wan2.2-t2v-a14b"}}


def raw(**sections: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = toml_table(MINIMAL)
    for name, values in sections.items():
        whole[name] = whole.get(name, {}) | values
    return whole


def refused(whole: Any) -> str:
    with pytest.raises(ValueError) as caught:
        parse_config(whole)
    return str(caught.value)


def config_file(tmp_path: Path, text: str = MINIMAL) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def fields(kind: type) -> list[tuple[str, str]]:
    """(section, key) of every option that takes such a value."""

    def kinds(annotation: Any) -> Iterator[Any]:
        yield annotation
        for inner in get_args(annotation):
            yield from kinds(inner)

    found = []
    for section in Config.model_fields:
        for key, option in keys_of(section).items():
            if kind in list(kinds(option.annotation)):
                found.append((section, key))
    return found


def named(section: str, key: str, value: Any) -> str:
    message = refused(raw(**{section: {key: [value] * 2 if key == "betas" else value}}))
    assert f"{section}.{key}" in message, message
    assert len(message) < 1000
    return message


# --- numbers ---


def test_the_walk_finds_the_options():
    assert ("dataset", "workers") in fields(int) and ("sample", "cfg_low_noise") in fields(float) and ("lora", "init_from") in fields(str)
    assert len(fields(int)) > 20 and len(fields(float)) > 20 and len(fields(str)) > 12


@pytest.mark.parametrize("value", [10**30, -(10**30), int("9" * 4000), 16**6000], ids=["1e30", "-1e30", "4000 digits", "7000 digits"])
@pytest.mark.parametrize(("section", "key"), fields(int))
def test_no_whole_number_is_without_bounds(section: str, key: str, value: int):
    named(section, key, value)


@pytest.mark.parametrize(
    ("section", "key", "value", "why"),
    [
        ("train", "batch_size", 10**12, "at most 1,024, all are in memory"),
        ("train", "global_batch_size", 10**6, "at most 100,000, all are one step"),
        ("train", "steps", 10**9, "less than or equal to 100000000"),
        ("train", "save_every", 10**9, "less than or equal to 100000000"),
        ("train", "lr_warmup_steps", 10**9, "less than or equal to 100000000"),
        ("dataset", "workers", 257, "each has memory of its own"),
        ("dataset", "cache_batch_size", 1025, "all are in memory"),
        ("dataset", "frames", 10_001, "a clip goes through the network in one piece"),
        ("dataset", "validation_items", 10**10, "less than or equal to 1000000000"),
        ("lora", "rank", 4097, "above a linear's width it adds nothing"),
        ("objective", "rollout_steps", 1001, "each is a pass through the network"),
        ("sample", "steps", 1001, "tell no more times apart"),
    ],
)
def test_a_bound_comes_with_its_reason(section: str, key: str, value: int, why: str):
    assert why in named(section, key, value)


# What is a share, a chance or a time: next to nothing means nothing.
NOTHING = {"max_lost", "betas", "identity_probability", "ema_decay", "t_min", "dropout", "guidance"}


@pytest.mark.parametrize(("section", "key"), fields(float))
def test_no_number_leaves_float32(section: str, key: str):
    for value in (1e39, -1e39, 10**400):
        named(section, key, value)
    if key not in NOTHING:
        named(section, key, 1e-60)


def test_0_is_still_none_and_small_weights_pass():
    config = parse_config(raw(objective={"lambda_id": 0.0, "alpha": 1e-6}, train={"max_grad_norm": 0, "weight_decay": 0}))
    assert (config.objective.lambda_id, config.objective.alpha, config.train.max_grad_norm) == (0.0, 1e-6, 0.0)
    assert "0 = none" in named("objective", "lambda_cycle", 1e-13)


def test_a_range_of_t_that_float32_cannot_tell_from_a_point_is_empty():
    assert "one number in float32" in refused(raw(objective={"t_min": 0.5, "t_max": 0.5 + 1e-9}))


# --- texts ---

NO_PATHS = {
    ("output", "name"),
    ("objective", "name"),
    ("critic", "device"),
    ("objective", "strong_types"),
    ("objective", "critique_types"),
    ("objective", "prior_guidance"),
    ("objective", "negative"),
    ("lora", "targets"),
    ("sample", "negative"),
    ("evaluate", "metrics"),
    ("evaluate", "select"),
}
PATHS = [(section, key) for section, key in fields(str) if (section, key) not in NO_PATHS]


@pytest.mark.parametrize(("section", "key"), PATHS)
def test_places_are_texts_that_a_file_system_takes(section: str, key: str):
    for value, why in [
        ("", "is empty"),
        (" ", "is empty"),
        ("a\0b", r"control character '\x00'"),
        ("C:\temp", r"control character '\t'"),
        ("x/" + "a" * 256, "more than 255 bytes"),
        ("雪" * 86, "more than 255 bytes"),
    ]:
        assert why in named(section, key, value)
    assert "single quotes, 'C:\\models\\flux', or with /" in named(section, key, "C:\temp")


@pytest.mark.parametrize("name", ["NUL", "con", "Aux.v2", "COM1", "lpt9.x", "a.", "a..", "a\n", "a b", "-a", "a" * 129, "a" * 300])
def test_names_that_some_system_refuses(name: str):
    named("output", "name", name)


@pytest.mark.parametrize("name", ["a", "a" * 128, "nullable", "com10", "console.v2", "a.b-c_d"])
def test_names_that_every_system_takes(name: str):
    assert parse_config(raw(output={"name": name})).output.name == name
    longest = f".partial-{name}-ema_high_noise.safetensors"
    assert len(longest.encode()) <= 255


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999}", "(" * 5000, ""], ids=["open", "count", "deep", "empty"])
def test_what_is_no_pattern(pattern: str):
    named("lora", "targets", pattern)


def test_a_backslash_in_a_path_is_told_with_the_remedy(tmp_path: Path):
    for written in (r'path = "C:\models\x"', r'path = "C:\Users\x"'):
        with pytest.raises(ValueError, match=r"--config .*not valid TOML.*line 3.*single quotes, 'C:\\models\\flux', or with /"):
            load_config(config_file(tmp_path, MINIMAL.replace('path = "m"', written)))
    with pytest.raises(ValueError, match=r"model\.path = 'C:\\temp': holds the control character '\\t'; .*single quotes"):
        load_config(config_file(tmp_path, MINIMAL.replace('path = "m"', r'path = "C:\temp"')))
    with pytest.raises(ValueError) as caught:
        load_config(config_file(tmp_path, MINIMAL.replace('path = "m"', "path = C:/temp")))
    assert "escape" not in str(caught.value)


# --- nesting and size ---

DEEP = {
    "list": "[musubi]\na = " + "[" * 50_000,
    "tables": "[musubi]\na = " + "{b = " * 50_000,
    "keys": "[musubi]\n" + "a." * 500_000 + "b = 1",
    "quoted keys": "[musubi]\n" + '"a".' * 100_000 + "b = 1",
    "header": "[x." + "a." * 100_000 + "b]\nc = 1",
    "closed": "[musubi]\na = " + "[" * 150 + "]" * 150,
}


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_nesting_without_end_is_one_error_and_soon(tmp_path: Path, text: str):
    started = time.perf_counter()
    with pytest.raises(ValueError, match="nested too deeply|no configuration"):
        load_config(config_file(tmp_path, MINIMAL + text))
    assert time.perf_counter() - started < 10


def test_nesting_in_an_override():
    with pytest.raises(ValueError, match=r"--set train\.steps=\[\[\[.*characters\): nested too deeply"):
        load_config(ROOT / "configs" / "flux_image.toml", ["train.steps=" + "[" * 50_000])


def test_dots_inside_texts_are_no_nesting(tmp_path: Path):
    targets = "|".join(rf"transformer_blocks\.{block}\.attn\.to_q" for block in range(60))
    assert load_config(config_file(tmp_path, MINIMAL + f"[lora]\ntargets = '{targets}'")).lora.targets == targets


@pytest.mark.parametrize(
    "line", ["# " + "." * 120, "a = [" + "0.5, " * 120 + "]", "a = 1  # e.g. " + "x.y. " * 60], ids=["rule", "list", "words"]
)
def test_dots_that_join_no_keys_are_no_nesting(line: str):
    assert len(toml_table(line)) <= 1


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_a_file_in_another_encoding_says_so(tmp_path: Path, encoding: str):
    path = tmp_path / "c.toml"
    path.write_bytes(MINIMAL.replace('path = "m"', 'path = "mé"').encode(encoding))
    with pytest.raises(ValueError, match=r"--config .*c\.toml: not valid TOML: .*; save it as UTF-8"):
        load_config(path)


def test_line_ends_and_a_mark_of_editors_are_read(tmp_path: Path):
    path, wanted = tmp_path / "c.toml", load_config(config_file(tmp_path, MINIMAL))
    for end in ("\r\n", "\r"):
        path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", end).encode())
        assert load_config(path) == wanted


def test_a_file_of_another_kind_is_not_read_whole(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(2 << 20)
    with pytest.raises(ValueError, match="has 2,097,152 bytes, it is no configuration"):
        load_config(path)


@pytest.mark.parametrize("model", [{"family": []}, {"family": {"a": 1}}, {"host": [1]}])
def test_a_family_or_host_of_another_type_is_named(model: dict[str, Any]):
    assert f"model.{next(iter(model))}" in refused(raw() | {"model": model})
    assert "model.family" in refused({"model": {"family": [], "host": "musubi"}, "dataset": {"tuples": "t"}})


def test_many_problems_and_long_values_are_cut():
    message = refused(raw(lora={f"key{i}": "x" * 10_000 for i in range(500)}))
    assert message.count("\n  - ") == 20 and "... and 480 more" in message and len(message) < 20_000
    assert len(refused(raw(output={"k" * 500_000: 1}))) < 1000


def test_on_musubi_the_hosts_own_option_is_named():
    own = {"network_dim": 10**9, "max_train_steps": 10**12, "output_dir": "a\tb", "output_name": "NUL"}
    message = refused({"model": {"host": "musubi"}, "dataset": {"tuples": "t"}, "musubi": own})
    assert all(f"musubi.{key} = " in message for key in own), message
    assert "lora.rank" not in message


# --- --set: one whole assignment, or an error ---


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps=1 train.lr=2", "one assignment each"),
        ("train.steps=1\nx=2", "one assignment each"),
        ("train.steps=1\n[lora]", "one assignment each"),
        ("train.steps=1\nlr=2", "one assignment each"),
        ("output.dir=a output.name=b", "one assignment each"),
        ("output.dir=a\nb", "one assignment each"),
        ('output.dir="abc', "broken quoting"),
        ("output.dir='abc", "broken quoting"),
        ('output.dir=abc"', "broken quoting"),
        ('output.dir="a" "b"', "broken quoting"),
        (r'output.dir="C:\models"', "single quotes"),
        ("train.betas.0=0.5", "expected section.key=value"),
        ("a.b.c=1", "expected section.key=value"),
        ("train. =1", "expected section.key=value"),
        ('"train".steps=1', "expected section.key=value"),
        ("[train]\nsteps=1", "expected section.key=value"),
        ("lora.init_from=", "lora.init_from = '': is empty"),
        ("model.path=", "model.path = '': is empty"),
        ("train.steps=[1", "train.steps = '[1'"),
    ],
)
def test_what_is_no_single_assignment(tmp_path: Path, override: str, says: str):
    with pytest.raises(ValueError) as caught:
        load_config(config_file(tmp_path), [override])
    assert says in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("output.dir='a output.name=b'", "a output.name=b"),
        ("output.dir=my photos/of 3.5 = x", "my photos/of 3.5 = x"),
        (r"output.dir='C:\temp'", "C:\\temp"),
        (r"output.dir=C:\temp", "C:\\temp"),
        ("output.dir=O'Brien's runs", "O'Brien's runs"),
        ("lora.targets=[ab]_[qkv]", "[ab]_[qkv]"),
    ],
)
def test_bare_texts_stay_whole(tmp_path: Path, override: str, value: str):
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(load_config(config_file(tmp_path), [override]), section), key) == value


# --- settings without effect ---


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"objective": {"identity_step_weight": 0.0, "identity_probability": 1.0}}, "objective.identity_probability = 1"),
        ({"objective": {"identity_step_weight": 0.0, "identity_warmup_steps": 10}}, "all of train.steps = 10 identity steps"),
        (
            {"objective": {"lambda_cycle": 0.0, "lambda_id": 0.0, "alpha": 0.0, "directional": False}},
            "nothing is left to train",
        ),
        ({"objective": {"cycle": False, "lambda_id": 0.0, "alpha": 0.0, "directional": False}}, "nothing is left to train"),
        ({"train": {"lr": 1.0, "weight_decay": 1.0}}, "which leaves nothing of them"),
        ({"dataset": {"fps": 8.0}}, "dataset.fps = 8.0 is for clips"),
        ({"dataset": {"vae_tiling": True}}, "dataset.vae_tiling: the VAE of flux"),
        ({**WAN, "conditioning": {"guidance": 2.0}}, "conditioning.guidance = 2.0 is a guidance embedding"),
        ({"model": {"family": "wan2.1-t2v-14b"}, "sample": {"cfg_low_noise": 2.0}}, "sample.cfg_low_noise is for families of two experts"),
    ],
)
def test_what_would_train_nothing_or_be_without_effect_is_refused(sections: dict[str, Any], says: str):
    assert says in refused(raw(**sections))


@pytest.mark.parametrize(
    "objective",
    [
        {"identity_step_weight": 0.0, "identity_warmup_steps": 9},
        {"identity_step_weight": 0.0, "identity_warmup_steps": 0, "identity_probability": 0.9},
        {"identity_probability": 1.0},  # copying alone is learned
        {"identity_warmup_steps": 100},
        {"lambda_cycle": 0.0, "lambda_id": 0.0, "alpha": 0.0},  # the direction
        {"lambda_cycle": 0.0, "lambda_id": 0.0, "directional": False},  # alpha's MSE
        {"name": "paired"},  # knows no identity steps
    ],
)
def test_what_trains_something_passes(objective: dict[str, Any]):
    parse_config(raw(objective=objective))


# --- patterns ---

NAMES = ["blocks.0.attn.to_q", "blocks.1.attn.to_k", "x" * 28]


def test_patterns_match_whole_names_in_their_order():
    assert full_matches(r"blocks\.\d\.attn\.to_[qk]", NAMES, "k") == NAMES[:2]
    assert full_matches(r"blocks\.1.attn.to_k|blocks\.0\.attn\.to_q", NAMES, "k") == NAMES[:2]
    assert full_matches(r"x+", NAMES, "k") == NAMES[2:] and full_matches("to_q", NAMES, "k") == []


def test_a_pattern_that_takes_too_long_is_stopped_and_named():
    # Every letter more doubles its time: seconds here, years with the names of a network.
    with pytest.raises(ValueError, match=r"lora\.targets = '\(x\+\)\+y' took more than 0\.5 s to match 3 names: a repetition inside"):
        full_matches("(x+)+y", NAMES, "lora.targets", seconds=0.5)


def test_a_networks_names_are_matched_with_that_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diffusers, "full_matches", partial(full_matches, seconds=0.5))
    network = nn.Module()
    network.add_module("x" * 28, nn.Linear(2, 2))
    assert diffusers.matched_linears(network, "x+") == ["x" * 28]
    with pytest.raises(ValueError, match=r"lora\.targets = .* took more than"):
        diffusers.matched_linears(network, "(x+)+y")


def test_a_broken_pattern_is_named():
    with pytest.raises(ValueError, match=r"lora\.targets = 'to_q\(' is not a regular expression"):
        full_matches("to_q(", NAMES, "lora.targets")
