"""Train the tiny two-expert Wan base of the video demo and write it as a complete diffusers Wan2.2 folder.

    python -m benchmarks.bases.wan --out byg_plugin/demo/video_base --work video_base_work

Every part is of the real class in a tiny size, with the sizes that other programs take for granted: patch (1, 2, 2), 16
latent channels, text of width 4096, boundary 0.875. First the VAE is trained (23 minutes of one core), then one transformer
for all t (15), then a copy of it for each side of the boundary (25). The text encoder is not trained.

Everything that is done lies in `--work`, written every `--save-minutes`: the same command goes on after a kill, and gives
the same base. Its `figures.json` says how good it is, its `history.json` how its losses fell.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import UMT5Config, UMT5EncoderModel

from benchmarks.bases import common, resumable, sample_sheet
from byg_plugin import families
from byg_plugin.demo import video_metrics, video_world, world
from byg_plugin.models.wan import exact_time, to_wan_timestep
from byg_plugin.randomness import derived_seed, generator

FAMILY = "wan2.2-t2v-a14b"
BOUNDARY = float(families.named(FAMILY).boundary or 0)
TEXT_TOKENS = 12  # "a red circle top left moving right on a green background" has ten words; and the end token
TEXT_WIDTH = 4096
LATENT_CHANNELS = 16
LATENT_FRAMES = 1 + (video_world.FRAMES - 1) // 4
LATENT_SIDE = world.SIZE // 8
# Of patches of two by two pixels, as Wan2.2 5B's: half the time of one of pixels with as many weights.
VAE_CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": LATENT_CHANNELS,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
}
TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 256,
    "ffn_dim": 256,
    "num_layers": 5,
    "rope_max_seq_len": 64,
}


STATISTICS_BATCHES = 8  # of 32 clips, whose latents' mean and deviation are the VAE's


class VaeStage(NamedTuple):
    """A cosine of the learning rate with its weights of the loss (squared error: 1)."""

    frames: int  # of each clip; a single one is any of its frames, and a step has twice as many
    steps: int
    rate: float
    absolute: float
    kl: float  # 0: the decoder alone is trained


# What a frame looks like is learned from pictures, at a fifth of a clip's cost, before how frames follow each other. As for the
# images, a high weight of the KL first makes latents that a small flow model can hit.
VAE_STAGES = (
    VaeStage(1, 1500, 2e-3, 0.1, 0.015),
    VaeStage(video_world.FRAMES, 700, 1.5e-3, 0.2, 0.01),
    VaeStage(video_world.FRAMES, 500, 1.5e-3, 0.5, 0.002),
    VaeStage(video_world.FRAMES, 400, 1.5e-3, 1.0, 0.0),
)


@dataclass(frozen=True)
class Budget:
    """How much to train: steps and clips a step, of the VAE and of the flow."""

    vae_share: float = 3.0  # of the steps of VAE_STAGES
    vae_batch: int = 8
    clips: int = 8000  # different clips the flow is trained on
    flow_steps: int = 4000  # of the one transformer that both experts start from, not guided yet
    high_steps: int = 1500  # of the high-noise expert, guided
    low_steps: int = 3000  # of the low-noise expert, guided
    flow_batch: int = 64
    flow_rate: float = 2e-3  # of AdamW, for embeddings, norms and biases
    muon_rate: float = 4e-3  # of Muon, for matrices
    text_rate: float = 2.5e-4  # of Muon, for the matrix that reads the text: a step of it moves what 4096 inputs say at once


OPTIONS = ("vae_share", "clips", "flow_steps", "high_steps", "low_steps")  # what the command line can change of it


@dataclass(frozen=True)
class Work:
    """A folder of states, the budget and the seed that they are a function of, and where the curve is told."""

    folder: Path
    budget: Budget
    seed: int
    minutes: float
    log: common.Log

    def training(self, name: str, **settings: Any) -> resumable.Training:
        """The resumable training of this name; its state is a function of these settings, the seed and nothing else."""
        return resumable.Training(self.folder / f"{name}.safetensors", {"seed": self.seed, **settings}, self.minutes)

    def rng(self, purpose: str, step: int) -> np.random.Generator:
        """Numbers that depend on seed, purpose and step alone."""
        return np.random.default_rng(derived_seed(self.seed, purpose, step))


# --- clips -----------------------------------------------------------------------------------------------------------


def to_pixels(clips: np.ndarray) -> Tensor:
    """(N, F, S, S, 3) uint8 -> (N, 3, F, S, S) in [-1, 1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_clips(pixels: Tensor) -> np.ndarray:
    """The inverse of `to_pixels`, clamped."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()


def sample_clips(rng: np.random.Generator, n: int) -> list[tuple[world.Scene, video_world.Motion]]:
    """`n` random clips: one in ten without an object."""
    return [video_world.sample_clip(rng, int(rng.random() < 0.9)) for _ in range(n)]


def _render(clips: list[tuple[world.Scene, video_world.Motion]]) -> Tensor:
    return to_pixels(np.stack([video_world.render(*clip) for clip in clips]))


# --- the VAE ---------------------------------------------------------------------------------------------------------


def train_vae(work: Work) -> AutoencoderKLWan:
    """An `AutoencoderKLWan` whose `latents_mean` and `latents_std` are those of the world's clips."""
    torch.manual_seed(work.seed)
    vae = AutoencoderKLWan(**VAE_CONFIG, latents_mean=[0.0] * LATENT_CHANNELS, latents_std=[1.0] * LATENT_CHANNELS).train()
    _for_training(vae)
    _start_still(vae)
    for number, stage in enumerate(VAE_STAGES):
        _vae_stage(work, vae, number, stage)
    return _normalised(vae.eval(), work.rng("vae statistics", 0))


class _Convolution(WanCausalConv3d):
    """The same function; a frame without a past is not convolved with the zeros before it: a third of the work."""

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.shape[2] > 1 or cache_x is not None or self.kernel_size[0] == 1:
            return super().forward(x, cache_x)
        padding = self._padding[2], self._padding[0]  # rows, columns
        return F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], padding).unsqueeze(2)


