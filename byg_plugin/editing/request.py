"""The configuration of an edit: what the LoRA's card says of its training, over a training configuration or none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from byg_plugin import families
from byg_plugin.lora.card import KEYS, STOCHASTIC, LoraCard

if TYPE_CHECKING:
    from torch import Tensor

    from byg_plugin.config.sections import Config

NO_MODEL = "name the base model: --model FOLDER_OR_HUB_ID, or --config with a [model] section"
_NEEDED = ("family", "position", "guidance", "max_text_tokens", "resolution")
_OPTIONS = {
    "guidance": "--guidance",
    "cfg_high_noise": "--cfg-high",
    "cfg_low_noise": "--cfg-low",
    "negative": "--negative",
    "solver": "--solver",
}


def sections_of(card: LoraCard, config: Config | None, model: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of an edit's configuration, without `[lora]`; `model` stands above the configuration's `[model]`.

    Raises:
        ValueError: there is no base model, the card lacks something, or it is for another family.
    """
    if config is None and "path" not in model:
        raise ValueError(NO_MODEL)
    if missing := [KEYS[name] for name in _NEEDED if getattr(card, name) is None]:
        raise ValueError(
            f"the LoRA's metadata lacks {', '.join(missing)}: it was not made by byg_plugin, or a tool dropped them; "
            f"how its source tokens are placed is unknown"
        )
    family = card.family
    if family not in families.SPECS:
        raise ValueError(f"the LoRA was trained for {family!r}, which is unknown here; known: {', '.join(families.SPECS)}")
    if config is None:
        raw: dict[str, Any] = {"model": {"family": family}, "dataset": {"tuples": ".", "cache_dir": "."}, "output": {"dir": "."}}
        raw["sample"] = {}
    else:
        raw = _given_sections(config)
    if family != (expected := raw["model"]["family"]):
        raise ValueError(f"the LoRA was trained for {family!r}, the base model is {expected!r}")
    if card.sampler is None and raw["sample"].get("solver") == STOCHASTIC:
        raw["sample"] = _own_sampler(raw["sample"])
    if card.schedule is not None:
        raw["sample"]["schedule"] = card.schedule
    raw["sample"] |= _few_steps_of(card)
    raw["conditioning"] = {"position": card.position, **_guidance_of(card), "max_text_tokens": card.max_text_tokens}
    raw["dataset"]["resolution"] = card.resolution
    boundary = {} if card.boundary is None else {"boundary": card.boundary}
    return _of_an_edit(raw, config, model, boundary)


