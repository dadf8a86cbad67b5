"""Hosts by name: a network with a LoRA on a device, seen as velocity fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, device, nn

from byg_plugin.models.base import Family
from byg_plugin.objectives.base import EDIT, FAKE, Velocity, VelocityFields

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config
    from byg_plugin.hosts.ema import Adapter
    from byg_plugin.hosts.sharding import Sharding


class Host(VelocityFields, Protocol):
    """What loop, previews and editing ask of a host beyond its fields."""

    device: device
    networks: dict[str, nn.Module]

    @property
    def adapters(self) -> dict[str, Adapter]:
        """All that is trained, `EDIT` first: previews and LoRA files are of that one."""
        ...

    def live(self) -> AbstractContextManager[Velocity]:
        """The current weights, no gradient, no dropout."""
        ...

    @property
    def sharding(self) -> Sharding:
        """How the frozen weights are held. Where they are in shards, every process takes part in every call."""
        ...

    def after_backward(self) -> None:
        """Called after each backward pass: free what it has left."""
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


def make_host(
    config: Config,
    family: Family,
    where: device,
    *,
    fresh: bool = True,
    adapters: Sequence[str] = (EDIT,),
    sharding: Sharding | None = None,
) -> Host:
    """The configured host; its heavy imports happen here and not before.

    Args:
        config: the whole configuration.
        family: the model family.
        where: the device of the networks.
        fresh: start from `lora.init_from`, where it is set; false when the weights are restored or loaded afterwards.
        adapters: what the objective trains.
        sharding: of the frozen weights; None: whole.

    Raises:
        ValueError: the host has no such adapter, or cannot honour an option.
    """
    assert config.model.host == "diffusers", config.model.host
    _check_adapters(config, adapters)
    from byg_plugin.hosts.diffusers import DiffusersHost

    return DiffusersHost(config, family, where, fresh=fresh, adapters=adapters, sharding=sharding)


def adapter_shapes(config: Config, family: Family, adapters: Sequence[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """Names and shapes of the parameters of each adapter that `make_host` makes, in their order; loads no weights.

    Raises:
        ValueError: the host has no such adapter.
    """
    _check_adapters(config, adapters)
    from byg_plugin.hosts.diffusers import lora_layout

    return dict.fromkeys(adapters, lora_layout(config.lora, family))


def _check_adapters(config: Config, adapters: Sequence[str]) -> None:
    if more := [name for name in adapters if name not in (EDIT, FAKE)]:
        raise ValueError(
            f'objective.name = "{config.objective.name}" trains the weights {", ".join(more)} too, and model.host = "{config.model.host}" '
            f"has {EDIT} and {FAKE} alone: choose another objective or host"
        )