def _for_training(vae: AutoencoderKLWan) -> None:
    """The same function in less than half the time."""
    for module in vae.modules():
        if isinstance(module, WanCausalConv3d):
            module.__class__ = _Convolution
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)


@torch.no_grad()
def _start_still(vae: AutoencoderKLWan) -> None:
    """Every frame starts as a picture of its own: what is learned of pictures holds for all frames of a clip."""
    for name, module in vae.named_modules():
        if not isinstance(module, nn.Conv3d) or module.kernel_size[0] == 1:
            continue
        weight = module.weight
        weight[:, :, :-1] = 0  # the last is the frame itself
        if name.endswith("time_conv"):
            channels = weight.shape[1]
            weight[:, :, -1, 0, 0] = torch.eye(channels).repeat(len(weight) // channels, 1)
            module.bias.zero_()
        else:
            weight[:, :, -1] *= math.sqrt(module.kernel_size[0])  # as if it alone had been drawn


def _vae_stage(work: Work, vae: AutoencoderKLWan, number: int, stage: VaeStage) -> None:
    budget = work.budget
    steps = max(1, round(stage.steps * budget.vae_share))
    vae.encoder.requires_grad_(stage.kl > 0)
    vae.quant_conv.requires_grad_(stage.kl > 0)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(trained, lr=stage.rate, betas=(0.9, 0.99), weight_decay=1e-4)]
    # A stage is a function of those before it.
    training = work.training(f"vae-{number}", stages=VAE_STAGES[: number + 1], share=budget.vae_share, batch=budget.vae_batch)
    first = training.load(vae, optimizers, None)
    for step in range(first, steps):
        purpose = f"vae {number}"
        pixels = _vae_pixels(work.rng(purpose, step), stage.frames, budget.vae_batch)
        losses = _vae_losses(vae, pixels, generator(work.seed, purpose, step))
        optimizers[0].zero_grad()
        (losses["squared"] + stage.absolute * losses["absolute"] + stage.kl * losses["kl"]).backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        _set_rate(optimizers, common.rate_factor(step, steps, 100))
        optimizers[0].step()
        if step % 100 == 99:
            values = {name: loss.item() for name, loss in losses.items()}
            work.log(f"vae-{number}", step + 1, values | {"cpu_seconds": training.cpu_seconds()})
        training.save(step + 1, vae, optimizers, None, now=step + 1 == steps)


def _vae_pixels(rng: np.random.Generator, frames: int, batch: int) -> Tensor:
    """`batch` clips, or twice as many single frames of clips."""
    if frames > 1:
        return _render(sample_clips(rng, batch))
    chosen = [video_world.scenes(*clip)[int(rng.integers(video_world.FRAMES))] for clip in sample_clips(rng, 2 * batch)]
    return to_pixels(np.stack([world.render(scene) for scene in chosen])[:, None])


