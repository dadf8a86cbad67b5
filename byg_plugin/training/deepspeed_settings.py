"""What a person's DeepSpeed configuration says: honoured, or refused with what to use instead. "auto" is the TOML's value.

It comes as a ds_config.json (`--deepspeed_config_file`, or `deepspeed_config_file:` in accelerate's YAML) or as the answers of
`accelerate config`, which the launcher leaves in the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byg_plugin.documents import json_value, utf8

if TYPE_CHECKING:
    from byg_plugin.config.sections import TrainConfig

_INTERVAL = 10**9  # steps between DeepSpeed's own prints; the loop has a log
# DeepSpeed's sizes in elements. accelerate takes "auto" from the hidden size, which diffusers' networks do not name.
_AUTO_SIZES = {
    "reduce_bucket_size": 50_000_000,
    "allgather_bucket_size": 50_000_000,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
# Of the base's shards: nothing is fetched before its layer and nothing stays after it, unless the file says so.
_STAGE_3 = {
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
}
_PASSED_ON = {"communication_data_type", "prescale_gradients", "gradient_predivide_factor", "aio", "comms_logger", "dump_state"}
_IGNORED = {"steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"}
_REFUSED = {
    "optimizer": "the optimizer is train.optimizer",
    "scheduler": "the schedule is train.lr_schedule and train.lr_warmup_steps",
    "activation_checkpointing": "that is model.gradient_checkpointing",
    "tensorboard": "that is train.tracker",
    "wandb": "that is train.tracker",
}


def asked(environment: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """The configuration as given, and what to call it in a message.

    Raises:
        ValueError: the file is missing or no JSON object.
    """
    if (path := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        return _read(Path(path)), path
    zero: dict[str, Any] = {"stage": int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
    for part in ("optimizer", "param"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device != "none":
            folder = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_NVME_PATH", "none")
            zero[f"offload_{part}"] = {"device": device, **({"nvme_path": folder} if folder != "none" else {})}
    settings: dict[str, Any] = {"zero_optimization": zero}
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if steps not in ("auto", "1"):  # the launcher always sends one: 1 may be nobody's choice
        settings["gradient_accumulation_steps"] = int(steps) if steps.isdigit() else steps
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto")
    if clipping != "auto":
        settings["gradient_clipping"] = float(clipping)
    return settings, "accelerate's deepspeed_config"


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"deepspeed_config_file = {path}: no such file")
    try:
        found = json_value(utf8(path.read_bytes()))
    except ValueError as error:
        raise ValueError(f"deepspeed_config_file = {path}: not JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("zero_optimization"), dict):
        raise ValueError(f'deepspeed_config_file = {path}: has no "zero_optimization": name the stage there, e.g. {{"stage": 2}}')
    return found


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What the run's own configuration says of the same things: (the name it has there, the value; None: not known beforehand)."""

    batch_size: tuple[str, int | None]
    """Of a process and micro-step."""
    global_batch_size: tuple[str, int | None]
    accumulation: tuple[str, int]
    max_grad_norm: tuple[str, float]
    mixed_precision: tuple[str, str | None]
    optimizer: tuple[str, str]

    @classmethod
    def of(cls, train: TrainConfig, accumulation: int) -> Terms:
        """Of the embedded host.

        Args:
            train: the `[train]` section.
            accumulation: micro-steps of an optimizer step.
        """
        return cls(
            batch_size=("train.batch_size", train.batch_size),
            global_batch_size=("train.global_batch_size", train.global_batch_size),
            accumulation=("train.global_batch_size / (processes x train.batch_size)", accumulation),
            max_grad_norm=("train.max_grad_norm", train.max_grad_norm),
            mixed_precision=("train.mixed_precision", train.mixed_precision),
            optimizer=("train.optimizer", train.optimizer),
        )

    @property
    def agreeing(self) -> dict[str, tuple[str, Any]]:
        """By DeepSpeed's key."""
        return {
            "train_micro_batch_size_per_gpu": self.batch_size,
            "train_batch_size": self.global_batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.max_grad_norm,
        }


_AGREEING = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "gradient_clipping")


