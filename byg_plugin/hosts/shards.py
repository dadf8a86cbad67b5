"""Ways to cut the frozen base, by name."""

from __future__ import annotations

import torch
import torch.distributed as dist

from byg_plugin.hosts.sharding import Sharding, Shards


def make_shards(sharding: Sharding, device: torch.device) -> Shards:
    """The one that `sharding` names. A process alone, which no launcher has given a group, gets one of its own."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if sharding.kind == "fsdp2":
        from byg_plugin.hosts.fsdp2 import Fsdp2Shards

        return Fsdp2Shards(device, offload=sharding.offload == "cpu")
    from byg_plugin.hosts.zero3 import Zero3Shards

    return Zero3Shards(device, sharding.deepspeed)