def _vae_losses(vae: AutoencoderKLWan, pixels: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    # Clips in bfloat16: 1.7 times as fast where a CPU has it.
    with torch.autocast("cpu", torch.bfloat16, enabled=pixels.shape[2] > 1):
        with torch.set_grad_enabled(next(vae.encoder.parameters()).requires_grad):
            posterior = vae.encode(pixels.contiguous(memory_format=torch.channels_last_3d)).latent_dist
        mean, log_variance, std = posterior.mean.float(), posterior.logvar.float(), posterior.std.float()
        decoded = _decode_unclamped(vae, mean + std * torch.randn(mean.shape, generator=rng)).float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / pixels.numel()
    return {"squared": F.mse_loss(decoded, pixels), "absolute": F.l1_loss(decoded, pixels), "kl": kl}


def _decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """`vae.decode` without its clamp, which passes no gradient where a pixel is too bright."""
    vae.clear_cache()
    features = vae.post_quant_conv(latents)
    chunks = []
    for number in range(features.shape[2]):
        vae._conv_idx = [0]
        chunk = features[:, :, number : number + 1]
        chunks.append(vae.decoder(chunk, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=number == 0))
    vae.clear_cache()
    return unpatchify(torch.cat(chunks, dim=2), vae.config.patch_size)


@torch.no_grad()
def _normalised(vae: AutoencoderKLWan, rng: np.random.Generator) -> AutoencoderKLWan:
    modes = torch.cat([vae.encode(_render(sample_clips(rng, 32))).latent_dist.mode() for _ in range(STATISTICS_BATCHES)])
    over = (0, 2, 3, 4)
    vae.register_to_config(latents_mean=modes.mean(over).tolist(), latents_std=modes.std(over).tolist())
    return vae


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(vae.config.latents_mean), torch.tensor(vae.config.latents_std)
    return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)


@torch.no_grad()
def encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Pixels (N, 3, F, S, S) -> normalised latents (N, 16, LATENT_FRAMES, S/8, S/8), the posterior's mode."""
    mean, std = _statistics(vae)
    return (vae.encode(pixels).latent_dist.mode() - mean) / std


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: Tensor) -> np.ndarray:
    """Normalised latents -> (N, F, S, S, 3) uint8."""
    mean, std = _statistics(vae)
    return to_clips(vae.decode(latents * std + mean).sample)


# --- text ------------------------------------------------------------------------------------------------------------


_BUCKETS = 16  # of the encoder's relative positions; the upper half is of words that follow


class TextEncoder(nn.Module):
    """A tiny UMT5 of full width with its tokenizer, frozen as Wan's own.

    Its words are random directions, each with a share of the word before and of the word after it: "red" of "a red circle" is not
    that of "a red background".
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = common.word_tokenizer(
            ["<pad>", "</s>", "<unk>"], "<unk>", "$A </s>", video_world.vocabulary(),
            eos_token="</s>", pad_token="<pad>", model_max_length=TEXT_TOKENS,
        )  # fmt: skip
        self.umt5 = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(self.tokenizer), d_model=TEXT_WIDTH, d_kv=16, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
                feed_forward_proj="gated-gelu", relative_attention_num_buckets=_BUCKETS, relative_attention_max_distance=16,
                pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
            )
        )  # fmt: skip
        bias = self.umt5.get_parameter("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        with torch.no_grad():
            bias.zero_()
            bias[1, 0] = bias[_BUCKETS // 2 + 1, 1] = 10.0  # one head reads the word before, the other the word after
        self.requires_grad_(False)

    def forward(self, texts: list[str]) -> Tensor:
        """(N, TEXT_TOKENS, 4096), zeros after a text's end as Wan's pipelines make them."""
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        sequence = self.umt5(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return sequence * tokens.attention_mask[..., None]


# --- the flow model --------------------------------------------------------------------------------------------------


def make_pictures(vae: AutoencoderKLWan, work: Work, chunk: int = 500) -> common.Pictures:
    """`budget.clips` clips, encoded, in float16; each chunk is kept on the disk once it is done."""
    parts, captions, instructions = [], [], []
    for start in range(0, work.budget.clips, chunk):
        rng = work.rng("clips", start)
        clips = sample_clips(rng, min(chunk, work.budget.clips - start))
        captions += [video_world.caption(*clip) for clip in clips]
        instructions += [video_world.instruction_that_leads_to(rng, *clip) for clip in clips]
        settings = {"stages": VAE_STAGES, "share": work.budget.vae_share, "batch": work.budget.vae_batch, "n": len(clips)}
        kept = work.training(f"clips/{start:06d}", **settings)
        holder = nn.Module()
        holder.register_buffer("latents", torch.empty(len(clips), LATENT_CHANNELS, LATENT_FRAMES, LATENT_SIDE, LATENT_SIDE).half())
        if not kept.load(holder, [], None):
            pieces = [encode(vae, _render(clips[i : i + 50])) for i in range(0, len(clips), 50)]
            holder.latents = torch.cat(pieces).half()
            kept.save(1, holder, [], None, now=True)
        parts.append(holder.latents)
    return common.Pictures(torch.cat(parts), captions, instructions)


def velocity(network: WanTransformer3DModel, noisy: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """The network's velocity (noise - data) at latents (N, 16, F, h, w) and times (N,) in [0, 1], float32."""
    with exact_time(network):
        out = network(hidden_states=noisy, timestep=to_wan_timestep(t), encoder_hidden_states=text, return_dict=False)[0]
    return out.float()


