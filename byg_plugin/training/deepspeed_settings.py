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

_ANSWERS = "accelerate's deepspeed_config"
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
_PASSED_ON = {"aio", "comms_logger"}  # blocks
_IGNORED = {"steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"}
_REFUSED = {
    "optimizer": "the optimizer is train.optimizer",
    "scheduler": "the schedule is train.lr_schedule and train.lr_warmup_steps",
    "activation_checkpointing": "that is model.gradient_checkpointing",
    "tensorboard": "that is train.tracker",
    "wandb": "that is train.tracker",
}
# Of zero_optimization: what counts on the network's own weights being trained, or wraps the whole model at once.
_REFUSED_OF_ZERO = (
    *("zero_hpz_partition_size", "mics_shard_size", "mics_hierarchical_params_gather", "legacy_stage1", "zenflow"),
    *("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients"),
)
# The launcher's own answers, which it ignores beside a file.
_BESIDE_A_FILE = {
    *("gradient_accumulation_steps", "gradient_clipping", "zero_stage", "offload_optimizer_device", "offload_param_device"),
    *("offload_optimizer_nvme_path", "offload_param_nvme_path", "mixed_precision"),
}


def asked(environment: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """The configuration as given, and what to call it in a message.

    Raises:
        ValueError: the file is missing or no JSON object.
    """
    if (path := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        said = {name.strip() for name in environment.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")} & _BESIDE_A_FILE
        if said:
            raise ValueError(
                f"accelerate's deepspeed_config: {', '.join(sorted(said))} beside deepspeed_config_file = {path}: say it there"
            )
        return _read(Path(path)), path
    zero: dict[str, Any] = {"stage": _number(environment, "ACCELERATE_DEEPSPEED_ZERO_STAGE", "zero_stage", "2", int)}
    for part in ("optimizer", "param"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device != "none":
            folder = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_NVME_PATH", "none")
            zero[f"offload_{part}"] = {"device": device, **({"nvme_path": folder} if folder != "none" else {})}
    settings: dict[str, Any] = {"zero_optimization": zero}
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    if steps not in ("auto", "1"):  # the launcher always sends one: 1 may be nobody's choice
        settings["gradient_accumulation_steps"] = int(steps) if steps.isdigit() else steps
    if environment.get("ACCELERATE_GRADIENT_CLIPPING", "auto") != "auto":
        settings["gradient_clipping"] = _number(environment, "ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping", "", float)
    return settings, _ANSWERS


def _number(environment: Mapping[str, str], variable: str, key: str, default: str, kind: type[int] | type[float]) -> Any:
    value = environment.get(variable, default)
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f'{_ANSWERS}: {key} = {value!r}: give a number, or "auto"') from None


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
        if key in _PASSED_ON and not isinstance(value, Mapping):
            raise ValueError(f"{origin}: {key} = {value!r}: give a block")
        if key not in known and not _asks_nothing(value):
            raise ValueError(f"{origin}: {key}: {_REFUSED.get(key, 'it is not done here')}; leave it out")
    zero = settings["zero_optimization"]
    for key in (key for key in _REFUSED_OF_ZERO if not _asks_nothing(zero.get(key))):
        if type(zero[key]) is not int or zero[key] > 1:  # a partition of 1 is none
            raise ValueError(f"{origin}: zero_optimization.{key} is not done here: leave it out")


def _asks_nothing(value: Any) -> bool:
    """A switch, or a block, that is off."""
    return value is None or value is False or (isinstance(value, Mapping) and value.get("enabled") is False)


def _refuse_contradictions(settings: Mapping[str, Any], origin: str, terms: Terms) -> None:
    for key, (own, value) in terms.agreeing.items():
        given = settings.get(key, "auto")
        if given != "auto" and value is None:
            raise ValueError(f'{origin}: {key} = {given!r}, which {own} decides: set {key} to "auto"')
        if given not in ("auto", value):
            raise ValueError(f'{origin}: {key} = {given!r}, and {own} = {value}: set {key} to "auto", or both to one value')
    own, precision = terms.mixed_precision
    for kind in ("fp16", "bf16"):
        given = _enabled(settings, kind, origin)
        if given is not None and given != (precision == kind):
            raise ValueError(
                f'{origin}: {kind}.enabled = {str(given).lower()}, and {own} = "{precision}": set {kind}.enabled to "auto", or both to one '
                "value"
            )


def _enabled(settings: Mapping[str, Any], kind: str, origin: str) -> bool | None:
    block = settings.get(kind) or {"enabled": "auto"}
    found = block.get("enabled", "auto") if isinstance(block, Mapping) else block
    if not isinstance(block, Mapping) or not (found == "auto" or isinstance(found, bool)):
        raise ValueError(f'{origin}: {kind} = {block!r}: give a block, {{"enabled": true}}, false or "auto"')
    for key in block.keys() & {"bf16_master_weights_and_grads", "bf16_optimizer_states", "immediate_grad_update"}:
        if block[key]:
            raise ValueError(f"{origin}: {kind}.{key}: the LoRA and its optimizer stay float32; leave it out")
    return None if found == "auto" else found


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
