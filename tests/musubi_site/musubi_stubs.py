"""musubi-tuner on a CPU: a stand-in for torchvision (whose wheels want the torch they were built with), and tiny models.

The stand-in is only visible once the host is being imported: transformers looks for torchvision too and would believe in it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

_NAMES = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.utils", "torchvision.io")
TINY_TEXT_TOKENS = 8
TINY_WAN = {"dim": 24, "ffn_dim": 32, "freq_dim": 16, "num_heads": 2, "num_layers": 4, "text_len": TINY_TEXT_TOKENS}
TINY_FLUX = {"hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 6, 6]}


class _Anything(types.ModuleType):
    """A module that has every name; none of them is used in these tests."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname in _NAMES and "musubi_tuner" in sys.modules:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        from transformers.utils import import_utils

        asked = getattr(import_utils, "is_torchvision_available", None)
        if asked is not None and hasattr(asked, "cache_clear"):
            assert not hasattr(asked, "cache_info") or asked.cache_info().currsize, (
                "transformers must have looked before the stand-in is there"
            )
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def install() -> None:
    """Serve the stand-in, unless a torchvision that works is there."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Finder())


def look_first() -> None:
    """transformers and what is built on it settle whether there is a torchvision."""
    import accelerate  # noqa: F401
    import diffusers  # noqa: F401
    import transformers.utils

    transformers.utils.is_torchvision_available()


def shrink() -> None:
    """The host's names for real models mean tiny ones."""
    import dataclasses

    from musubi_tuner.flux import flux_models
    from musubi_tuner.wan.configs import WAN_CONFIGS

    for name in ("t2v-1.3B", "t2v-14B", "t2v-A14B"):
        WAN_CONFIGS[name].update(TINY_WAN)
    spec = flux_models.configs_flux_dev_context
    params = dataclasses.replace(spec.params, context_in_dim=24, vec_in_dim=20, **TINY_FLUX)
    flux_models.configs_flux_dev_context = dataclasses.replace(spec, params=params)


def shrink_when_imported() -> None:
    """`shrink`, as soon as the host's trainers are imported by the command under test."""
    look_first()
    asked = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        module = asked(name, package)
        if name.startswith("musubi_tuner.") and name.endswith("_train_network"):
            shrink()
        return module

    importlib.import_module = import_module