def make_transformer() -> WanTransformer3DModel:
    """A tiny Wan whose output and whose reading of the text start at zero."""
    network = WanTransformer3DModel(**TRANSFORMER_CONFIG)
    for name, parameter in network.named_parameters():
        if name.startswith("proj_out.") or ".attn2.to_out." in name:
            nn.init.zeros_(parameter)
    return network


class Flow(nn.Module):
    """A transformer with the text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.encoder = make_transformer(), TextEncoder()
        self._read: dict[str, Tensor] = {}

    def read(self, texts: list[str]) -> Tensor:
        """(N, TEXT_TOKENS, 4096); what was read is remembered, it takes as long as the transformer."""
        new = sorted({*texts} - self._read.keys())
        if new:
            self._read |= zip(new, self.encoder(new).float(), strict=True)
        return torch.stack([self._read[text] for text in texts])


Times = Callable[[int, torch.Generator], Tensor]


def _low_times(n: int, rng: torch.Generator) -> Tensor:
    """(n,) times that the low-noise expert serves."""
    return BOUNDARY * common.sample_times(n, rng)


def _high_times(n: int, rng: torch.Generator) -> Tensor:
    """(n,) times that the high-noise expert serves, stratified over the batch."""
    return BOUNDARY + (1 - BOUNDARY) * ((torch.arange(n) + torch.rand(n, generator=rng)) / n)[torch.randperm(n, generator=rng)]


def train_flow(vae: AutoencoderKLWan, work: Work) -> tuple[dict[str, WanTransformer3DModel], TextEncoder]:
    """Both experts (`transformer` of high, `transformer_2` of low noise) and the text encoder, averaged over training."""
    pictures, budget = make_pictures(vae, work), work.budget
    torch.manual_seed(work.seed + 1)
    flow = Flow()
    _train(work, "flow", flow, pictures, common.sample_times, budget.flow_steps, guided=0.0)
    experts = {}
    for name, times, steps in (("transformer", _high_times, budget.high_steps), ("transformer_2", _low_times, budget.low_steps)):
        expert = copy.deepcopy(flow)
        _train(work, name, expert, pictures, times, steps, guided=common.GUIDED_SHARE)
        experts[name] = expert.network.eval()
    return experts, flow.encoder.eval()


def _train(
    work: Work,
    name: str,
    flow: Flow,
    pictures: common.Pictures,
    times: Times,
    steps: int,
    *,
    guided: float,
) -> None:
    """Train the network for `steps` and leave the averages of its weights in it; goes on where it stopped."""
    budget, parameters = work.budget, [*flow.network.parameters()]
    optimizers = _optimizers(flow.network, budget)
    average = common.Average(parameters, 0.999)
    others = {"flow": ("high_steps", "low_steps"), "transformer": ("low_steps",), "transformer_2": ("high_steps",)}[name]
    sizes = {key: value for key, value in asdict(budget).items() if key not in others}
    training = work.training(name, stages=VAE_STAGES, transformer=TRANSFORMER_CONFIG, **sizes)
    first = training.load(flow, optimizers, average)
    sums = 0.0
    for step in range(first, steps):
        rng = generator(work.seed, name, step)
        clean = pictures.latents
        pick = torch.randint(len(clean), (budget.flow_batch,), generator=rng)
        clean = clean[pick].float()
        clean = clean + common.DITHER * torch.randn(clean.shape, generator=rng)
        noise, t = torch.randn(clean.shape, generator=rng), times(len(pick), rng)
        at = t.view(-1, 1, 1, 1, 1)
        with _fast():
            loss = _flow_loss(flow, (1 - at) * clean + at * noise, t, pictures.texts(pick, rng), noise - clean, guided)
            for parameter in parameters:
                parameter.grad = None
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        _set_rate(optimizers, common.rate_factor(step, steps, 200))
        for optimizer in optimizers:
            optimizer.step()
        average.update()
        sums += loss.item() / 100
        if step % 100 == 99:
            work.log(name, step + 1, {"flow": sums, "cpu_seconds": training.cpu_seconds()})
            sums = 0.0
        training.save(step + 1, flow, optimizers, average, now=step + 1 == steps)
    average.swap()


def _set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


@contextmanager
def _fast() -> Iterator[None]:
    """bfloat16, and attention by plain products: the fused one's backward takes ten times as long in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def _optimizers(network: WanTransformer3DModel, budget: Budget) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for embeddings, norms and biases."""
    parameters, wide = [*network.parameters()], network.condition_embedder.text_embedder.linear_1.weight
    matrices = [p for p in parameters if p.ndim == 2 and min(p.shape) > 16 and p is not wide]
    taken = {id(p) for p in (*matrices, wide)}
    rest = [p for p in parameters if id(p) not in taken]
    optimizers = common.optimizers(matrices, rest, budget.muon_rate, budget.flow_rate)
    optimizers[0].add_param_group({"params": [wide], "lr": budget.text_rate})
    return optimizers


