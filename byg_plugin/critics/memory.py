"""What a critic keeps on its device, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from byg_plugin.critics.decode import recompute_, recomputed_blocks, tile_side
from byg_plugin.critics.vlm import Described, on_meta
from byg_plugin.models.base import Family

if TYPE_CHECKING:
    from byg_plugin.config.critic import CriticConfig

_NF4 = 0.5 + 4 / 64  # bytes a weight: 4 bits, and one float32 scale a 64-block
_OF_A_LAYER = 34.0  # tensors of the hidden size in 16 bit that a transformer layer keeps, as of the base's blocks
_PROBE = 64  # pixels a side, of every family a multiple of a latent's
_TEXT = 128  # tokens of a question and the template


@dataclass(frozen=True, kw_only=True)
class CriticMemory:
    """Bytes, by part.

    Attributes:
        model: the vision-language model's weights.
        vae: the autoencoder's weights.
        answer: the graph of one question.
        decoder: the graph of one tile; never beside `answer`.
    """

    model: float
    vae: float
    answer: float
    decoder: float

    @property
    def weights(self) -> float:
        """What is there all the time."""
        return self.model + self.vae

    @property
    def graph(self) -> float:
        """The larger of the two graphs."""
        return max(self.answer, self.decoder)


def critic_memory(critic: CriticConfig, described: Described, family: Family, width: int, height: int) -> CriticMemory:
    """Of edits of this size in pixels."""
    dtype = getattr(torch, critic.dtype)
    model, vae = on_meta(described, dtype), family.meta_vae()
    return CriticMemory(
        model=_weights(model, dtype.itemsize, _NF4 if critic.quantization == "nf4" else dtype.itemsize),
        vae=sum(4.0 * parameter.numel() for parameter in vae.parameters()),
        answer=_answer(critic, described, width, height) * dtype.itemsize / 2,
        decoder=decoder_graph(family, vae, width, height, critic.tile, recompute=critic.gradient_checkpointing),
    )


def _weights(model: nn.Module, each: float, of_linears: float) -> float:
    head = getattr(model, "lm_head", None)
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head}
    return sum(parameter.numel() * (of_linears if id(parameter) in linears else each) for parameter in model.parameters())


def _answer(critic: CriticConfig, described: Described, width: int, height: int) -> float:
    """Bytes in 16 bit of the layers' kept inputs, and of one layer at a time or of all."""
    view, text, vision = described.view, described.config.text_config, described.config.vision_config
    tokens = view.see(torch.zeros(3, *view.size(height, width), device="meta")).tokens
    rows, columns = view.size(height, width)
    side = vision.patch_size if isinstance(vision.patch_size, int) else vision.patch_size[0]
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    width_of_tower = getattr(vision, "embed_dim", None) or vision.hidden_size  # Qwen2-VL's hidden_size is the language model's
    parts = ((2 * tokens + _TEXT, text.hidden_size, text.num_hidden_layers), (rows * columns // side**2, width_of_tower, depth))
    if critic.gradient_checkpointing:
        one_layer = max(_OF_A_LAYER * length * size for length, size, _ in parts)
        return 2 * (sum(float(length * size * layers) for length, size, layers in parts) + one_layer)
    return 2 * sum(_OF_A_LAYER * length * size * layers for length, size, layers in parts)


def decoder_graph(family: Family, vae: nn.Module, width: int, height: int, tile: int | None, *, recompute: bool) -> float:
    """Bytes that a decoder's backward pass keeps of one tile: counted on the meta device, of a VAE that may be changed.

    With recomputing: the blocks' inputs, and all of that block which needs most.
    """
    vae.requires_grad_(False)  # weights to be trained would have their inputs saved too
    # Pixels of a latent; a tile has whole ones.
    factor = _PROBE // family.encode_pixels(vae, torch.empty(1, 3, 1, _PROBE, _PROBE, device="meta")).shape[-1]
    sides = [side if tile is None else min(side, tile_side(tile, factor) * factor) for side in (height, width)]
    latents = family.encode_pixels(vae, torch.empty(1, 3, 1, *sides, device="meta"))
    saved, largest = _Counted(), 0.0
    entered: list[float] = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal largest
        largest = max(largest, saved.bytes - entered.pop())

    handles = []
    for block in recomputed_blocks(vae):
        handles += [
            block.register_forward_pre_hook(lambda module, args: entered.append(saved.bytes)),
            block.register_forward_hook(leave),
        ]
    with saved.counting():
        decoded = family.decode_latents(vae, latents.requires_grad_())
    del decoded
    for handle in handles:
        handle.remove()
    if not recompute or not handles:
        return saved.bytes
    recompute_(vae)
    inputs = _Counted()
    with inputs.counting():
        family.decode_latents(vae, latents)
    return inputs.bytes + largest


class _Counted:
    """Bytes of the tensors that autograd saves, parameters left out, each storage once."""

    def __init__(self) -> None:
        self.bytes = 0.0
        self._seen: dict[int, Tensor] = {}

    def counting(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if not isinstance(tensor, nn.Parameter) and key not in self._seen:
            self._seen[key] = tensor  # alive, so that nobody else gets its number
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor
