"""Z-Image inside musubi-tuner.

The host's own forward pass leaves out the learned tokens that fill caption and image up to a multiple of 32, and that are attended: it
is another function than diffusers' and ComfyUI's, in which the LoRA will run. Its network holds these tokens. So here the passes go
through the host's layers in an order of our own, with the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from byg_plugin.models.one_call import own_forward
from byg_plugin.models.tokens import PATCH, pack_length
from byg_plugin.musubi.family import Encoded, Module, MusubiFamily, Padding, TextEncoder, chat_length, require_known_attention
from byg_plugin.musubi.qwen_image import one_text, rows_and_mask
from byg_plugin.objectives.base import Text, Velocity

if TYPE_CHECKING:
    from byg_plugin.config.sections import ConditioningConfig

_MULTIPLE = 32
_KIND = f"{PATCH}-1"  # of embedder and head: sides of a token in latents, and frames


class ZImageOnMusubi(MusubiFamily):
    """See `musubi.family.MusubiFamily`."""

    trainer = ("zimage_train_network", "ZImageNetworkTrainer")
    parser = "zimage_setup_parser"
    network = ("zimage.zimage_model", "ZImageTransformer2DModel")
    latents_script = "zimage_cache_latents.py"
    architecture = ("zi", "z_image")
    text_parts = ("qwen",)
    padding: Padding = "masked"

    def lacking(self, trainer: Any, network: Any) -> list[str]:
        """What our order of its layers calls."""
        names = [name for name in ("patchify", "unpatchify") if not callable(getattr(network, name, None))]
        return [f"{network.__name__}.{name}, which the learned padding goes between" for name in names]

    def check(self, options: Mapping[str, Any]) -> None:
        """See `require_known_attention`.

        Raises:
            ValueError: names the option.
        """
        require_known_attention(options, one_by_one=("xformers",))
        if options.get("use_32bit_attention") and options.get("flash_attn"):
            raise ValueError("musubi.use_32bit_attention: flash_attn computes in 16 bits: leave it out, or set musubi.sdpa")

    def call(self, module: Module, accelerator: Any, transformer: Any, conditioning: ConditioningConfig) -> Velocity:
        """See `zimage_call`."""
        return partial(zimage_call, module("modules.attention").AttentionParams, accelerator, transformer)

    def encode_pixels(self, vae: Any, pixels: Tensor) -> Tensor:
        """One frame; the host's caches hold what its VAE gives, which its trainer scales where it reads them."""
        raw = vae.encode(pixels[:, :, 0].to(vae.dtype)).mode().float()
        return ((raw - _SHIFT) * _SCALE).unsqueeze(2)

    def decode_latents(self, vae: Any, latents: Tensor) -> Tensor:
        """See `encode_pixels`."""
        return vae.decode((latents[:, :, 0] / _SCALE + _SHIFT).to(vae.dtype)).unsqueeze(2)

    def text_of_prompt(self, prompt: Mapping[str, Any], kind: str, tokens: int) -> Text | None:
        """A prompt's own rows; without a negative prompt, the host has the empty one."""
        return one_text(prompt[f"{kind}cap_feats"][0][prompt[f"{kind}cap_mask"][0].bool()][:tokens])

    def load_text_encoder(self, module: Module, options: Mapping[str, Any], tokens: int, device: torch.device) -> TextEncoder:
        """The hidden states of Qwen3 before the last layer."""
        utils = module("zimage.zimage_utils")
        dtype = torch.float8_e4m3fn if options.get("fp8_llm") else torch.bfloat16
        tokenizer, encoder = utils.load_qwen3(options["text_encoder"], dtype=dtype, device=device, disable_mmap=True)
        encoder.eval()

        def encode(text: str) -> Encoded:
            rows, mask = utils.get_text_embeds(tokenizer, encoder, text)
            return {"qwen": rows[0][mask[0]][:tokens].to(torch.bfloat16).cpu()}

        return TextEncoder(encode=encode, length=partial(chat_length, tokenizer, thinking=True))


_SHIFT, _SCALE = 0.1159, 0.3611  # FLUX.1's, whose VAE it has