def _flow_loss(flow: Flow, noisy: Tensor, t: Tensor, texts: list[str], target: Tensor, guided: float) -> Tensor:
    """Mean squared error of the velocity; `guided` is the share by which targets lean away from no caption."""
    v = velocity(flow.network, noisy, t, flow.read(texts))
    if guided:
        with torch.no_grad():
            uncaptioned = velocity(flow.network, noisy, t, flow.read([""]).expand(len(texts), -1, -1))
        target = target + guided * (v.detach() - uncaptioned)
    return (v - target).square().mean()


@torch.no_grad()
def sample(experts: Mapping[str, WanTransformer3DModel], encoder: TextEncoder, texts: list[str], seed: int, steps: int = 20) -> Tensor:
    """Latents of `texts` by Euler steps from t = 1 to 0, evenly spaced, each by the expert that serves its t."""
    shape = (len(texts), LATENT_CHANNELS, LATENT_FRAMES, LATENT_SIDE, LATENT_SIDE)
    x, text = torch.randn(shape, generator=torch.Generator().manual_seed(seed)), encoder(texts)
    for i in range(steps):
        t = 1 - i / steps
        x = x - velocity(_serving(experts, t), x, torch.full((len(texts),), t), text) / steps
    return x


def _serving(experts: Mapping[str, WanTransformer3DModel], t: float) -> WanTransformer3DModel:
    return experts["transformer" if t >= BOUNDARY else "transformer_2"]


