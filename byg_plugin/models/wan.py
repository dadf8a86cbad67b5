"""Wan text-to-video on diffusers' `WanTransformer3DModel`: source tokens, positions, experts, text encoder and VAE.

Legend: B batch, C latent channels (16; 48 for the 5B), F H W latent frames, height and width, L = F (H/2) (W/2) tokens,
D channels of a head. Pixel frames are 4n + 1, latent frames n + 1.

Wan2.2-A14B has two experts: `transformer` serves t >= boundary (high noise), `transformer_2` serves t < boundary.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor, nn

from byg_plugin import families, timesteps
from byg_plugin.families import HIGH, LOW
from byg_plugin.models import files, normalised_vae, wan_files
from byg_plugin.models.geometry import SpecGeometry
from byg_plugin.models.networks import Network
from byg_plugin.objectives.base import Text

if TYPE_CHECKING:
    from byg_plugin.config.sections import Config

# Attention and feed-forward linears of all blocks: 10 a block, 400 in a 14B expert. The rest stays frozen: not every tool
# loads a LoRA of it.
DEFAULT_TARGETS = r"blocks\.\d+\.(attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)|blocks\.\d+\.ffn\.net\.(0\.proj|2)"
PATCH = 2  # of height and width; Wan does not patch frames


@dataclass(frozen=True)
class TextEncoder:
    """UMT5 with its tokenizer."""

    model: nn.Module
    tokenizer: Any


class WanFamily(SpecGeometry):
    """A Wan text-to-video model as configured; see `models.base.Family`."""

    default_lora_targets = DEFAULT_TARGETS

    def __init__(self, config: Config):
        super().__init__(families.named(config.model.family))
        self._config = config
        self.position = config.conditioning.position

    # --- frozen parts ---

    @cached_property
    def boundary(self) -> float | None:
        """From `model.boundary`, the checkpoint's own model_index.json, or the published value."""
        if self.spec.boundary is None:
            return None
        return self._config.model.boundary or _saved_boundary(self._config.model.path) or self.spec.boundary

    def _path_or_id(self, expert: str) -> str:
        return self._config.model.part(expert)

    def load_transformers(self, dtype: torch.dtype) -> Iterator[tuple[str, nn.Module]]:
        """The experts, frozen, on the CPU, in eval mode; of two, one is read when it is asked for."""
        if len(self.experts) > 1:
            self._refuse_two_models()
        kept: list[Tensor] = []  # small tensors of the first expert, which outlive what a host does to it
        for expert in self.experts:
            network = _network(expert).load(self._path_or_id(expert), dtype=dtype)
            small = [network.proj_out.weight.detach(), network.scale_shift_table.detach()]
            if kept and all(map(torch.equal, kept, small)):
                raise ValueError(
                    f"{self._both_transformers()} hold the same weights: give the high-noise file to the first and the low-noise file "
                    "to the second"
                )
            kept = small
            yield expert, network.requires_grad_(False)

    def _both_transformers(self) -> str:
        return f"model.transformer = {self._path_or_id(HIGH)} and model.transformer_2 = {self._path_or_id(LOW)}"

    def _refuse_two_models(self) -> None:
        """Two experts are one architecture; a 1.3B beside a 14B is a slip. Told by configurations and headers alone."""
        high, low = ([tuple(p.shape) for p in network.parameters()] for network in self.meta_transformers().values())
        if high != low:
            raise ValueError(f"{self._both_transformers()} are not two experts of one model")

    def meta_transformers(self) -> dict[str, nn.Module]:
        """See `models.base.Family`."""
        return {expert: _network(expert).on_meta(self._path_or_id(expert)) for expert in self.experts}

    def sequence_tokens(self, height: int, width: int, frames: int = 1) -> int:
        """See `models.base.Family`. Wan's text is no part of the sequence."""
        factor = self._vae_factor * PATCH
        return 2 * (1 + (frames - 1) // self._vae_frames) * (height // factor) * (width // factor)

    def load_vae(self, device: torch.device) -> nn.Module:
        """The autoencoder in float32, in tiles if `dataset.vae_tiling` asks for it."""
        vae: Any = wan_files.VAE.load(self._config.model.part("vae"), dtype=torch.float32)
        if self._config.dataset.vae_tiling:
            vae.enable_tiling()
        return cast(nn.Module, vae).to(device).requires_grad_(False)

    def load_text_encoders(self, device: torch.device) -> TextEncoder:
        """UMT5 in the model's dtype."""
        model, tokenizer = wan_files.load_umt5(self._config.model.part("t5"), dtype=getattr(torch, self._config.model.dtype))
        return TextEncoder(cast(nn.Module, model).to(device).eval().requires_grad_(False), tokenizer)

    def fingerprint(self, part: str) -> str:
        """See `models.base.Family.fingerprint`; `part` is `vae` or `text`."""
        model = self._config.model
        if part == "vae":
            tiled = "|tiled" if self._config.dataset.vae_tiling else ""
            return f"wan-vae|mode{tiled}|{files.weights_fingerprint(model.part('vae'), 'wan_vae')}"
        assert part == "text", part
        length = self._config.conditioning.max_text_tokens
        return f"wan-text|{length}|{model.dtype}|{files.weights_fingerprint(model.part('t5'), 'umt5')}"

    @cached_property
    def _vae_config(self) -> Any:
        return wan_files.VAE.config_of(self._config.model.part("vae"))

    @property
    def _vae_factor(self) -> int:
        return int(self._vae_config["scale_factor_spatial"])

    @property
    def _vae_frames(self) -> int:
        return int(self._vae_config["scale_factor_temporal"])

    def pixel_multiple(self) -> int:
        """VAE down-sampling x patch: 16, for the 5B 32."""
        return self._vae_factor * PATCH

    def clip_frames(self, frames: int) -> int:
        """The largest 4n + 1 that is not above `frames`."""
        return (frames - 1) // self._vae_frames * self._vae_frames + 1

    # --- pixels and texts ---

    def encode_pixels(self, vae: nn.Module, pixels: Tensor) -> Tensor:
        """(B, 3, 4n + 1, H, W) in [-1, 1] -> (B, C, n + 1, H/8, W/8), the posterior's mode to zero mean and unit variance."""
        if pixels.shape[2] != self.clip_frames(pixels.shape[2]):
            raise ValueError(f"Wan takes {self._vae_frames}n + 1 frames, got {pixels.shape[2]}")
        return normalised_vae.encode(vae, pixels)

    def decode_latents(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """The inverse of `encode_pixels`, clamped to [-1, 1]."""
        return normalised_vae.decode(vae, latents)

    @torch.no_grad()
    def encode_texts(self, encoders: TextEncoder, texts: Sequence[str]) -> dict[str, Tensor]:
        """`umt5` (B, max_text_tokens, 4096), zeros after a text's end as Wan was trained; on the CPU."""
        device = next(encoders.model.parameters()).device
        tokens = encoders.tokenizer(
            [_clean(text) for text in texts],
            padding="max_length",
            max_length=self._config.conditioning.max_text_tokens,
            truncation=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(device)
        sequence = encoders.model(tokens.input_ids.to(device), mask).last_hidden_state
        return {"umt5": torch.where(mask.bool()[..., None], sequence, torch.zeros_like(sequence)).cpu()}

    def longer_than_limit(self, encoders: TextEncoder, texts: Sequence[str]) -> list[bool]:
        """See `models.base.Family`."""
        ids = encoders.tokenizer([_clean(text) for text in texts], truncation=False, verbose=False).input_ids
        return [len(tokens) > self._config.conditioning.max_text_tokens for tokens in ids]

    # --- the network ---

    def velocity(self, network: nn.Module, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        """One network call: noisy (B, C, F, H, W), t (B,) in [0, 1], source of the same shape or None -> velocity, float32.

        Source tokens follow the noisy tokens; all tokens share t. The published 5B pipeline gives each token its own entry of
        one and the same t, which is this.
        """
        if source is not None and source.shape != noisy.shape:
            raise ValueError(f"source latents {tuple(source.shape)} and noisy latents {tuple(noisy.shape)} must have one shape")
        frames = noisy.shape[2]
        dtype = torch.float32 if torch.is_autocast_enabled(noisy.device.type) else network.patch_embedding.weight.dtype
        latents = noisy if source is None else torch.cat([noisy, source], dim=2)
        with exact_time(network), source_positions(network, self.position, frames, source is not None):
            prediction = network(
                hidden_states=latents.to(dtype),
                timestep=to_wan_timestep(t),
                encoder_hidden_states=text["umt5"].to(noisy.device, dtype),
                return_dict=False,
            )[0]
        return prediction[:, :, :frames].float()

    def solver(self, steps: int, schedule: str, name: str) -> UniPC:
        """UniPC at Wan's own times, or at diffusers' (`unipc_diffusers`), with the published shift where the schedule is `shifted`."""
        times = diffusers_times if name == "unipc_diffusers" else wan_times
        assert isinstance(self.spec.shift, float)
        return UniPC(times(steps, self.spec.shift if schedule == "shifted" else 1.0))


def to_wan_timestep(t: Tensor) -> Tensor:
    """t in [0, 1] -> Wan's unit, thousandths, in float32."""
    return t.float() * 1000


def wan_times(steps: int, shift: float) -> Tensor:
    """The times of Wan2.1's and Wan2.2's own code (wan/utils/fm_solvers_unipc.py): (steps,) in (0, 1), float64.

    u falls from 0.999 by equal steps, of which the last one would reach 0; then the shift.
    """
    first = torch.tensor(0.999).item()  # in float32, as there: whole thousandths must not fall below themselves when they are cut off
    return timesteps.shift(torch.linspace(first, 0.0, steps + 1, dtype=torch.float64)[:-1], shift)


def diffusers_times(steps: int, shift: float) -> Tensor:
    """The times of diffusers' Wan pipelines: u falls from 1 by equal steps, of which the last one would reach 0.001."""
    u = torch.linspace(1.0, 0.001, steps + 1, dtype=torch.float64)[:-1]
    times = timesteps.shift(u, shift)
    times[0] -= 1e-6  # theirs too: at 1 the solver's logarithms are infinite
    return times


class UniPC:
    """UniPC as Wan's own code and diffusers' pipelines set it up (order 2, `bh2`): one pass over `times`, `step` at each.

    Args:
        times: (steps,) in (0, 1), falling: where the path is evaluated; 0 follows.

    Attributes:
        times: (steps,) in [0, 1], what the network is called with: whole thousandths, cut off as both published samplers do.
    """

    def __init__(self, times: Tensor):
        self._scheduler: Any = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000)
        self._scheduler.set_timesteps(len(times))
        # Set here: by `sigmas=` diffusers would shift them again, and versions differ in what they add.
        self._scheduler.sigmas = torch.cat([times, times.new_zeros(1)]).float()
        self._scheduler.timesteps = (times * 1000).long()
        self._scheduler.set_begin_index(0)
        self.times: Tensor = self._scheduler.timesteps.float() / 1000

    def step(self, index: int, v: Tensor, x: Tensor) -> Tensor:
        """From the latents at `times[index]` to the next, given the velocity there; indices in order."""
        return self._scheduler.step(v, self._scheduler.timesteps[index], x, return_dict=False)[0]


@contextmanager
def source_positions(network: nn.Module, position: str, frames: int, with_source: bool) -> Iterator[None]:
    """For one call, the second half of the frames (the source) is rotated as the first half is.

    `same`: exactly so. `bernini`: times one more rotation, by 1 in units of a rotary embedding over the whole head, which is
    how ComfyUI tells its first in-context latent from the target.
    """
    if not with_source:
        yield
        return

    def halve(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        assert args[0].shape[2] == 2 * frames, "noisy and source frames"
        return (args[0][:, :, :frames],)

    def double(module: nn.Module, args: Any, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        source = _turned(*rotation) if position == "bernini" else rotation
        return torch.cat([rotation[0], source[0]], dim=1), torch.cat([rotation[1], source[1]], dim=1)

    handles = [network.rope.register_forward_pre_hook(halve), network.rope.register_forward_hook(double)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _turned(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(1, L, 1, D) cosines and sines of angles a (each twice in a row) -> those of a + 10000^(-2i/D), i the pair's number."""
    width = cos.shape[-1]
    angle = (10000.0 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)).repeat_interleave(2).to(cos.device)
    c, s = angle.cos(), angle.sin()
    return (cos * c - sin * s).to(cos.dtype), (sin * c + cos * s).to(sin.dtype)


@contextmanager
def exact_time(network: nn.Module) -> Iterator[None]:
    """The time embedding in float32 also under autocast, as Wan computes it: 16 bits cannot tell t = 0.770 from 0.773."""
    embedder = network.condition_embedder.time_embedder
    kind = next(embedder.parameters()).device.type
    scopes: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        scopes.append(torch.autocast(kind, enabled=False))
        scopes[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    handles = [embedder.register_forward_pre_hook(enter), embedder.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _network(expert: str) -> Network:
    return wan_files.LOW_NOISE if expert == LOW else wan_files.TRANSFORMER


def _clean(text: str) -> str:
    """As Wan's pipelines clean prompts: entities resolved, runs of blanks made one."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()


def _saved_boundary(path: str | None) -> float | None:
    """`boundary_ratio` of a local diffusers folder."""
    index = Path(path or "").expanduser() / "model_index.json"
    if not path or not index.is_file():
        return None
    value = files.read_json(index).get("boundary_ratio")
    if value is not None and not (isinstance(value, float | int) and 0 < value < 1):
        raise ValueError(f"{index}: boundary_ratio = {value!r} must lie between 0 and 1; set model.boundary")
    return value