def zimage_call(attention: Any, accelerator: Any, transformer: Any, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
    """Velocity of the host's Z-Image: noisy (B, C, 1, H, W), t (B,), source like noisy or None -> like noisy, float32.

    The source is a second frame at the first one's positions. The network counts time from noise to data and returns data - noise.
    """
    network = accelerator.unwrap_model(transformer)
    frames = noisy if source is None else torch.cat([noisy, source], dim=2)
    rows, _, lengths = rows_and_mask(text, noisy.device)
    with accelerator.autocast(), own_forward(network, partial(_forward, network, attention)):
        out = transformer(frames.float(), 1 - t.float(), rows, lengths)
    return -out[:, :, :1].float()


def _forward(network: Any, attention: Any, frames: Tensor, t: Tensor, rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """The host's layers as diffusers orders them: frames (B, C, F, H, W), rows (B, L, D) with their lengths -> like frames."""
    image, captions = _image(network, frames), _captions(network, rows, lengths)
    time = network.t_embedder(t * network.t_scale).type_as(image)
    attended = _attended(lengths, captions)
    everything = attention.create_attention_params_from_mask(network.attn_mode, network.split_attn, 0, None)
    of_captions, of_all = (
        attention.create_attention_params_from_mask(network.attn_mode, network.split_attn, before, attended)
        for before in (0, image.shape[1])
    )
    image_ids, caption_ids = _ids(network, frames, lengths, image.shape[1], captions.shape[1])
    image_angles, caption_angles = _angles(network, image_ids), _angles(network, caption_ids)
    for layer in network.noise_refiner:
        image = layer(image, image_angles, time, attn_params=everything)
    for layer in network.context_refiner:
        captions = layer(captions, caption_angles, attn_params=of_captions)
    both, angles = torch.cat([image, captions], dim=1), torch.cat([image_angles, caption_angles], dim=1)
    for index, layer in enumerate(network.layers):
        if network.blocks_to_swap:
            network.offloader.wait_for_block(index)
        both = layer(both, angles, time, attn_params=of_all)
        if network.blocks_to_swap:
            network.offloader.submit_move_blocks_forward(network.layers, index)
    # Activations that are offloaded may have been left in main memory.
    tokens = network.all_final_layer[_KIND](both.to(frames.device), time)
    return network.unpatchify(tokens, tuple(frames.shape[2:]), PATCH, 1)


def _up(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE


def _image(network: Any, frames: Tensor) -> Tensor:
    """(B, C, F, H, W) -> (B, L, D): embedded tokens of all frames and the learned ones after them."""
    tokens = network.all_x_embedder[_KIND](network.patchify(frames, PATCH, 1))
    missing = _up(tokens.shape[1]) - tokens.shape[1]
    return torch.cat([tokens, network.x_pad_token.to(tokens).expand(len(tokens), missing, -1)], dim=1)


def _captions(network: Any, rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """(B, L, D) -> (B, L', D): embedded rows, after each text's end the learned token."""
    length = max(map(_up, lengths))
    embedded = network.cap_embedder(pad(rows, (0, 0, 0, length - rows.shape[1])))
    is_text = _until(lengths, length, rows.device)
    return torch.where(is_text[..., None], embedded, network.cap_pad_token.to(embedded))


def _attended(lengths: Sequence[int], captions: Tensor) -> Tensor | None:
    """(B, L'): what another caption's length has filled up is not attended; None: all is."""
    padded = [_up(length) for length in lengths]
    return None if len(set(padded)) == 1 else _until(padded, captions.shape[1], captions.device)


def _until(ends: Sequence[int], length: int, device: torch.device) -> Tensor:
    """(B, length): before each end."""
    return torch.arange(length, device=device) < torch.tensor(ends, device=device)[:, None]


def _ids(network: Any, frames: Tensor, lengths: Sequence[int], of_image: int, of_captions: int) -> tuple[Tensor, Tensor]:
    """Positions (B, L, 3) of image and captions: an image stands after its caption's learned tokens, its own are at 0."""
    device = frames.device
    captions = torch.zeros(len(frames), of_captions, 3, dtype=torch.long, device=device)
    captions[..., 0] = torch.arange(1, of_captions + 1, device=device)
    rows, columns = (torch.arange(side // PATCH, device=device) for side in frames.shape[-2:])
    length = pack_length(*frames.shape[-2:])
    image = torch.zeros(len(frames), of_image, 3, dtype=torch.long, device=device)
    for frame in range(frames.shape[2]):
        tokens = image[:, frame * length : (frame + 1) * length]
        tokens[..., 0] = torch.tensor([_up(one) + 1 for one in lengths], device=device)[:, None]
        tokens[..., 1:] = torch.cartesian_prod(rows, columns)
    return image, captions


def _angles(network: Any, ids: Tensor) -> Tensor:
    """(B, L, 3) -> (B, L, half of a head), complex. The host's table takes one sequence."""
    return network.rope_embedder(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])
