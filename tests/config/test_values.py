"""Values of a configuration: what is wrong alone or together is named with its key and a remedy."""

from __future__ import annotations

import pytest

from byg_plugin.config.loading import load_config, parse_config
from tests.support.config_files import CONFIGS, message_of, raw

# --- values ---


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("train", "steps", "100"),
        ("train", "steps", 1.5),
        ("train", "steps", True),
        ("train", "steps", 0),
        ("train", "steps", -3),
        ("train", "lr", "3e-4"),
        ("train", "lr", True),
        ("train", "lr", 0.0),
        ("train", "lr", float("nan")),
        ("train", "lr", float("inf")),
        ("train", "betas", [0.9]),
        ("train", "betas", [0.9, 1.5]),
        ("train", "betas", ["0.9", "0.99"]),
        ("train", "optimizer", "sgd"),
        ("train", "mixed_precision", "fp8"),
        ("lora", "rank", 0),
        ("lora", "rank", -1),
        ("lora", "rank", 64.0),
        ("lora", "alpha", 0.0),
        ("lora", "dropout", 1.0),
        ("objective", "name", "cycle"),
        ("objective", "graph", "parallel"),
        ("objective", "lambda_cycle", -1.0),
        ("objective", "alpha", -0.1),
        ("objective", "ema_decay", 1.0),
        ("objective", "rollout_steps", 1),
        ("objective", "identity_probability", 1.5),
        ("objective", "t_max", 1.2),
        ("objective", "t_shift", 0.0),
        ("objective", "frozen_batch", 3),
        ("objective", "routing", "false"),
        ("objective", "routing", 0),
        ("dataset", "resolution", 0),
        ("dataset", "tuples", 3),
        ("conditioning", "position", "rope"),
        ("conditioning", "guidance", -1.0),
        ("model", "family", "wan"),
        ("model", "dtype", "fp16"),
        ("model", "attention", "sdpa"),
        ("output", "name", "../elsewhere"),
        ("output", "name", ""),
        ("output", "name", "training"),
        ("output", "name", "Training"),
        ("train", "seed", -1),
        ("train", "seed", 2**63),
        ("sample", "seed", 2**63),
    ],
)
def test_a_wrong_value_is_named_with_its_key(section, key, value):
    message = message_of(raw(**{section: {key: value}}))
    assert f"{section}.{key}" in message
    if not isinstance(value, list):
        assert repr(value) in message


@pytest.mark.parametrize("betas", [[0.9, 1.0], [1.0, 0.9], [-0.1, 0.9]])
def test_moment_decays_are_below_1(betas):
    assert "train.betas" in message_of(raw(train={"betas": betas}))


def test_the_largest_seed_is_what_a_generator_takes():
    config = parse_config(raw(train={"seed": 2**63 - 1}, sample={"seed": 2**63 - 1}))
    assert config.train.seed == config.sample.seed == 2**63 - 1


def test_a_name_that_only_begins_like_the_checkpoints_file_is_taken():
    assert parse_config(raw(output={"name": "training_1"})).output.name == "training_1"


def test_a_wrong_value_comes_with_what_the_key_means():
    assert "Rank of every adapted linear" in message_of(raw(lora={"rank": 0}))
    assert "uniform" in message_of(raw(objective={"t_distribution": "normal"})), "the choices are the remedy"


@pytest.mark.parametrize("value", [3, "models", [1]])
def test_a_section_that_is_a_value_is_named(value):
    assert "model" in message_of(raw() | {"model": value})


def test_whole_numbers_are_taken_where_a_number_is_wanted():
    config = parse_config(raw(objective={"lambda_id": 1}, train={"betas": [0, 0.9]}))
    assert config.objective.lambda_id == 1.0 and config.train.betas == (0.0, 0.9)


# --- combinations ---


@pytest.mark.parametrize("t_min, t_max", [(0.5, 0.5), (0.9, 0.1)])
def test_an_empty_range_of_t_is_refused(t_min, t_max):
    message = message_of(raw(objective={"t_min": t_min, "t_max": t_max}))
    assert f"objective.t_min = {t_min}" in message and f"objective.t_max = {t_max}" in message and "empty" in message


@pytest.mark.parametrize(
    "sections, parts",
    [
        ({"objective": {"graph": "joint", "merge_identity": True}}, ["objective.merge_identity", "sequential"]),
        ({"lora": {"forward": "merged"}}, ["lora.forward = 'merged'", "model.dtype = 'float32'", "it is 'bfloat16'", "'factors'"]),
        ({"lora": {"forward": "merged", "dropout": 0.1}, "model": {"dtype": "float32"}}, ["lora.dropout = 0.0, it is 0.1", "'factors'"]),
        ({"lora": {"forward": "merged"}, "model": {"dtype": "float32", "quantization": "fp8"}}, ["model.quantization = 'none'", "'fp8'"]),
        ({"train": {"global_batch_size": 8, "batch_size": 3}}, ["train.global_batch_size = 8", "train.batch_size = 3"]),
        ({"train": {"validate_every": 5}}, ["train.validate_every", "dataset.validation_items"]),
        ({"model": {"quantization": "nf4", "dtype": "float32"}}, ["model.quantization = 'nf4'", "model.dtype = 'bfloat16'"]),
        ({"model": {"quantization": "int8", "dtype": "float32"}}, ["model.quantization = 'int8'", "model.dtype = 'bfloat16'"]),
    ],
)
def test_impossible_combinations_are_refused_with_the_remedy(sections, parts):
    message = message_of(raw(**sections))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "objective",
    [
        {"lambda_cycle": 0.0, "lambda_prior": 0.0, "lambda_id": 0.0},
        {"cycle": False, "prior": False, "lambda_id": 0.0},
    ],
)
def test_an_objective_without_a_term_is_refused_before_a_model_loads(objective):
    assert "lambda_id" in message_of(raw(objective=objective))


