"""What `accelerate launch` asks for: read from the environment, and taken out of it, so that accelerate wraps nothing.

What is not done here is refused, not ignored: on a CPU accelerate would accept a DeepSpeed configuration and do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from byg_plugin.config.device import resolve_device
from byg_plugin.config.extras import numbers_of, require
from byg_plugin.hosts.sharding import Sharding
from byg_plugin.objectives import make_objective
from byg_plugin.training import deepspeed_settings, fsdp_settings

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config, TrainConfig
    from byg_plugin.models.base import Family

_REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": (
        "Megatron",
        "under which this objective's several backward passes go wrong: run plain multi-GPU (accelerate config)",
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "a parallelism_config",
        "and here every process holds all of the LoRA and trains samples of its own: leave it out",
    ),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo", "inside which the LoRA cannot be taken off: answer NO; on the musubi host set musubi.compile"),
}
_DEEPSPEED = (0, 19, 8)
_PLAIN = ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Which engine trains the LoRA, and how the frozen base is held."""

    stage: int = 0
    """DeepSpeed's ZeRO stage; 1 and 2 are of the LoRA, 3 is of the base."""
    sharding: Sharding = field(default_factory=Sharding)
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """DeepSpeed's configuration, without "auto"."""

    @classmethod
    def of_deepspeed(cls, settings: Mapping[str, Any]) -> Launch:
        """Of a resolved configuration of DeepSpeed."""
        zero = settings["zero_optimization"]
        if zero["stage"] < 3:
            return cls(stage=zero["stage"], deepspeed=settings)
        offload = (zero.get("offload_param") or {}).get("device", "none")
        return cls(stage=3, sharding=Sharding(kind="zero3", offload=offload, deepspeed=settings))

    @property
    def name(self) -> str:
        """For people."""
        offload = f", {self.sharding.offload} offload" if self.sharding.offload != "none" else ""
        return f"ZeRO-{self.stage}{offload}" if self.stage else "FSDP2" + offload if self.sharding else "plain"


def read_launch(config: Config, family: Family | None = None, environment: Mapping[str, str] | None = None) -> Launch:
    """What launcher and configuration ask of this run, before anything is loaded.

    Args:
        config: the whole configuration.
        family: the model family; None: the blocks that FSDP is to wrap are not looked at.
        environment: default: this process's.

    Raises:
        ValueError: it contradicts the configuration, or is not done here.
    """
    environment = os.environ if environment is None else environment
    check_launch("train.mixed_precision", config.train.mixed_precision, environment)
    deepspeed, fsdp = (is_on(environment, f"ACCELERATE_USE_{name}") for name in ("DEEPSPEED", "FSDP"))
    if deepspeed:
        if config.train.sharding != "none":
            raise ValueError(
                f'accelerate launch asks for DeepSpeed, and train.sharding = "{config.train.sharding}": leave train.sharding out, or '
                "launch plain multi-GPU"
            )
        accumulation = config.accumulation(int(environment.get("WORLD_SIZE", "1")))
        launch = _deepspeed(config.train, accumulation, environment)
    elif fsdp:
        launch = Launch(
            sharding=fsdp_settings.asked(environment, "model.gradient_checkpointing", config.model.gradient_checkpointing, family)
        )
        offloads = launch.sharding.offload == "cpu"
        if config.train.sharding == "fsdp2" and config.train.sharding_offload != offloads:
            raise ValueError(
                f"fsdp_offload_params: {str(offloads).lower()}, and train.sharding_offload = {str(not offloads).lower()}: set both to one "
                "value, or leave train.sharding out"
            )
    elif config.train.sharding == "fsdp2":
        launch = Launch(sharding=Sharding(kind="fsdp2", offload="cpu" if config.train.sharding_offload else "none"))
    else:
        launch = Launch()
    check_sharding(config, launch)
    _check_zero(config, launch)
    return launch


def _check_zero(config: Config, launch: Launch) -> None:
    """What DeepSpeed's optimizer of a LoRA in shards does not do."""
    if launch.stage not in (1, 2):
        return
    elsewhere = "launch with stage 3, FSDP2 or plain multi-GPU"
    if len(adapters := make_objective(config.objective).adapters) > 1:
        raise ValueError(
            f"objective.name = {config.objective.name!r}: DeepSpeed {launch.name} trains one set of weights, here are "
            f"{' and '.join(adapters)}; {elsewhere}"
        )
    if config.train.skip_grad_norm:
        raise ValueError(
            f"train.skip_grad_norm = {config.train.skip_grad_norm}: DeepSpeed {launch.name} leaves out no update; set it to 0, or "
            f"{elsewhere}"
        )


def _deepspeed(train: TrainConfig, accumulation: int, environment: Mapping[str, str]) -> Launch:
    settings, origin = deepspeed_settings.asked(environment)
    launch = Launch.of_deepspeed(deepspeed_settings.resolved(settings, origin, deepspeed_settings.Terms.of(train, accumulation)))
    require_deepspeed(launch, origin)
    return launch


