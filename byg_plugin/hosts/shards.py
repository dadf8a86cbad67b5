"""Ways to cut the frozen base, by name."""

from __future__ import annotations

import torch

from byg_plugin.hosts.sharding import Sharding, Shards


def make_shards(sharding: Sharding, device: torch.device) -> Shards:
    """The one that `sharding` names; the process group is there."""
    if sharding.kind == "fsdp2":
        from byg_plugin.hosts.fsdp2 import Fsdp2Shards

        return Fsdp2Shards(device, offload=sharding.offload == "cpu")
    from byg_plugin.hosts.zero3 import Zero3Shards

    return Zero3Shards(device, sharding.deepspeed)