def test_accumulation_divides_the_global_batch():
    config = parse_config(raw(train={"global_batch_size": 12, "batch_size": 2}))
    assert [config.accumulation(processes) for processes in (1, 2, 3, 6)] == [6, 3, 2, 1]
    with pytest.raises(ValueError, match=r"global_batch_size = 12 .* 4 processes .*batch_size = 2.*change"):
        config.accumulation(4)


def test_a_part_without_a_place_names_both_keys():
    config = parse_config(raw() | {"model": {"vae": "ae.safetensors"}})
    assert config.model.part("vae") == "ae.safetensors"
    with pytest.raises(ValueError, match=r"model\.transformer is not set.*model\.path"):
        config.model.part("transformer")
    assert parse_config(raw()).model.part("vae") == "models/flux"


# --- families ---


def wan(**sections):
    raw = {
        "model": {"family": "wan2.2-t2v-a14b", "path": "x"},
        "dataset": {"tuples": "x", "cache_dir": "x"},
        "train": {"steps": 1},
        "output": {"dir": "x"},
    }
    for name, values in sections.items():
        raw.setdefault(name, {}).update(values)
    return parse_config(raw)


def test_video_has_its_own_defaults_and_a_named_key_wins():
    config = wan()
    assert (config.objective.t_shift, config.objective.rollout_schedule, config.objective.identity_probability) == (12.0, "shifted", 0.1)
    assert (config.dataset.frames, config.fps, config.sample.steps) == (81, 16, 40)
    assert (config.cfg_at(True), config.cfg_at(False)) == (4.0, 3.0) and "三条腿" in config.negative
    named = wan(objective={"t_shift": 1.0}, dataset={"frames": 5, "fps": 8.0}, sample={"cfg_low_noise": 1.0, "negative": ""})
    assert (named.objective.t_shift, named.objective.t_distribution, named.dataset.frames, named.fps) == (1.0, "logit_normal", 5, 8.0)
    assert (named.cfg_at(True), named.cfg_at(False), named.negative) == (4.0, 1.0, "")
    assert wan(sample={"cfg_high_noise": 1.0, "cfg_low_noise": 1.0}).negative is None
    assert wan(model={"family": "wan2.2-ti2v-5b"}).fps == 24
    image = load_config(CONFIGS / "flux_image.toml")
    assert (image.dataset.frames, image.fps, image.negative, image.cfg_at(True)) == (1, None, None, 1.0)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"boundary": 1.0}}, "model.boundary = 1.0"),
        ({"model": {"boundary": 0.0}}, "model.boundary = 0.0"),
        ({"objective": {"t_shift": 0.0}}, "objective.t_shift = 0.0"),
        ({"objective": {"t_shift": -1.0}}, "objective.t_shift = -1.0"),
        ({"lora": {"experts": "low_noise"}}, "lora.experts = 'low_noise' trains one expert alone, but a rollout .* give lora.other_expert"),
        ({"lora": {"other_expert": "x.safetensors"}}, "lora.other_expert is for"),
        ({"model": {"offload_inactive_expert": True, "quantization": "nf4"}}, "cannot move weights stored as nf4"),
        ({"model": {"offload_inactive_expert": True}, "objective": {"rollout_weights": "merged"}}, "rollout_weights = 'merged'"),
        ({"model": {"family": "wan2.1-t2v-14b", "boundary": 0.5}}, "model.boundary is for families of two experts"),
        ({"model": {"family": "wan2.1-t2v-14b", "transformer_2": "x"}}, "model.transformer_2 is for families of two experts"),
        ({"model": {"family": "wan2.1-t2v-14b"}, "lora": {"experts": "shared"}}, "wan2.1-t2v-14b has one network"),
        ({"model": {"clip": "x"}}, "model.clip: .* no such text encoder"),
        (
            {"conditioning": {"position": "kontext"}},
            "conditioning.position = 'kontext' is not for wan2.2-t2v-a14b: one of 'same', 'bernini'",
        ),
        ({"model": {"family": "flux"}, "conditioning": {"position": "bernini"}}, "'bernini' is not for flux"),
        ({"model": {"family": "flux"}, "sample": {"solver": "unipc"}}, "sample.solver = 'unipc' is not flux's"),
        ({"model": {"family": "flux"}, "dataset": {"frames": 5}}, "dataset.frames = 5: flux takes images"),
        ({"dataset": {"frames": 9, "min_frames": 13}}, "dataset.min_frames = 13 is above dataset.frames = 9"),
        ({"dataset": {"frames": 0}}, "dataset.frames = 0"),
    ],
)
def test_impossible_video_options_are_refused(sections, message):
    with pytest.raises(ValueError, match=message):
        wan(**sections)


def test_dropout_where_a_pass_is_made_twice_is_refused():
    """Without routing y_hat is made for its value and again for its gradient: two masks would make two edits of it."""
    for objective in ({"routing": False}, {"name": "np_edit", "vlm": False, "identity_warmup_steps": 0, "fake_updates": 1}):
        with pytest.raises(ValueError, match=r"lora.dropout = 0.1: objective.name = .* makes a pass twice"):
            parse_config(raw(objective=objective, lora={"dropout": 0.1}))
    parse_config(raw(objective={"routing": False, "graph": "joint"}, lora={"dropout": 0.1}))
    parse_config(raw(objective={}, lora={"dropout": 0.1}))
