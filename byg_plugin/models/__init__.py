"""Model families by name."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, cast

from byg_plugin import families

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config
    from byg_plugin.models.base import Family


def make_family(config: Config) -> Family:
    """The configured family; its heavy imports happen here and not before."""
    spec = families.named(config.model.family)
    return cast("Family", resolve_name(spec.implementation)(config))
