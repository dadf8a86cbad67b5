"""Reading a configuration: every error names key, value and remedy; --set is the file's equal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pydantic
import pytest

from byg_plugin.config.loading import load_config, parse_config, reference
from byg_plugin.config.sections import Config, keys_of
from tests.support.config_files import message_of, raw

MINIMAL = """
[model]
path = "models/flux"
[dataset]
tuples = "tuples.jsonl"
cache_dir = "cache"
[train]
steps = 10
[output]
dir = "out"
"""


@pytest.fixture
def minimal(tmp_path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def test_the_minimal_file_gives_the_papers_defaults(minimal):
    config = load_config(minimal)
    objective = config.objective
    assert (objective.lambda_cycle, objective.lambda_prior, objective.lambda_id) == (1.0, 1.0, 0.2)
    assert (objective.rollout_steps, objective.identity_warmup_steps, objective.identity_probability) == (10, 200, 0.15)
    assert (objective.t_distribution, objective.t_min, objective.t_max) == ("uniform", 0.0, 1.0)
    assert (config.lora.rank, config.train.lr, config.train.weight_decay, config.train.global_batch_size) == (64, 3e-4, 1e-2, 8)
    assert config.lora.scale_numerator == 64.0


def test_a_configuration_is_frozen(minimal):
    config = load_config(minimal)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.train.steps = 3


# --- files ---


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"--config {tmp_path / 'nothing.toml'}: no such file")):
        load_config(tmp_path / "nothing.toml")


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", [b'{"model": {}}', b"[model\npath = 1", b"steps = 10 steps", b"\xff\xfe\x00binary"])
def test_a_file_that_is_not_toml_is_named(tmp_path, content):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not valid TOML") as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path, minimal):
    path = tmp_path / "bom.toml"
    path.write_text(MINIMAL.lstrip(), encoding="utf-8-sig")
    assert path.read_bytes().startswith(b"\xef\xbb\xbf[")
    assert load_config(path) == load_config(minimal)


def test_the_file_is_named_before_its_errors(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(MINIMAL + "[lora]\nrnk = 4\n", encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}:")


# --- keys ---


@pytest.mark.parametrize(
    "section, key, nearest",
    [
        ("lora", "rnk", "lora.rank"),
        ("train", "stepps", "train.steps"),
        ("objective", "lamda_cycle", "objective.lambda_cycle"),
        ("objective", "identity_prob", "objective.identity_probability"),
        ("dataset", "resolutions", "dataset.resolution"),
        ("train", "learning_rate", "train.lr"),
        ("lora", "network_dim", "lora.rank"),
        ("train", "rank", "lora.rank"),
        ("objective", "lr", "train.lr"),
        ("conditioning", "guidance_scale", "conditioning.guidance"),
    ],
)
def test_an_unknown_key_is_named_with_its_value_and_the_nearest_key(section, key, nearest):
    message = message_of(raw(**{section: {key: 12345}}))
    assert f"{section}.{key}" in message and "12345" in message
    assert f"did you mean {nearest}?" in message


def test_a_key_like_no_other_lists_the_sections_keys():
    message = message_of(raw(lora={"zzzzzz": 1}))
    assert "lora.zzzzzz" in message
    assert all(key in message for key in ("rank", "alpha", "dropout", "targets", "init_from"))


@pytest.mark.parametrize("section, nearest", [("objectve", "objective"), ("samples", "sample"), ("datasets", "dataset")])
def test_an_unknown_section_is_named_with_the_nearest(section, nearest):
    message = message_of(raw(**{section: {"a": 1}}))
    assert section in message and f"did you mean {nearest}?" in message


@pytest.mark.parametrize("section", ["model", "dataset", "train", "output"])
def test_a_missing_section_or_key_is_named(section):
    if section != "model":  # every key of [model] has a default
        without_key = raw() | {section: {}}
        assert f"{section}." in message_of(without_key) and "is missing" in message_of(without_key)
    whole = raw()
    del whole[section]
    message = message_of(whole)
    assert section in message and "missing" in message and "add this section" in message


def test_all_errors_are_told_at_once():
    message = message_of(raw(lora={"rank": 0, "alhpa": 1}, train={"lr": "fast"}))
    assert all(text in message for text in ("lora.rank", "lora.alpha", "train.lr"))
    assert message.count("\n  - ") == 3


# --- --set ---


@pytest.mark.parametrize(
    "override, value",
    [
        ("train.steps=100", 100),
        ("train.steps = 100", 100),
        ("train.lr=1e-3", 1e-3),
        ("train.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("objective.routing=false", False),
        ("objective.graph=joint", "joint"),
        ('objective.graph="joint"', "joint"),
        ("lora.targets=.*attn\\.to_[qkv]", ".*attn\\.to_[qkv]"),
        ("output.dir=runs/a=b", "runs/a=b"),
        ("lora.alpha=32", 32.0),
    ],
)
def test_set_overrides_the_file_with_the_right_type(minimal, override, value):
    section, name = override.partition("=")[0].strip().split(".")
    found = getattr(getattr(load_config(minimal, [override]), section), name)
    assert found == value and type(found) is type(value)


def test_set_works_for_sections_the_file_lacks_and_the_last_one_wins(minimal):
    config = load_config(minimal, ["lora.rank=8", "lora.rank=16", "sample.every=5"])
    assert (config.lora.rank, config.sample.every, config.train.steps) == (16, 5, 10)


@pytest.mark.parametrize("override", ["train.steps", "steps=5", "train=5", "=5", ".steps=5", "train.=5", ""])
def test_a_malformed_set_is_shown_with_the_form_it_should_have(minimal, override):
    with pytest.raises(ValueError) as caught:
        load_config(minimal, [override])
    message = str(caught.value)
    assert override.partition("=")[0].strip(".") in message
    assert "section.key=value" in message or "missing" in message or "unknown" in message


@pytest.mark.parametrize(
    "override, parts",
    [
        ("train.step=5", ["train.step", "did you mean train.steps?"]),
        ("trian.steps=5", ["trian", "did you mean train?"]),
        ("train.steps=many", ["train.steps", "'many'"]),
        ("lora.rank=0", ["lora.rank = 0"]),
        ("train.steps=", ["train.steps"]),
        ("a.b.c=1", ["a"]),
    ],
)
def test_a_set_is_validated_like_the_file(minimal, override, parts):
    with pytest.raises(ValueError) as caught:
        load_config(minimal, [override])
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_set_into_a_value_is_refused(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("model = 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"--set model\.path=x: \[model\] is not a section"):
        load_config(path, ["model.path=x"])


# --- what is written down ---


def test_the_resolved_configuration_reads_back_as_the_same(minimal):
    config = load_config(minimal, ["lora.rank=8", "train.betas=[0.5, 0.6]"])
    again = json.loads(config.to_json())
    again = {section: {key: value for key, value in values.items() if value is not None} for section, values in again.items()}
    assert parse_config(again) == config


def test_every_option_has_a_sentence_and_is_in_the_reference():
    text = reference()
    for section in Config.model_fields:
        assert f"### [{section}]" in text
        for key, option in keys_of(section).items():
            assert option.description and option.description[0].isalnum() and len(option.description) > 8, f"{section}.{key}"
            assert f"| `{key}` |" in text and option.description in text


def test_the_users_folder_in_paths(minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run must not train into a folder that is called `~`; what may be a hub id is expanded where it is looked for."""
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    keys = ("dataset.tuples", "dataset.cache_dir", "dataset.image_root", "output.dir", "model.path")
    config = load_config(minimal, [f'{key}="~/{key}"' for key in keys])
    found = [getattr(getattr(config, section), name) for section, name in (key.split(".") for key in keys)]
    assert [Path(one) for one in found] == [*(tmp_path / key for key in keys[:-1]), Path("~/model.path")]
