"""The frozen base under torch's FSDP2: each block is gathered for its own pass and freed after it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from byg_plugin.hosts.blocks import blocks_of
from byg_plugin.hosts.sharding import hand_on


class Fsdp2Shards:
    """See `sharding.Shards`.

    Args:
        device: where the blocks are computed.
        offload: the shards stay in main memory and come one block at a time.
    """

    def __init__(self, device: torch.device, *, offload: bool):
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

        # Blocks return views of one sequence. Nothing writes into what a block returns, and equality to one process is tested.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self.device = device
        self._where = torch.device("cpu") if offload else device
        self._mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        self._policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()

    def cut(self, network: nn.Module) -> None:
        """See `Shards`. Block by block: of the next one nobody but the first process holds anything yet."""
        from torch.distributed.fsdp import fully_shard

        blocks = blocks_of(network)
        inside = {id(module) for block in blocks for module in block.modules()}
        # Embedders and head too: what is the root's own stays gathered through the whole pass.
        rest = [child for child in _callable(network) if not inside & {id(module) for module in child.modules()}]
        done: set[int] = set()
        for unit in [*blocks, *(child for child in rest if any(True for _ in child.parameters())), network]:
            for module in (module for module in unit.modules() if id(module) not in done):
                hand_on(module, self.device, self._where)
                done.add(id(module))
            name = type(unit).__name__
            fully_shard(unit, mesh=self._mesh, reshard_after_forward=True, offload_policy=self._policy)
            # Its class is one of FSDP2's now; musubi-tuner looks for blocks by the name.
            type(unit).__name__ = name
            # Itself, which is there: FSDP2 would fetch the block before, and hold two.
            unit.set_modules_to_backward_prefetch([unit])

    def after_backward(self) -> None:
        """FSDP2 frees its blocks itself."""


def _callable(network: nn.Module) -> Iterator[nn.Module]:
    """The children; of a list or dictionary, which has no forward pass of its own, what it holds."""
    for child in network.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _callable(child)
        else:
            yield child
