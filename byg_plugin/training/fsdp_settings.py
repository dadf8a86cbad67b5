"""What a person's FSDP configuration (`accelerate config`) says of the frozen base: honoured, or refused with what to use instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from byg_plugin.hosts.sharding import Sharding, blocks_of

if TYPE_CHECKING:
    from byg_plugin.models.base import Family

_NONE = ("", "NONE", "NULL")


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

    if said("VERSION") != "2":
        raise ValueError(
            f"fsdp_version = {said('VERSION') or '1'}: FSDP1 wraps what this objective changes between passes; set fsdp_version: 2"
        )
    if said("RESHARD_AFTER_FORWARD") in ("FALSE", "NO_SHARD", "SHARD_GRAD_OP"):
        raise ValueError(
            "fsdp_reshard_after_forward: false keeps the whole base on every device: set it to true, or launch plain multi-GPU"
        )
    if said("AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP":
        raise ValueError("fsdp_auto_wrap_policy: SIZE_BASED_WRAP: every transformer block is a unit here; set TRANSFORMER_BASED_WRAP")
    if said("IGNORED_MODULES") not in _NONE:
        raise ValueError("fsdp_ignored_modules: the LoRA alone is left out of the shards; leave it out")
    if said("ACTIVATION_CHECKPOINTING") == "TRUE" and not is_checkpointing:
        raise ValueError(f"fsdp_activation_checkpointing: true, and {checkpointing} = false: set both to one value")
    if said("ACTIVATION_CHECKPOINTING_OFFLOAD") == "TRUE":
        raise ValueError("fsdp_activation_checkpointing_offload: true is not done here: set it to false")
    named = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    if family is not None and named.upper() not in _NONE:
        _check_blocks({name.strip() for name in named.split(",")}, family)
    return Sharding(kind="fsdp2", offload="cpu" if said("OFFLOAD_PARAMS") == "TRUE" else "none")


def _check_blocks(named: set[str], family: Family) -> None:
    blocks = {type(block).__name__ for network in family.meta_transformers().values() for block in blocks_of(network)}
    if named != blocks:
        raise ValueError(
            f"fsdp_transformer_layer_cls_to_wrap: {', '.join(sorted(named))}: the units of {family.name} are {', '.join(sorted(blocks))}; "
            "name these, or leave it out"
        )
