"""A checkout of musubi-tuner: found, imported, looked at for what it can do. Beside it only `patches/` imports the host."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from byg_plugin import shipped
from byg_plugin.config.sections import ModelConfig
from byg_plugin.musubi.family import MusubiFamily, musubi_family
from byg_plugin.musubi.prompts import check_prompts

_SEAMS = (
    "process_batch",
    "on_transformer_loaded",
    "extra_trainable_params",
    "on_train_start",
    "extra_metadata",
    "on_post_optimizer_step",
    "on_post_save",
    "on_before_sample_images",
    "on_after_sample_images",
    "process_sample_prompts",
    "do_inference",
)
_PROCESS_BATCH = ("args", "accelerator", "transformer", "network", "batch", "latents")


@dataclass(frozen=True)
class Checkout:
    """The host's modules that the plugin uses."""

    family: MusubiFamily
    trainer: Any
    """The module of the family's network trainer."""

    @property
    def trainer_class(self) -> Any:
        return getattr(self.trainer, self.family.trainer[1])

    def parser(self) -> argparse.ArgumentParser:
        """The parser of the family's training script."""
        return getattr(self.trainer, self.family.parser)(self.trainer.setup_parser_common())

    def module(self, name: str) -> Any:
        """Another module of the host."""
        return host_module(name)

    def load_video(self, path: str, first: int, last: int) -> list[Any]:
        """The host's reader of clips: frames (H, W, 3)."""
        return self.module("dataset.media_utils").load_video(path, first, last)

    def check_prompts(self, path: str) -> None:
        """See `musubi.prompts.check_prompts`.

        Raises:
            ValueError: what a preview would stop at.
        """
        check_prompts(path, self.trainer.load_prompts, self.load_video)


def open_checkout(model: ModelConfig) -> Checkout:
    """Import the host and look at what it can do.

    Raises:
        ValueError: it is not there, cannot be imported, or lacks something; lists all that is missing.
    """
    folder = put_on_path(model.host_path)
    family = musubi_family(model.family)
    if lacking := _lacking(family):
        raise ValueError(
            f"musubi-tuner in {folder} is not one that this plugin works with (tested: v0.3.0 and v0.3.4), it lacks:\n"
            + "\n".join(f"  - {line}" for line in lacking)
        )
    return Checkout(family, host_module(family.trainer[0]))


def put_on_path(host_path: str | None) -> str:
    """Make `musubi_tuner` importable from its checkout (None: as installed); returns the folder of the package.

    Raises:
        ValueError: it is not there.
    """
    if host_path is not None:
        source = Path(host_path).expanduser().resolve() / "src"
        if not (source / "musubi_tuner").is_dir():
            raise ValueError(f"model.host_path = {host_path}: no checkout of musubi-tuner there (no src/musubi_tuner in it)")
        if str(source) not in sys.path:
            sys.path.insert(0, str(source))
    spec = importlib.util.find_spec("musubi_tuner")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            'model.host = "musubi": musubi_tuner is not installed in this environment; set model.host_path to the folder of its checkout, '
            "or run this command in its environment"
        )
    return str(next(iter(spec.submodule_search_locations)))


def host_module(name: str) -> Any:
    """A module of the host, which is on the path, by its name inside the package."""
    with shipped.module("patches.musubi").imports_without_cuda():
        return importlib.import_module(f"musubi_tuner.{name}")


def _lacking(family: MusubiFamily) -> list[str]:
    """What an incompatible host does not have, a line each."""
    module, name = family.trainer
    try:
        trainer = getattr(host_module(module), name, None)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == f"musubi_tuner.{module}":
            return [f"{module}.{name}: its version has no such model"]
        return [f"a module that its {name} imports: {error} (install what its README asks for)"]
    if trainer is None:
        return [f"{module}.{name}"]
    lacking = [f"the seam {name}.{seam}" for seam in _SEAMS if not callable(getattr(trainer, seam, None))]
    if not lacking:
        found = tuple(inspect.signature(trainer.process_batch).parameters)[1:]
        if found[: len(_PROCESS_BATCH)] != _PROCESS_BATCH:  # what follows is not read
            lacking.append(f"{name}.process_batch with the parameters {', '.join(_PROCESS_BATCH)}, ...; it has {', '.join(found)}")
    network_module, network_name = family.network
    network = getattr(host_module(network_module), network_name)
    for switch in ("switch_block_swap_for_inference", "switch_block_swap_for_training"):
        if not callable(getattr(network, switch, None)):
            lacking.append(f"{network.__name__}.{switch}, without which swapped blocks are in the wrong place")
    return lacking + family.lacking(trainer, network)
