"""What the image families share: one network, one frame, tokens of 2 x 2 latents, source tokens after the noisy ones, one t for all."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byg_plugin import families
from byg_plugin.models import files
from byg_plugin.models.geometry import SpecGeometry
from byg_plugin.models.networks import Network, vae_downsampling
from byg_plugin.models.tokens import PATCH, pack_length

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config


class ImageFamily(SpecGeometry):
    """The part of `models.base.Family` that is alike in image families. A family says what its parts are and how its network is called."""

    default_lora_targets: str
    network: Network
    vae: Network
    text_parts: dict[str, str]
    """The text encoders' names in `models.files.PARTS`, by their keys of `[model]`."""

    def __init__(self, config: Config):
        super().__init__(families.named(config.model.family))
        self._config = config
        self.source_id = self.spec.source_id(config.conditioning.position)

    # --- frozen parts ---

    def load_transformers(self, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
        """The one network, under the name `transformer`: frozen, on the CPU, in eval mode."""
        self._refuse_another_size()
        yield "transformer", self.network.load(self._config.model.part("transformer"), dtype=dtype).requires_grad_(False)

    def meta_transformers(self) -> dict[str, nn.Module]:
        """See `models.base.Family`."""
        self._refuse_another_size()
        return {"transformer": self.network.on_meta(self._config.model.part("transformer"))}

    def _refuse_another_size(self) -> None:
        """A network of another family of the same class, which would do and be called what it is not."""
        if self.network.text_width is None or self.spec.text_width is None:
            return
        path = self._config.model.part("transformer")
        width = self.network.config_of(path)[self.network.text_width]
        other = next((spec.name for spec in families.SPECS.values() if spec.text_width == width), self.spec.name)
        if width != self.spec.text_width and other != self.spec.name:
            raise ValueError(
                f"{path}: takes texts {width} wide, so it is {other}, and model.family is {self.spec.name}: set one to fit the other"
            )

    def sequence_tokens(self, height: int, width: int, frames: int = 1) -> int:
        """See `models.base.Family`."""
        return 2 * pack_length(height // self._vae_factor, width // self._vae_factor) + self._config.conditioning.max_text_tokens

    def load_vae(self, device: torch.device) -> nn.Module:
        """The autoencoder in float32: it is small beside the network, and its 16-bit decoder shows bands."""
        return self.vae.load(self._config.model.part("vae"), dtype=torch.float32).to(device).requires_grad_(False)

    def fingerprint(self, part: str) -> str:
        """See `models.base.Family.fingerprint`; `part` is `vae` or `text`."""
        model = self._config.model
        family = self.spec.lora_layout
        if part == "vae":
            return f"{family}-vae|mode|{files.weights_fingerprint(model.part('vae'), self.vae.part)}"
        assert part == "text", part
        encoders = "|".join(files.weights_fingerprint(model.part(key), part) for key, part in self.text_parts.items())
        return f"{family}-text|{self._config.conditioning.max_text_tokens}|{model.dtype}|{encoders}"

    @cached_property
    def _vae_factor(self) -> int:
        return vae_downsampling(self.vae, self._config.model.part("vae"))

    def pixel_multiple(self) -> int:
        """VAE down-sampling x patch: 16."""
        return self._vae_factor * PATCH

    def solver(self, steps: int, schedule: str, name: str) -> None:
        """Published with Euler."""
        return None

    # --- the network ---

    def _check_source(self, noisy: Tensor, source: Tensor | None) -> None:
        if source is not None and source.shape != noisy.shape:
            raise ValueError(f"source latents {tuple(source.shape)} and noisy latents {tuple(noisy.shape)} must have one shape")

    def _text_rows(self, network: Any, rows: Tensor) -> Tensor:
        assert self.network.text_width is not None
        config: Any = network.config
        wanted = config[self.network.text_width]
        if rows.shape[-1] != wanted:
            raise ValueError(
                f"encoded texts are {rows.shape[-1]} wide, the network takes {wanted}: model.transformer and model.qwen do not fit"
            )
        return rows


def compute_dtype(noisy: Tensor, weight: Tensor) -> torch.dtype:
    """What a network takes its inputs in: the dtype of its weights, under autocast float32."""
    return torch.float32 if torch.is_autocast_enabled(noisy.device.type) else weight.dtype
