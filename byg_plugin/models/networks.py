"""A network of diffusers from a folder, a hub id or one file, or its shapes alone. Which network is what its description says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import Tensor, nn

from byg_plugin.models import files

# What a class of diffusers raises where a configuration has values of another type or size; on the meta device nothing is allocated.
_OTHER_VALUES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, kw_only=True)
class Network:
    """What one network is and how it lies on disk. `path_or_id` is what `files.py` takes.

    Attributes:
        name: of its class in diffusers, which may be newer than the oldest diffusers that other families take.
        part: its name in `files.PARTS`.
        config: the configuration that a file's names and shapes tell.
        state: a file's tensors under diffusers' names, by the configuration and the dtype that is asked for.
        check: refuses the configuration of another model, at a path.
        finish: fills what no file holds into a network that was built on the meta device.
        text_width: the key of its configuration that says how wide an encoded text is; None: it has none, or texts of its own.
    """

    name: str
    part: str
    config: Callable[[files.Weights], dict[str, Any]]
    state: Callable[[files.Weights, Mapping[str, Any], torch.dtype], dict[str, Tensor]]
    check: Callable[[Any, str | Path], None] | None = None
    finish: Callable[[Any], None] | None = None
    text_width: str | None = None

    @property
    def kind(self) -> Any:
        """The class in diffusers."""
        return getattr(diffusers, self.name)

    def load(self, path_or_id: str | Path, *, dtype: torch.dtype) -> nn.Module:
        """The network in `dtype`, on the CPU, in eval mode.

        Raises:
            ValueError: nothing is at `path_or_id`, it is damaged, or it is another model.
        """
        file = files.single_file(path_or_id, self.part)
        if file is None:
            self.on_meta(path_or_id)  # says in a line what the library's loader does not say, or in a traceback
            model = files.from_folder(self.kind, path_or_id, self.part, torch_dtype=dtype)
        else:
            with files.Weights(file, self.part) as weights:
                config = files.config_beside(weights) or self.config(weights)
                state = self.state(weights, config, dtype)
                model = files.build(lambda: self.kind.from_config(config), state, weights)
            if self.finish is not None:
                self.finish(model)
        return self._checked(model, path_or_id)

    def on_meta(self, path_or_id: str | Path) -> nn.Module:
        """The network that `load` would load, on the meta device: names and shapes, no weights read.

        Raises:
            ValueError: as `load`, as far as configuration or header tell.
        """
        config = self._config_only(path_or_id)
        try:
            with torch.device("meta"):
                model = self.kind.from_config(config)
        except _OTHER_VALUES as error:
            raise ValueError(f"{path_or_id}: its config.json describes no {self.name} ({error}); download it again") from error
        checked = self._checked(model, path_or_id)
        if (folder := files.local_folder(path_or_id, self.part)) is not None:
            files.check_tensors(checked, folder)
        return checked

    def config_of(self, path_or_id: str | Path) -> dict[str, Any]:
        """The configuration, with the class's defaults for what it leaves out; reads no weights.

        Raises:
            ValueError: as `load`, as far as configuration or header tell without `check`.
        """
        config = self._config_only(path_or_id)
        defaults = {name: parameter.default for name, parameter in files.parameters_of(self.kind).items()}
        return defaults | {name: value for name, value in config.items() if name in defaults}

    def _config_only(self, path_or_id: str | Path) -> dict[str, Any]:
        return files.config_only(path_or_id, self.part, self.kind, self.config)

    def _checked(self, model: Any, path_or_id: str | Path) -> nn.Module:
        if self.check is not None:
            self.check(model.config, path_or_id)
        return cast(nn.Module, model).eval()


def vae_downsampling(vae: Network, path_or_id: str | Path) -> int:
    """Pixels that a side of an autoencoder's latents stands for; reads no weights.

    Raises:
        ValueError: as `Network.config_of`.
    """
    config = vae.config_of(path_or_id)
    halvings = len(config["block_out_channels"]) - 1 if "block_out_channels" in config else len(config["temperal_downsample"])
    return 2**halvings
