"""Which of two experts lies on the device, where only one fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class OneExpertOnDevice:
    """Frozen tensors of several networks, those of one at a time on the device, all of them in main memory for good.

    The weights never change, so an expert that leaves is dropped from the device, not copied back. What is trained stays on
    the device and is never touched. An expert may not leave between a forward pass and its backward pass: `hold` names the
    one that must stay.

    Args:
        networks: on the CPU.
        keep: tensors that are not moved (the LoRA).
        device: where a network must be when it is called.
    """

    def __init__(self, networks: Mapping[str, nn.Module], keep: Iterable[Tensor], device: torch.device):
        self.device = device
        kept = {id(tensor) for tensor in keep}
        self._frozen = {name: _frozen_tensors(network, kept) for name, network in networks.items()}
        self._masters = {name: [self._master(tensor) for tensor in tensors] for name, tensors in self._frozen.items()}
        self.present: str | None = None
        self.held: str | None = None

    def _master(self, tensor: Tensor) -> Tensor:
        """The copy that stays in main memory. The first one goes at once: both experts twice would not fit many a machine."""
        if self.device.type == "cuda":
            tensor.data = _pinned(tensor.data)
        return tensor.data

    def bring(self, name: str) -> None:
        """Make a network callable; the other one leaves first."""
        if name == self.present:
            return
        assert self.held in (None, name), f"{name} would push out {self.held}, whose backward pass is still to come"
        if self.present is not None:
            self._drop(self.present)
        self.present = None
        # The rollout brings experts in inference mode. Copies made there would be inference tensors, and the weights with them: no
        # backward pass could save them.
        try:
            with torch.inference_mode(False):
                for tensor, master in zip(self._frozen[name], self._masters[name], strict=True):
                    tensor.data = _copied(master, self.device)
        except BaseException:  # out of memory in a preview, after which training goes on: a part would stay there for good
            self._drop(name)
            raise
        self.present = name

    def clear(self) -> None:
        """No network on the device: something else needs the room."""
        assert self.held is None, f"{self.held} is waiting for its backward pass"
        if self.present is not None:
            self._drop(self.present)
        self.present = None

    def _drop(self, name: str) -> None:
        for tensor, master in zip(self._frozen[name], self._masters[name], strict=True):
            tensor.data = master


def _copied(master: Tensor, device: torch.device) -> Tensor:
    """On the device; on a CPU it is the master itself."""
    return master.to(device, non_blocking=True)


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in pinned memory, from where a CUDA device takes it without a detour. Torch rounds each up to a power of two bytes."""
    return tensor.pin_memory()


def _frozen_tensors(network: nn.Module, kept: set[int]) -> list[Tensor]:
    every = [*network.parameters(), *network.buffers()]
    return [tensor for tensor in every if id(tensor) not in kept]