# --- figures and files -----------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    vae: AutoencoderKLWan, experts: Mapping[str, WanTransformer3DModel], encoder: TextEncoder, seed: int, n: int = 192
) -> tuple[dict[str, float], np.ndarray, list[str]]:
    """Figures of a base on unseen clips, and `n` samples (n, F, S, S, 3) with their captions."""
    clips = sample_clips(np.random.default_rng([seed, 3]), n)
    captions = [video_world.caption(*clip) for clip in clips]
    batches = [slice(i, i + 32) for i in range(0, n, 32)]
    pixels = _render(clips)
    latents = torch.cat([encode(vae, pixels[batch]) for batch in batches])
    decoded = np.concatenate([decode(vae, latents[batch]) for batch in batches])
    error = decoded / 255.0 - to_clips(pixels) / 255.0
    made = np.concatenate([decode(vae, sample(experts, encoder, captions[batch], seed + batch.start)) for batch in batches])
    verdicts = np.array([video_metrics.follows_caption(clip, *scene) for clip, scene in zip(made, clips, strict=True)])
    figures = {
        "samples": float(n),
        "colours_right": float(verdicts[:, 0].mean()),
        "shapes_right": float(verdicts[:, 1].mean()),
        "ways_right": float(verdicts[:, 2].mean()),
        "all_right": float(verdicts.all(1).mean()),
        "vae_mean_absolute_error": float(np.abs(error).mean()),
        "vae_psnr_db": -10 * math.log10(float(np.square(error).mean())),
        "vae_follows_caption": float(
            np.mean([all(video_metrics.follows_caption(clip, *scene)) for clip, scene in zip(decoded, clips, strict=True)])
        ),
        "latent_std": latents.std().item(),
    }
    text, rng = encoder(captions), torch.Generator().manual_seed(seed)
    for t in (0.05, 0.2, 0.4, 0.6, 0.8, 0.9, 0.98):
        noise, times = torch.randn(latents.shape, generator=rng), torch.full((n,), t)
        wrong = velocity(_serving(experts, t), (1 - t) * latents + t * noise, times, text) - (noise - latents)
        figures[f"velocity_error_t{t}"] = wrong.square().mean().item()
    return figures, made, captions


_CLASSES = {
    "scheduler": ("diffusers", "UniPCMultistepScheduler"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}


def save(out: Path, vae: AutoencoderKLWan, experts: Mapping[str, WanTransformer3DModel], encoder: TextEncoder) -> None:
    """Write a diffusers Wan2.2 folder in float16."""
    # Copies: a module's own `half` would change the one that is still being trained.
    parts = {"vae": vae, **experts, "text_encoder": encoder.umt5}
    for name, module in parts.items():
        copy.deepcopy(module).half().save_pretrained(out / name)
    common.save_tokenizer(encoder.tokenizer, out / "tokenizer")
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=families.named(FAMILY).shift
    )
    scheduler.save_pretrained(out / "scheduler")
    index: dict[str, Any] = {"_class_name": "WanPipeline", "_diffusers_version": diffusers.__version__}
    index |= {"boundary_ratio": BOUNDARY, "expand_timesteps": False}
    index |= {name: list(kind) for name, kind in _CLASSES.items()}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def history(curve: Path, budget: Budget, seed: int) -> dict[str, Any]:
    """How a base was trained, from the curve that its building told."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in resumable.read_curve(curve).values():
        parts.setdefault(row.pop("stage"), []).append(row)
    chosen = {"seed": seed} | {name: getattr(budget, name) for name in OPTIONS}
    options = [f"--{name.replace('_', '-')} {value}" for name, value in chosen.items()]
    return {
        "about": "One core; each part starts from the one before. Losses are means over 100 steps (VAE: of one batch).",
        "command": " ".join(["python -m benchmarks.bases.wan", *options]),
        "vae_stages": [stage._asdict() for stage in VAE_STAGES],
        "parts": [{"what": name, "columns": [*rows[0]], "curve": [[*row.values()] for row in rows]} for name, rows in parts.items()],
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser("python -m benchmarks.bases.wan", description="Train the video demo's base.")
    budget = Budget()
    parser.add_argument("--out", type=Path, required=True, help="folder to write the base to")
    parser.add_argument("--work", type=Path, required=True, help="folder of unfinished work, training curve and sample sheet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the figures in the base are of 1")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="minutes between savings: what a kill loses at most")
    parser.add_argument("--vae-share", type=float, default=budget.vae_share, help="of the VAE's steps: 0.01 for a look")
    for name in OPTIONS[1:]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(budget, name))
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    (args.work / "clips").mkdir(parents=True, exist_ok=True)
    budget, curve = replace(budget, **{name: getattr(args, name) for name in OPTIONS}), args.work / "curve.jsonl"
    work = Work(args.work, budget, args.seed, args.save_minutes, resumable.curve_log(curve))
    vae = train_vae(work)
    experts, encoder = train_flow(vae, work)
    save(args.out, vae, experts, encoder)
    figures, clips, captions = measure(vae, experts, encoder, args.seed)
    figures |= {"seed": args.seed, **asdict(budget)}
    figures = {name: round(value, 5) for name, value in figures.items()}
    print(json.dumps(figures), flush=True)
    for name, contents in (("figures", figures), ("history", history(curve, budget, args.seed))):
        (args.out / f"{name}.json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    sample_sheet.draw_clips(args.work / "samples.png", clips[:16], captions[:16])


if __name__ == "__main__":
    main()
