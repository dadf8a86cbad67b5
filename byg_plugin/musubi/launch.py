"""What the launcher asks of this host: plain processes, or its frozen base in shards; its LoRA and optimizer stay the host's own.

The host has no DeepSpeed path: its `prepare` and `backward` go wrong under one. So the base is cut where it has been loaded, and
accelerate wraps nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from byg_plugin import families
from byg_plugin.training import deepspeed_settings, fsdp_settings
from byg_plugin.training.launch import Launch, check_launch, is_on, require_deepspeed

if TYPE_CHECKING:
    from byg_plugin.config.sections import ModelConfig


def read_host_launch(model: ModelConfig, args: Any, environment: Mapping[str, str] | None = None) -> Launch:
    """As `training.launch.read_launch` for the embedded host.

    Args:
        model: the `[model]` section.
        args: the host's arguments.
        environment: default: this process's.

    Raises:
        ValueError: it contradicts the configuration, or is not done here.
    """
    environment = os.environ if environment is None else environment
    check_launch("musubi.mixed_precision", args.mixed_precision, environment)
    if is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        settings, origin = deepspeed_settings.asked(environment)
        launch = Launch.of_deepspeed(deepspeed_settings.resolved(settings, origin, _terms(args)))
        if launch.stage < 3:
            raise ValueError(
                f"{origin}: zero_optimization.stage = {launch.stage} shards the LoRA's optimizer, which is the host's own: set stage 3, "
                "which shards the frozen base"
            )
        require_deepspeed(launch, origin)
    elif is_on(environment, "ACCELERATE_USE_FSDP"):
        launch = Launch(sharding=fsdp_settings.asked(environment, "musubi.gradient_checkpointing", bool(args.gradient_checkpointing)))
    else:
        return Launch()
    _check(model, args, launch)
    return launch


def _terms(args: Any) -> deepspeed_settings.Terms:
    return deepspeed_settings.Terms(
        batch_size=("musubi.dataset_config", None),
        global_batch_size=("musubi.dataset_config", None),
        accumulation=("musubi.gradient_accumulation_steps", args.gradient_accumulation_steps),
        max_grad_norm=("musubi.max_grad_norm", args.max_grad_norm),
        mixed_precision=("musubi.mixed_precision", args.mixed_precision),
        optimizer=("musubi.optimizer_type", "adamw"),
    )


def _check(model: ModelConfig, args: Any, launch: Launch) -> None:
    what = f"{launch.name} shards the frozen base"
    if families.named(model.family).has_experts:
        raise ValueError(f'{what}, and musubi-tuner exchanges the two experts\' weights whole: set model.host = "diffusers"')
    for option, remedy in (
        ("blocks_to_swap", "shards can be offloaded themselves (fsdp_offload_params, offload_param): leave it out"),
        ("fp8_base", "the host casts it whole: leave it out"),
        ("compile", "which is compiled whole: leave it out"),
        ("sample_prompts", "the host shares the previews out among the processes, of which each needs all: leave it out"),
    ):
        if getattr(args, option, None):
            raise ValueError(f"{what}, and musubi.{option} = {getattr(args, option)!r}: {remedy}")
