"""Model families by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config
    from byg_plugin.models.base import Family


def make_family(config: Config) -> Family:
    """The configured family; its heavy imports happen here and not before."""
    if config.model.family == "flux":
        from byg_plugin.models.flux import FluxFamily

        return FluxFamily(config)
    if config.model.family.startswith("wan"):
        from byg_plugin.models.wan import WanFamily

        return WanFamily(config)
    raise AssertionError(f"config accepted the unknown family {config.model.family!r}")
