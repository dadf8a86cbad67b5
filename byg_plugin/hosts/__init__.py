"""Hosts by name: a network with a LoRA on a device, seen as three velocity fields."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, device, nn

from byg_plugin.models.base import Family
from byg_plugin.objectives.base import Velocity, VelocityFields

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config
    from byg_plugin.hosts.ema import EmaWeights


class Host(VelocityFields, Protocol):
    """What loop, previews and editing ask of a host beyond the three fields."""

    device: device
    networks: dict[str, nn.Module]
    parameters: dict[str, nn.Parameter]
    """The trainable LoRA weights by the names of the LoRA file."""
    ema_weights: EmaWeights

    def live(self) -> AbstractContextManager[Velocity]:
        """The current weights, no gradient, no dropout."""
        ...

    def off_device(self) -> AbstractContextManager[None]:
        """The networks leave the device's memory, where their storage allows it."""
        ...

    def export_lora(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights by our names -> the tensors of a LoRA file."""
        ...

    def lora_files(self, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Weights by our names -> the tensors of each LoRA file, by what follows the file's stem."""
        ...

    def load_lora(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the weights from a LoRA file's tensors."""
        ...

    def set_strength(self, strength: float) -> None:
        """Scale of the LoRA's contribution; 1 = as trained."""
        ...


def make_host(config: Config, family: Family, where: device, *, fresh: bool = True) -> Host:
    """The configured host; its heavy imports happen here and not before.

    Args:
        config: the whole configuration.
        family: the model family.
        where: the device of the networks.
        fresh: start from `lora.init_from`, where it is set; false when the weights are restored or loaded afterwards.
    """
    assert config.model.host == "diffusers", config.model.host
    from byg_plugin.hosts.diffusers import DiffusersHost

    return DiffusersHost(config, family, where, fresh=fresh)
