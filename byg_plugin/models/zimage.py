"""Z-Image on diffusers' `ZImageTransformer2DModel`: source tokens, time, text encoder. Its VAE is FLUX.1's.

Legend: B batch, C latent channels (16), F = 1, H W latent height and width, L tokens = (H/2)(W/2).

The network counts time from noise (0) to data (1) and returns data - noise. Captions and images come in lists, and each is filled up to
a multiple of 32 tokens with learned ones, which are attended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from byg_plugin.models import qwen_texts, zimage_files
from byg_plugin.models.flux_vae import FluxVaeFamily
from byg_plugin.models.image_family import compute_dtype
from byg_plugin.models.qwen3_texts import Qwen3TextFamily
from byg_plugin.models.qwen_texts import TextEncoder
from byg_plugin.models.tokens import pack_length
from byg_plugin.objectives.base import Text
from byg_plugin.texts import MASK

# Attention and feed-forward linears of the 30 layers: 7 each, 210. The refiners of text and noise, modulation, embedders and the head stay
# frozen.
DEFAULT_TARGETS = r"layers\.\d+\.(attention\.(to_q|to_k|to_v|to_out\.0)|feed_forward\.w[123])"
MULTIPLE = 32
"""Tokens of a caption, and of an image with its source, are filled up to a multiple of this."""


class ZImageFamily(Qwen3TextFamily, FluxVaeFamily):
    """Z-Image as configured; see `models.base.Family`."""

    default_lora_targets = DEFAULT_TARGETS
    network = zimage_files.TRANSFORMER
    thinking = True
    last_layer = None

    def sequence_tokens(self, height: int, width: int, frames: int = 1) -> int:
        """See `models.base.Family`."""
        image = 2 * pack_length(height // self._vae_factor, width // self._vae_factor)
        return sum(-(-tokens // MULTIPLE) * MULTIPLE for tokens in (image, self._config.conditioning.max_text_tokens))

    def encode_texts(self, encoders: TextEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
        """`qwen` (B, L, 2560), the hidden states before the last layer, zeros after a text's end, and `mask` (B, L); on the CPU."""
        ids = self.chat_ids(encoders, texts, self._config.conditioning.max_text_tokens)
        rows = qwen_texts.hidden_rows(encoders, ids, (-2,), dropped=0)
        return {**rows, "qwen": rows["qwen"][:, :, 0]}

    def velocity(self, network: nn.Module, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        """One network call: noisy (B, C, 1, H, W), t (B,) in [0, 1], source of the same shape or None -> velocity, float32.

        The source is a second frame at the first one's positions; all tokens share t.
        """
        self._check_source(noisy, source)
        dtype = compute_dtype(noisy, network.cap_pad_token)
        frames = (noisy if source is None else torch.cat([noisy, source], dim=2)).to(dtype)
        rows, mask = self._text_rows(network, text["qwen"]).to(noisy.device, dtype), text[MASK].to(noisy.device)
        with same_positions(network, pack_length(*noisy.shape[-2:]), with_source=source is not None):
            predictions = network(
                list(frames), 1 - t.float(), [one[kept] for one, kept in zip(rows, mask, strict=True)], return_dict=False
            )[0]
        return -torch.stack([one[:, :1] for one in predictions]).float()


@contextmanager
def same_positions(network: nn.Module, length: int, *, with_source: bool) -> Iterator[None]:
    """For one call, the second frame's tokens are at the positions of the first frame's `length` tokens."""
    if not with_source:
        yield
        return
    original: Any = network.patchify_and_embed

    def patchify(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        images, captions, sizes, image_ids, *rest = original(*args, **kwargs)
        assert all(size[0] == 2 for size in sizes), "noisy and source"
        image_ids = [torch.cat([ids[:length], ids[:length], ids[2 * length :]]) for ids in image_ids]
        return images, captions, sizes, image_ids, *rest

    network.patchify_and_embed = cast(Any, patchify)
    try:
        yield
    finally:
        del network.patchify_and_embed  # the class's own is behind it
