"""What a family knows of its sizes and times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from byg_plugin.families.spec import FamilySpec

if TYPE_CHECKING:
    from torch import Tensor


class Geometry(Protocol):
    """Sizes and times of a family; no weights are read. Most of it is `models.geometry.SpecGeometry`."""

    spec: FamilySpec

    @property
    def name(self) -> str:
        """Value of `model.family`."""
        ...

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the networks: one, or the high-noise and the low-noise expert."""
        ...

    @property
    def boundary(self) -> float | None:
        """t from which the first expert serves, below it the second; None for a family of one network."""
        ...

    def expert_of(self, t: Tensor) -> str:
        """Name of the expert that serves these t; all of them must be on one side."""
        ...

    def clip_frames(self, frames: int) -> int:
        """The largest number of frames not above `frames` that the family takes (1: images alone)."""
        ...

    def shifted_nodes(self, nodes: Tensor, latent_shape: Sequence[int]) -> Tensor:
        """The family's inference shift applied to nodes in [0, 1] (1 = noise); end points stay."""
        ...

    def guide(self, v: Tensor, v_negative: Tensor, scale: float) -> Tensor:
        """The family's classifier-free guidance of two velocities (B, C, F, H, W) at a scale in its own formula."""
        ...
