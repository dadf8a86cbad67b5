"""What musubi-tuner makes of a configuration: its own options in `[musubi]` are the one truth, and the sections that say the same
are filled from them. No torch: every command reads a configuration."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from byg_plugin import families
from byg_plugin.config.sections import SECTIONS_OF_OBJECTIVES, keys_of

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config

# What musubi-tuner has options of its own for: our key -> its option. These are not read on that host.
OPTIONS = {
    "model.transformer": "dit",
    "model.transformer_2": "dit",
    "model.vae": "vae",
    "model.t5": "t5",
    "model.clip": "text_encoder2",
    "model.path": "dit",
    "model.dtype": "mixed_precision",
    "model.quantization": "fp8_base and musubi.fp8_scaled",
    "model.attention": "sdpa, musubi.flash_attn or musubi.xformers",
    "model.gradient_checkpointing": "gradient_checkpointing",
    "model.boundary": "timestep_boundary",
    "model.offload_inactive_expert": "offload_inactive_dit",
    "dataset.image_root": "dataset_config",
    "dataset.cache_dir": "dataset_config",
    "dataset.resolution": "dataset_config",
    "dataset.frames": "dataset_config",
    "dataset.fps": "dataset_config",
    "dataset.workers": "max_data_loader_n_workers",
    "lora.rank": "network_dim",
    "lora.alpha": "network_alpha",
    "lora.dropout": "network_dropout",
    "lora.targets": "network_args",
    "lora.init_from": "network_weights",
    "train.steps": "max_train_steps",
    "train.global_batch_size": "gradient_accumulation_steps",
    "train.batch_size": "dataset_config",
    "train.lr": "learning_rate",
    "train.optimizer": "optimizer_type",
    "train.weight_decay": "optimizer_args",
    "train.betas": "optimizer_args",
    "train.lr_schedule": "lr_scheduler",
    "train.lr_warmup_steps": "lr_warmup_steps",
    "train.max_grad_norm": "max_grad_norm",
    "train.mixed_precision": "mixed_precision",
    "train.seed": "seed",
    "train.save_every": "save_every_n_steps",
    "train.keep_last": "save_last_n_steps",
    "train.tracker": "log_with",
    "sample.every": "sample_every_n_steps",
    "output.dir": "output_dir",
    "output.name": "output_name",
}
# Its options that are paths, in which it knows no `~`.
PATHS = (
    *("dit", "dit_high_noise", "turbo_dit", "vae", "t5", "clip", "text_encoder", "text_encoder1", "text_encoder2"),
    *("dataset_config", "sample_prompts", "network_weights", "output_dir", "logging_dir", "log_tracker_config"),
)
_READ = {"model": {"family", "host", "host_path", "device"}, "dataset": {"tuples", "rules"}}
_SECTIONS = ("model", "dataset", "lora", "train", "sample", "evaluate", "output", "musubi")


def fill(raw: dict[str, Any]) -> dict[str, Any]:
    """The raw configuration with the sections that the host's options decide, and `~` in its paths the user's folder.

    Raises:
        ValueError: a key is given that the host has an option for.
    """
    sections = {name: raw.get(name, {}) for name in _SECTIONS}
    if not all(isinstance(section, dict) for section in sections.values()):
        return raw  # the schema refuses it
    for name in _SECTIONS[:-1]:
        for key in sections[name]:
            if key in keys_of(name) and key not in _READ.get(name, ()):
                own = OPTIONS.get(f"{name}.{key}")
                remedy = f"set musubi.{own}" if own else "leave it out"
                raise ValueError(f"{name}.{key} is not read with model.host = 'musubi': {remedy}")
    if "musubi" in raw:
        own = sections["musubi"]
        sections["musubi"] = {key: os.path.expanduser(v) if key in PATHS and isinstance(v, str) else v for key, v in own.items()}
        raw = {**raw, "musubi": sections["musubi"]}
    return {**raw, **_filled_from(sections)}


def check(config: Config) -> None:
    """Refuse what this host cannot do.

    Raises:
        ValueError: names the key.
    """
    objective = config.objective
    if config.model.spec.musubi is None:
        raise ValueError(
            f"model.family = {config.model.family!r}: not trained in musubi-tuner by this package; set model.host = 'diffusers'"
        )
    if config.conditioning.position == "bernini":
        raise ValueError(
            "conditioning.position = 'bernini' turns the source's positions, for which musubi-tuner's Wan has no place: set "
            "conditioning.position = 'same', or model.host = 'diffusers'"
        )
    if not objective.on_musubi:
        able = ", ".join(repr(name) for name, section in SECTIONS_OF_OBJECTIVES.items() if section.on_musubi)
        raise ValueError(f"objective.name = {objective.name!r}: with model.host = 'musubi' only {able}; set model.host = 'diffusers'")
    if objective.criticised:
        raise ValueError("objective.critique_types asks a critic, which model.host = 'musubi' has not: leave it out")
    if objective.named_types.get("prior_guidance"):
        raise ValueError("objective.prior_guidance goes by a tuple's edit_type, which musubi-tuner's data sets have not: leave it out")
    dropped = ["network_dropout"] if config.musubi.get("network_dropout") else []
    words = config.musubi.get("network_args")
    # What is no list is told by the check against the host's parser.
    dropped += [word for word in (words if isinstance(words, list) else []) if re.match(r"(rank|module)_dropout=(?!0*\.?0*$)", str(word))]
    if objective.repeats_passes and dropped:
        raise ValueError(
            f"musubi: {dropped[0]}: with objective.routing = false a pass is made twice, and dropout would make two different ones: leave "
            "it out"
        )
    if objective.merges_rollout:
        raise ValueError("objective.rollout_weights = 'merged' is not for model.host = 'musubi': set it to 'swap'")
    if objective.joins_passes and config.musubi.get("blocks_to_swap"):
        raise ValueError(
            "objective.graph = 'joint' makes three forward passes before a backward pass: with musubi.blocks_to_swap the "
            "wrong blocks would be on the device; set objective.graph = 'sequential'"
        )


def _filled_from(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The sections that the host's options decide. Wrong types are left to the check against the host's parser, which names them."""
    own = sections["musubi"]

    def given(option: str, kind: type, least: int = 0) -> Any:
        value = own.get(option)
        return value if isinstance(value, kind) and not isinstance(value, bool) and (kind is str or value >= least) else None

    family = sections["model"].get("family", keys_of("model")["family"].default)
    spec = families.SPECS.get(family) if isinstance(family, str) else None  # the schema refuses it
    lora = {"rank": given("network_dim", int, 1), "experts": "shared" if spec and spec.has_experts else None}
    train = {"steps": given("max_train_steps", int, 1) or 1600, "seed": given("seed", int), "global_batch_size": 1}
    output = {"dir": given("output_dir", str) or ".", "name": given("output_name", str)}
    filled = {"lora": lora, "train": train, "output": output}
    return {
        # What was written there is unknown to these sections, and is told.
        **{name: {**sections[name], **{k: v for k, v in section.items() if v is not None}} for name, section in filled.items()},
        "dataset": {"cache_dir": ".", "frames": spec.defaults.get("dataset", {}).get("frames", 1) if spec else 1, **sections["dataset"]},
    }
