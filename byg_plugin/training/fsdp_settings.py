"""What a person's FSDP configuration (`accelerate config`) says of the frozen base: honoured, or refused with what to use instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from byg_plugin.hosts.blocks import blocks_of
from byg_plugin.hosts.sharding import Sharding

if TYPE_CHECKING:
    from byg_plugin.models.base import Family

_NONE = ("", "NONE", "NULL")
_TRUE, _FALSE = ("TRUE", "1", "YES", "Y", "ON", "T"), ("FALSE", "0", "NO", "N", "OFF", "F")


def asked(environment: Mapping[str, str], checkpointing: str, is_checkpointing: bool, family: Family | None = None) -> Sharding:
    """The sharding that the launcher has left in the environment.

    What says nothing of shards is accepted: how accelerate would save (files are those of one process), load (the first process reads)
    and name parameters.

    Args:
        environment: of the process.
        checkpointing: the key that recomputes activations.
        is_checkpointing: its value.
        family: knows the blocks that may be named; None: not looked at.

    Raises:
        ValueError: it asks for what is not done here; names the key.
    """

    def said(name: str) -> str:
        return environment.get(f"FSDP_{name}", "").upper()

    def is_true(key: str) -> bool | None:
        name = key.removeprefix("fsdp_").upper()
        if said(name) not in (*_NONE, *_TRUE, *_FALSE):
            raise ValueError(f"{key}: {environment[f'FSDP_{name}']}: give true or false")
        return None if said(name) in _NONE else said(name) in _TRUE

    if said("VERSION") != "2":
        raise ValueError(
            f"fsdp_version = {said('VERSION') or '1'}: FSDP1 wraps what this objective changes between passes; set fsdp_version: 2"
        )
    if said("SHARDING_STRATEGY") not in (*_NONE, "1", "FULL_SHARD"):
        raise ValueError(f"fsdp_sharding_strategy: {said('SHARDING_STRATEGY')} is FSDP1's: leave it out")
    # FSDP1's names of strategies, which accelerate takes here too.
    if said("RESHARD_AFTER_FORWARD") != "FULL_SHARD" and (
        said("RESHARD_AFTER_FORWARD") in ("NO_SHARD", "SHARD_GRAD_OP") or is_true("fsdp_reshard_after_forward") is False
    ):
        raise ValueError(
            "fsdp_reshard_after_forward: false keeps the whole base on every device: set it to true, or launch plain multi-GPU"
        )
    if said("AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP":
        raise ValueError("fsdp_auto_wrap_policy: SIZE_BASED_WRAP: every transformer block is a unit here; set TRANSFORMER_BASED_WRAP")
    if said("IGNORED_MODULES") not in _NONE:
        raise ValueError("fsdp_ignored_modules: the LoRA alone is left out of the shards; leave it out")
    if is_true("fsdp_activation_checkpointing") and not is_checkpointing:
        raise ValueError(f"fsdp_activation_checkpointing: true, and {checkpointing} = false: set both to one value")
    if is_true("fsdp_activation_checkpointing_offload"):
        raise ValueError("fsdp_activation_checkpointing_offload: true is not done here: set it to false")
    named = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    if family is not None and named.upper() not in _NONE:
        _check_blocks({name.strip() for name in named.split(",")}, family)
    return Sharding(kind="fsdp2", offload="cpu" if is_true("fsdp_offload_params") else "none")


def _check_blocks(named: set[str], family: Family) -> None:
    blocks = {type(block).__name__ for network in family.meta_transformers().values() for block in blocks_of(network)}
    if named != blocks:
        raise ValueError(
            f"fsdp_transformer_layer_cls_to_wrap: {', '.join(sorted(named))}: the units of {family.name} are {', '.join(sorted(blocks))}; "
            "name these, or leave it out"
        )
