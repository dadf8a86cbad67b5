"""The frozen base in shards over the processes. The LoRA, its average and its optimizer are whole on every process.

The base is cut before the LoRA is injected: what comes later is no part of the shards. It is read by the first process alone and
handed on piece by piece, so that every other process holds its shards and one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How the frozen base is held."""

    kind: Literal["none", "fsdp2", "zero3"] = "none"
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where the shards lie while they are not in use."""
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    """DeepSpeed's configuration for `zero3`, without "auto"."""

    def __bool__(self) -> bool:
        return self.kind != "none"


class Shards(Protocol):
    """Cuts networks, and knows what a step leaves behind."""

    def cut(self, network: nn.Module) -> None:
        """Leave this process its shards. On all processes but the first the weights are on the meta device before."""
        ...

    def after_backward(self) -> None:
        """Free what a backward pass has left whole."""
        ...


# --- reading once, handing on ---


def read_on_first(read: Iterator[tuple[str, nn.Module]], shapes: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The experts: with weights on the first process, on the meta device elsewhere.

    Args:
        read: reads one when it is asked for.
        shapes: the same on the meta device.
    """
    if dist.get_rank() == 0:
        yield from read
    else:
        yield from ((name, network.eval().requires_grad_(False)) for name, network in shapes.items())


def agree_on_types(network: nn.Module) -> None:
    """Dtypes of the first process's weights everywhere: a file may keep some of them in float32."""
    named = dict(_tensors_of(network))
    said: list[Any] = [{name: tensor.dtype for name, tensor in named.items()}]
    dist.broadcast_object_list(said, src=0)
    assert said[0].keys() == named.keys(), "the network on the meta device has the modules of the one that was read"
    for module_name, module in network.named_modules():
        for name, tensor in _own_tensors(module):
            full = f"{module_name}.{name}".lstrip(".")
            if tensor.is_meta and tensor.dtype != said[0][full]:
                _put(module, name, tensor.to(said[0][full]))


def hand_on(module: nn.Module, device: torch.device, where: torch.device) -> None:
    """The first process's weights and buffers of one module, without those of its children, on every process.

    Args:
        module: on the meta device elsewhere.
        device: whose memory the processes' backend sends from.
        where: the weights' device afterwards.
    """
    for name, tensor in _own_tensors(module):
        sent = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.detach().to(device).contiguous()
        # As bytes: not every backend knows 8-bit floats.
        dist.broadcast(sent.reshape(-1).view(torch.uint8), src=0)
        _put(module, name, sent.to(where))


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[name] = value


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _tensors_of(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


# --- what is held ---


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a weight; one that is not sharded as it is."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor.detach()
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()


def bytes_held(networks: Sequence[nn.Module]) -> tuple[int, int]:
    """(bytes of the frozen weights that this process holds now, bytes of them whole), without the LoRA."""
    held = whole = 0
    for network in networks:
        for here, everywhere in _by_fsdp2(network) or _by_parameter(network):
            held, whole = held + here, whole + everywhere
    return held, whole


def _by_parameter(network: nn.Module) -> Iterator[tuple[int, int]]:
    for tensor in (tensor for tensor in network.parameters() if not tensor.requires_grad):
        size = tensor.element_size()
        if hasattr(tensor, "ds_tensor"):
            yield (tensor.ds_tensor.numel() + tensor.data.numel()) * size, tensor.ds_numel * size
        else:
            yield tensor.numel() * size, tensor.numel() * size


def _by_fsdp2(network: nn.Module) -> list[tuple[int, int]]:
    """While a block is gathered its parameters are other tensors than its shards, which stay."""
    found = []
    for module in network.modules():
        state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in (group for group in groups if group is not None):
            if (on_its_way := group._all_gather_result) is not None:
                found.append((on_its_way.all_gather_output.untyped_storage().size(), 0))
            for weight in group.fsdp_params:
                shard = weight.sharded_param.to_local()
                gathered = sum(out.untyped_storage().size() for out in weight.all_gather_outputs)
                found.append((shard.numel() * shard.element_size() + gathered, weight.sharded_param.numel() * shard.element_size()))
    return found