def require_deepspeed(launch: Launch, origin: str) -> None:
    """Before anything is loaded: DeepSpeed, and what it needs of the machine.

    Args:
        launch: of DeepSpeed.
        origin: its configuration, for messages.

    Raises:
        ValueError: says what to install.
    """
    require("deepspeed", "accelerate launch asks for DeepSpeed and", "deepspeed", "launch plain multi-GPU")
    # Before it a gradient that is not finite has a norm of 1.
    if numbers_of("deepspeed") < _DEEPSPEED:
        raise ValueError(
            f"accelerate launch asks for DeepSpeed, and this is {version('deepspeed')}: pip install 'deepspeed>=0.19.8', or launch "
            "plain multi-GPU"
        )
    from byg_plugin.hosts import deepspeed

    deepspeed.check_zero(launch.deepspeed or launch.sharding.deepspeed, origin)
    if launch.sharding.offload == "nvme" and not deepspeed.can_use_nvme():
        raise ValueError(
            f'{origin}: zero_optimization.offload_param.device = "nvme" needs what DeepSpeed compiles its async_io with, a C++ compiler, '
            'ninja and libaio\'s headers: apt install g++ ninja-build libaio-dev, or set device to "cpu"'
        )


def check_sharding(config: Config, launch: Launch) -> None:
    """Refuse what cannot be cut into shards, or has no sense beside them.

    Raises:
        ValueError: names the key and what to use instead.
    """
    if not launch.sharding:
        return
    what, model = f"{launch.name} shards the frozen base", config.model
    if launch.sharding.kind == "fsdp2" and not hasattr(torch.distributed.fsdp, "fully_shard"):
        raise ValueError(f"{what}, for which torch {torch.__version__} is too old: install torch 2.6 or later")
    if resolve_device(model.device).type == "cuda" and not torch.distributed.is_nccl_available():
        raise ValueError(
            f"{what} by NCCL, which this torch has not (on Windows no torch has it): leave it out, and where the card is too small set "
            "model.quantization, or train under Linux or WSL"
        )
    if model.quantization in ("int8", "nf4"):
        raise ValueError(f'{what}, model.quantization = "{model.quantization}" cannot be cut: with FSDP2 set it to "fp8", else to "none"')
    if model.quantization == "fp8" and launch.sharding.kind == "zero3":
        raise ValueError(f'{what} and gathers no 8-bit floats, model.quantization is "fp8": launch with FSDP2, or set it to "none"')
    if config.objective.merges_rollout:
        raise ValueError(f'{what}, of which objective.rollout_weights = "merged" would be a whole copy: set it to "swap"')
    if config.lora.forward == "merged":
        raise ValueError(f'{what}, and lora.forward = "merged" reads weights outside the pass that gathers them: set it to "factors"')
    if model.offload_inactive_expert:
        raise ValueError(
            f"{what}, and model.offload_inactive_expert = true moves it whole: leave it out; shards can be offloaded themselves "
            "(train.sharding_offload, offload_param)"
        )


def take_over() -> None:
    """Take the launcher's wishes out of the environment, where `Accelerator` would read and act on them."""
    for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"):
        os.environ.pop(variable, None)


def check_launch(option: str, precision: str | None, environment: Mapping[str, str] | None = None) -> None:
    """Before anything is loaded: what the launcher has left in the environment.

    Args:
        option: the name of the option that sets the mixed precision.
        precision: its value; None: it follows the launcher.
        environment: default: this process's.

    Raises:
        ValueError: the launcher asks for something that is not done here.
    """
    environment = os.environ if environment is None else environment
    for variable, (name, reason) in _REFUSED.items():
        if is_on(environment, variable):
            raise ValueError(f"accelerate launch asks for {name}, {reason}")
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked not in ("no", precision or asked):
        raise ValueError(
            f'accelerate launch asks for mixed precision "{asked}", {option} is "{precision}": set one of them to the other\'s value'
        )


def is_on(environment: Mapping[str, str], variable: str) -> bool:
    """Whether a variable of the launcher's says yes."""
    return environment.get(variable, "").upper() not in ("", "0", "NO", "FALSE")


def check_processes(accelerator: Any) -> None:
    """Once there is an accelerator, which knows more kinds of processes than the environment shows.

    Raises:
        ValueError: they are not plain ones.
    """
    assert not any(is_on(os.environ, f"ACCELERATE_USE_{name}") for name in ("DEEPSPEED", "FSDP")), "taken over before"
    kind = accelerator.distributed_type.value
    if kind not in _PLAIN:
        raise ValueError(f"accelerate launch asks for {kind}, which is not done here: run plain multi-GPU (accelerate config)")