def resolved(settings: Mapping[str, Any], origin: str, terms: Terms) -> dict[str, Any]:
    """DeepSpeed's configuration for this run, without "auto".

    Args:
        settings: as given.
        origin: its file, for messages.
        terms: what the run's configuration says.

    Raises:
        ValueError: a key contradicts that, or is not done here; names both keys.
    """
    _refuse_unknown(settings, origin)
    _refuse_contradictions(settings, origin, terms)
    zero = dict(settings["zero_optimization"])
    stage = zero.get("stage")
    if type(stage) is not int or stage not in (1, 2, 3):
        raise ValueError(f"{origin}: zero_optimization.stage = {stage!r}: give 1, 2 or 3; without ZeRO, launch plain multi-GPU")
    zero = {key: _AUTO_SIZES[key] if value == "auto" and key in _AUTO_SIZES else value for key, value in zero.items()}
    for part in ("offload_param", "offload_optimizer"):
        if not isinstance(zero.get(part) or {}, Mapping):
            raise ValueError(f'{origin}: zero_optimization.{part} = {zero[part]!r}: give a block, e.g. {{"device": "cpu"}}')
        if (zero.get(part) or {"device": "none"}).get("device") in (None, "none"):
            zero.pop(part, None)
    for key, value in zero.items():
        if value == "auto":
            raise ValueError(f'{origin}: zero_optimization.{key} = "auto": here it has no value to follow; leave it out or give a number')
    zero = _of_stage_3(zero, origin) if stage == 3 else _of_stages_1_and_2(zero, origin, terms)
    return {
        **{key: value for key, value in settings.items() if key in _PASSED_ON},
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": terms.batch_size[1] or 1,
        "gradient_accumulation_steps": terms.accumulation[1],
        "gradient_clipping": terms.max_grad_norm[1],
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own Adam would be compiled, and is not train.optimizer
        "steps_per_print": _INTERVAL,
    }


def _refuse_unknown(settings: Mapping[str, Any], origin: str) -> None:
    known = {"zero_optimization", "fp16", "bf16", *_PASSED_ON, *_IGNORED, *_AGREEING}
    for key, value in settings.items():
        if key not in known and not (isinstance(value, Mapping) and value.get("enabled") is False):
            raise ValueError(f"{origin}: {key}: {_REFUSED.get(key, 'it is not done here')}; leave it out")


def _refuse_contradictions(settings: Mapping[str, Any], origin: str, terms: Terms) -> None:
    for key, (own, value) in terms.agreeing.items():
        given = settings.get(key, "auto")
        if given != "auto" and value is None:
            raise ValueError(f'{origin}: {key} = {given!r}, which {own} decides: set {key} to "auto"')
        if given not in ("auto", value):
            raise ValueError(f'{origin}: {key} = {given!r}, and {own} = {value}: set {key} to "auto", or both to one value')
    own, precision = terms.mixed_precision
    fp16, bf16 = (_enabled(settings, kind) for kind in ("fp16", "bf16"))
    for kind, given in (("fp16", fp16), ("bf16", bf16)):
        if given is not None and given != (precision == kind):
            raise ValueError(
                f'{origin}: {kind}.enabled = {str(given).lower()}, and {own} = "{precision}": set {kind}.enabled to "auto", or both to one '
                "value"
            )


def _enabled(settings: Mapping[str, Any], kind: str) -> bool | None:
    block = settings.get(kind)
    found = block.get("enabled", "auto") if isinstance(block, Mapping) else "auto"
    return None if found == "auto" else bool(found)


def _of_stages_1_and_2(zero: dict[str, Any], origin: str, terms: Terms) -> dict[str, Any]:
    own, optimizer = terms.optimizer
    if optimizer != "adamw":
        raise ValueError(
            f'{origin}: zero_optimization.stage = {zero["stage"]} cuts the LoRA into flat pieces, which {own} = "{optimizer}" does not '
            f'step as whole matrices: set {own} = "adamw", or stage 3, which shards the frozen base'
        )
    if "offload_param" in zero:
        raise ValueError(f"{origin}: zero_optimization.offload_param is for stage 3, the stage is {zero['stage']}: leave it out")
    if (zero.get("offload_optimizer") or {"device": "cpu"})["device"] != "cpu":
        raise ValueError(f'{origin}: zero_optimization.offload_optimizer.device = {zero["offload_optimizer"]["device"]!r}: give "cpu"')
    if zero.get("round_robin_gradients"):
        raise ValueError(f"{origin}: zero_optimization.round_robin_gradients is not done here: leave it out")
    # Of stage 3, in files that are written for every stage.
    return {key: value for key, value in zero.items() if not key.startswith("stage3_")}


def _of_stage_3(zero: dict[str, Any], origin: str) -> dict[str, Any]:
    if "offload_optimizer" in zero:
        raise ValueError(
            f"{origin}: zero_optimization.offload_optimizer: with stage 3 the frozen base is sharded and the LoRA's optimizer stays whole "
            "on every device, under 1 GB: leave it out"
        )
    offload = zero.get("offload_param") or {}
    if offload.get("device", "cpu") not in ("cpu", "nvme"):
        raise ValueError(f'{origin}: zero_optimization.offload_param.device = {offload["device"]!r}: give "cpu", "nvme" or "none"')
    folder = str(offload.get("nvme_path") or "")
    if offload.get("device") == "nvme" and not (folder and Path(folder).is_dir()):
        raise ValueError(
            f'{origin}: zero_optimization.offload_param.device = "nvme", and nvme_path = {folder!r} is no folder: give one on a fast '
            "local disk"
        )
    if zero.get("memory_efficient_linear"):
        raise ValueError(
            f"{origin}: zero_optimization.memory_efficient_linear = true keeps the inputs of frozen linears for the backward pass and "
            "replaces torch's linear in the whole process: leave it out"
        )
    return {**_STAGE_3, **zero, "memory_efficient_linear": False}