def sections_of_base(config: Config, model: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of an edit by the base alone, without `[lora]`'s file; `model` stands above the configuration's `[model]`."""
    raw = _given_sections(config)
    if config.sample.solver == STOCHASTIC:  # of the editor that is trained for it; the base has its family's own
        raw["sample"] = _own_sampler(raw["sample"])
    raw["conditioning"] = config.conditioning.model_dump()
    raw["lora"] = {"rank": 1}  # a host has one; here it stays out of every pass
    return _of_an_edit(raw, config, model, {})


def _own_sampler(sample: Mapping[str, Any]) -> dict[str, Any]:
    """`[sample]` without the sampler of a few-step editor: the family's own stands in its place."""
    return {key: sample[key] for key in ("every", "items", "seed", "weights")}


def _given_sections(config: Config) -> dict[str, Any]:
    raw = config.model_dump(include={"model", "dataset", "sample", "output"})
    if config.model.host != "diffusers":  # edits are made by the embedded host, whatever has trained
        raw["model"] |= {"host": "diffusers", "host_path": None}
    return raw


def _of_an_edit(raw: dict[str, Any], config: Config | None, model: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    section = raw["model"]
    if "path" in model:
        section |= dict.fromkeys((*families.EXPERT_SUFFIXES, "vae", *families.TEXT_ENCODERS))
    raw["model"] = section | model | {"gradient_checkpointing": False} | more
    raw["dataset"] |= native_size(section["family"])
    raw["objective"] = {"ema_decay": 0.0}
    precision = "no" if raw["model"].get("dtype") == "float32" else "bf16"
    if config and "dtype" not in model:  # a dtype that is asked for is that of the passes too
        precision = config.train.mixed_precision
    raw["train"] = {"steps": 1, "mixed_precision": precision}
    return raw


def lora_section(tensors: Mapping[str, Tensor], family: str) -> dict[str, Any]:
    """The `[lora]` section that fits the tensors of a file or a pair.

    Raises:
        ValueError: they have several ranks.
    """
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise ValueError(f"the LoRA mixes ranks {sorted(ranks)}; LoRAs of byg_plugin have one")
    modules = sorted({name.partition(".")[2].rpartition(".lora_")[0] for name in tensors})
    shared = families.named(family).has_experts and len({name.partition(".")[0] for name in tensors}) == 1
    experts = {"experts": "shared"} if shared else {}
    return {"rank": ranks.pop(), "targets": "|".join(re.escape(module) for module in modules), **experts}


# --- where families differ ---


def refuse_unused(family: str, given: Mapping[str, Any]) -> None:
    """What a family has no use for is an error, not an option without effect.

    Raises:
        ValueError: names the keyword, the command's option and what the family has instead.
    """
    spec = families.named(family)
    if spec.guidance == "classifier_free":
        foreign = ["guidance", *([] if spec.has_experts else ["cfg_low_noise"])]
        remedy = "its guidance is cfg_high_noise (--cfg-high)" + (" and cfg_low_noise (--cfg-low)" if spec.has_experts else "")
    else:
        foreign = ["cfg_high_noise", "cfg_low_noise", "negative"]
        remedy = "its guidance is the embedding, guidance (--guidance)"
    if given.get("solver") not in (None, "auto", "euler", STOCHASTIC, *spec.solvers):
        foreign.append("solver")
    if unused := [f"{name} ({_OPTIONS[name]}) = {given[name]!r}" for name in foreign if given.get(name) is not None]:
        raise ValueError(f"{', '.join(unused)}: not for {family}, leave it out; {remedy}")


def guidance_scales(config: Config) -> dict[str, float]:
    """Scales of classifier-free guidance, for the settings in a result; empty for a family that takes guidance as an input."""
    if config.model.spec.guidance != "classifier_free":
        return {}
    return {"cfg_high_noise": config.cfg_at(True), "cfg_low_noise": config.cfg_at(False)}


def _guidance_of(card: LoraCard) -> dict[str, Any]:
    """Without the embedding, what stood in the configuration was not used."""
    return {"guidance": card.guidance} if families.named(str(card.family)).guidance == "embedding" else {}


def _few_steps_of(card: LoraCard) -> dict[str, Any]:
    """`[sample]` of a LoRA that was trained for few steps of its own sampler.

    Raises:
        ValueError: the sampler is unknown here.
    """
    if card.sampler is None:
        return {}
    if card.sampler != STOCHASTIC or card.steps is None:
        raise ValueError(
            f"its metadata say {KEYS['sampler']} = {card.sampler!r} and {KEYS['steps']} = {card.steps}: this version samples "
            f'"{STOCHASTIC}" in a number of steps; update byg_plugin'
        )
    spec = families.named(str(card.family))
    guided = {"cfg_high_noise": spec.unguided, "negative": None} if spec.guidance == "classifier_free" else {}
    return {"solver": card.sampler, "steps": card.steps, **guided}


def refuse_guided(card: LoraCard, given: Mapping[str, Any]) -> None:
    """Few-step LoRAs are trained without guidance.

    Raises:
        ValueError: names the keyword and the command's option.
    """
    keys = ("cfg_high_noise", "cfg_low_noise", "negative")
    if card.sampler is not None and (guided := [key for key in keys if given.get(key) is not None]):
        raise ValueError(
            f"{guided[0]} ({_OPTIONS[guided[0]]}) = {given[guided[0]]!r}: this LoRA edits in {card.steps} steps without guidance, leave it "
            "out"
        )


def native_size(family: str) -> dict[str, Any]:
    """A family with a native size edits at it, instead of the resolution that was trained."""
    native = families.named(family).native
    return {} if native is None else {"resolution": native, "bucket_step": 32}
