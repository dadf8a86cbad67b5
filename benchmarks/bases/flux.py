"""Train the tiny FLUX base of the demo and write it as a complete diffusers FLUX.1 folder.

    python -m benchmarks.bases.flux --out byg_plugin/demo/base --report base_report

Every part is of the real class in a tiny size: the VAE is trained first (a quarter of an hour of one core), then the
transformer together with both text encoders on captions of the tiny world (some hours). The shipped one was made in parts, by
`--vae` and `--start`; the folder's `history.json` has their commands, seeds and curves, its `figures.json` says how good it is.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from benchmarks.bases import common, sample_sheet
from byg_plugin.demo import metrics, world
from byg_plugin.models.tokens import pack, position_ids, unpack

TEXT_TOKENS = 16  # "a red circle top left and a blue square top right on a green background" and the end token
CLIP_TOKENS = 18
GUIDANCE = 3.5
LATENT_CHANNELS = 16
# A level less than FLUX's: latents a quarter of the pixels' size, tokens of 8 x 8 pixels. With tokens of 16 x 16, which hold
# half an object and what is around it, even pairs taught only half of the edits (benchmarks/README.md).
VAE_CONFIG = {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": LATENT_CHANNELS,
    "sample_size": world.SIZE,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": True,
}
LATENT_SIDE = world.SIZE // 2 ** (len(VAE_CONFIG["block_out_channels"]) - 1)
TRANSFORMER_CONFIG = {
    "patch_size": 1,
    "in_channels": 4 * LATENT_CHANNELS,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 12, 12),
}


class VaeStage(NamedTuple):
    """A cosine of the learning rate with its weights of the loss (squared error: 1)."""

    steps: int
    rate: float
    absolute: float
    kl: float  # 0: the decoder alone is trained


# A high weight of the KL first makes latents that a small flow model can hit.
VAE_STAGES = (VaeStage(2200, 2e-3, 0.1, 0.012), VaeStage(1800, 2e-3, 0.3, 0.004), VaeStage(1500, 1.5e-3, 1.0, 0.0))


@dataclass(frozen=True)
class Budget:
    """How much to train: steps and pictures a step, of the VAE and of the flow."""

    vae_share: float = 1.0  # of the steps of VAE_STAGES
    vae_batch: int = 16
    flow_steps: int = 12000
    flow_batch: int = 64
    flow_rate: float = 2e-3  # of AdamW, for embeddings, norms and biases
    muon_rate: float = 4e-3  # of Muon, for matrices: further in equal steps than AdamW
    guided_from: float = 0.5  # share of the flow's steps that are not guided yet
    scenes: int = 30000
    bfloat16: bool = True  # matrix products of the flow's training; several times as fast on CPUs that have them


# --- text ----------------------------------------------------------------------------------------------------------


def make_tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """The CLIP-like tokenizer (start, words, end; padded with the end token) and the T5-like one (words, end, pad)."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    clip = common.word_tokenizer(
        [start, end, "<unk>"], "<unk>", f"{start} $A {end}",
        bos_token=start, eos_token=end, pad_token=end, model_max_length=CLIP_TOKENS,
    )  # fmt: skip
    t5 = common.word_tokenizer(
        ["<pad>", "</s>", "<unk>", "<mask>"], "<unk>", "$A </s>",
        eos_token="</s>", pad_token="<pad>", mask_token="<mask>", model_max_length=TEXT_TOKENS,
    )  # fmt: skip
    return clip, t5


def _ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """(N, model_max_length) token ids, padded: FLUX shows the network the padding too."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


class TextEncoders(nn.Module):
    """Tiny CLIP and T5 encoders with their tokenizers, trained jointly with the transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.clip_tokenizer, self.t5_tokenizer = make_tokenizers()
        end = self.clip_tokenizer.eos_token_id
        # transformers takes eos_token_id 2 for the mark of an old CLIP and then pools at the highest id instead.
        assert end != 2, "the end token must not have id 2"
        self.clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.clip_tokenizer), hidden_size=TRANSFORMER_CONFIG["pooled_projection_dim"],
                intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, projection_dim=32,
                max_position_embeddings=CLIP_TOKENS, bos_token_id=0, eos_token_id=end, pad_token_id=end,
            )
        )  # fmt: skip
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(self.t5_tokenizer), d_model=TRANSFORMER_CONFIG["joint_attention_dim"], d_kv=16, d_ff=128,
                num_layers=2, num_heads=4, dropout_rate=0.0, feed_forward_proj="gated-gelu",
                relative_attention_num_buckets=16, relative_attention_max_distance=16,
                pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
            )
        )  # fmt: skip

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """(N, TEXT_TOKENS, 64) of T5 and (N, 32) pooled of CLIP."""
        sequence = self.t5(_ids(self.t5_tokenizer, texts)).last_hidden_state
        return sequence, self.clip(_ids(self.clip_tokenizer, texts)).pooler_output


class MaskedWords(nn.Module):
    """An auxiliary loss that makes T5 read sentences it is not conditioned on here: instructions have no pictures.

    Some words are masked and guessed from the rest. The head is thrown away.
    """

    def __init__(self, encoders: TextEncoders, sentences: list[str]) -> None:
        super().__init__()
        self._ids = _ids(encoders.t5_tokenizer, sentences)
        self._mask_id = encoders.t5_tokenizer.mask_token_id
        self._words = self._ids >= len(encoders.t5_tokenizer.all_special_ids)
        self.head = nn.Linear(TRANSFORMER_CONFIG["joint_attention_dim"], len(encoders.t5_tokenizer))

    def forward(self, t5: nn.Module, rng: torch.Generator, n: int = 32) -> Tensor:
        """Mean cross-entropy over the masked words of `n` random sentences."""
        pick = torch.randint(len(self._ids), (n,), generator=rng)
        ids, hide = self._ids[pick], (torch.rand(n, TEXT_TOKENS, generator=rng) < 0.25) & self._words[pick]
        logits = self.head(t5(ids.masked_fill(hide, self._mask_id)).last_hidden_state)
        return F.cross_entropy(logits[hide], ids[hide])


def sentences(seed: int) -> list[str]:
    """Captions and instructions of every edit type."""
    edits = world.sample_split(6000, seed, "sentences", tuple(world.EDIT_TYPES))
    return sorted({text for e in edits for text in (e.src_caption, e.instruction, e.reverse_instruction)})


# --- pictures ------------------------------------------------------------------------------------------------------


def to_pixels(images: np.ndarray) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """The inverse of `to_pixels`, clamped."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def _render_batch(rng: np.random.Generator, n: int) -> Tensor:
    """`n` random scenes as pixels."""
    return to_pixels(np.stack([world.render(scene) for scene in _scenes(rng, n)]))


def _scenes(rng: np.random.Generator, n: int) -> list[world.Scene]:
    """`n` random scenes: one in ten empty, four with one object, five with two."""
    return [world.sample_scene(rng, int(rng.choice(3, p=(0.1, 0.4, 0.5)))) for _ in range(n)]


def _schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: common.rate_factor(step, steps, warmup))


Snapshot = Callable[[FluxTransformer2DModel, "TextEncoders"], None]


def train_vae(budget: Budget, seed: int, log: common.Log) -> AutoencoderKL:
    """An `AutoencoderKL` whose `shift_factor` and `scaling_factor` make its latents zero-mean, unit-variance overall.

    The KL weight is high for an image VAE: the decoder then forgives the small errors of a small flow model.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL(**VAE_CONFIG).train().to(memory_format=torch.channels_last)
    done = 0
    for number, stage in enumerate(VAE_STAGES):
        steps = round(stage.steps * budget.vae_share)
        rng = np.random.default_rng([seed, 1, number])
        torch.manual_seed(seed + number)
        vae.encoder.requires_grad_(stage.kl > 0)
        optimizer = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], lr=stage.rate, betas=(0.9, 0.99), weight_decay=1e-4)
        schedule = _schedule(optimizer, steps, 100)
        for step in range(done + 1, done + steps + 1):
            losses = _vae_losses(vae, _render_batch(rng, budget.vae_batch))
            optimizer.zero_grad()
            (losses["squared"] + stage.absolute * losses["absolute"] + stage.kl * losses["kl"]).backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                log("vae", step, {name: loss.item() for name, loss in losses.items()})
        done += steps
    return _normalised(vae.eval(), np.random.default_rng([seed, 1, len(VAE_STAGES)]))


def _vae_losses(vae: AutoencoderKL, pixels: Tensor) -> dict[str, Tensor]:
    with torch.set_grad_enabled(next(vae.encoder.parameters()).requires_grad):
        posterior = vae.encode(pixels).latent_dist
    decoded = vae.decode(posterior.sample()).sample
    kl = posterior.kl().mean() / pixels[0].numel()
    return {"squared": F.mse_loss(decoded, pixels), "absolute": F.l1_loss(decoded, pixels), "kl": kl}


@torch.no_grad()
def _normalised(vae: AutoencoderKL, rng: np.random.Generator) -> AutoencoderKL:
    modes = torch.cat([vae.encode(_render_batch(rng, 64)).latent_dist.mode() for _ in range(8)])
    vae.register_to_config(shift_factor=modes.mean().item(), scaling_factor=1 / modes.std().item())
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pixels (N, 3, S, S) -> normalised latents (N, 16, 1, s, s), s the VAE's quarter of S, the posterior's mode."""
    return ((vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor).unsqueeze(2)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Normalised latents -> (N, S, S, 3) uint8."""
    return to_images(vae.decode(latents[:, :, 0] / vae.config.scaling_factor + vae.config.shift_factor).sample)


# --- the flow model ------------------------------------------------------------------------------------------------


def velocity(network: FluxTransformer2DModel, noisy: Tensor, t: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    """The network's velocity (noise - data) at latents (N, 16, 1, h, w) and times (N,) in [0, 1]."""
    h, w = noisy.shape[-2:]
    out = network(
        hidden_states=pack(noisy),
        timestep=t,
        guidance=torch.full_like(t, GUIDANCE),
        encoder_hidden_states=text[0],
        pooled_projections=text[1],
        txt_ids=torch.zeros(text[0].shape[1], 3),
        img_ids=position_ids(h, w, 0, noisy.device),
        return_dict=False,
    )[0]
    return unpack(out, h, w)


def make_transformer() -> FluxTransformer2DModel:
    """A tiny FLUX transformer whose blocks start as the identity and whose output starts at zero."""
    network = FluxTransformer2DModel(**TRANSFORMER_CONFIG)
    for name, parameter in network.named_parameters():
        if "norm" in name and ".linear." in name or name.startswith("proj_out."):
            nn.init.zeros_(parameter)
    return network


def _pictures(vae: AutoencoderKL, n: int, seed: int) -> common.Pictures:
    """`n` scenes."""
    rng = np.random.default_rng([seed, 2])
    scenes = _scenes(rng, n)
    batches = (scenes[i : i + 100] for i in range(0, n, 100))
    latents = [encode(vae, to_pixels(np.stack([world.render(scene) for scene in batch]))) for batch in batches]
    captions = [world.caption(scene) for scene in scenes]
    return common.Pictures(torch.cat(latents), captions, [world.instruction_that_leads_to(rng, scene) for scene in scenes])


def train_flow(
    vae: AutoencoderKL, budget: Budget, seed: int, log: common.Log, snapshot: Snapshot | None = None, start: Path | None = None
) -> tuple[FluxTransformer2DModel, TextEncoders]:
    """The transformer and its text encoders, averaged over training; `snapshot` sees them every 2500 steps.

    `start` is a base to go on from, with this VAE instead of its own.
    """
    pictures = _pictures(vae, budget.scenes, seed)
    torch.manual_seed(seed + 1)
    rng = torch.Generator().manual_seed(seed + 2)
    network, encoders = make_transformer(), TextEncoders()
    if start:
        _load(start, network, encoders)
    masked = MaskedWords(encoders, sentences(seed))
    parameters = [*network.parameters(), *encoders.parameters(), *masked.parameters()]
    average = common.Average(parameters, 0.999)
    optimizers = _optimizers(parameters, budget)
    schedules = [_schedule(optimizer, budget.flow_steps, 200) for optimizer in optimizers]
    sums: dict[str, float] = {}
    for step, pick in zip(range(budget.flow_steps), _shuffled(len(pictures.latents), budget.flow_batch, rng), strict=False):
        clean = pictures.latents[pick]
        clean = clean + common.DITHER * torch.randn(clean.shape, generator=rng)
        noise, t = torch.randn(clean.shape, generator=rng), common.sample_times(len(pick), rng)
        at = t.view(-1, 1, 1, 1, 1)
        texts = pictures.texts(pick, rng)
        guided = common.GUIDED_SHARE if step >= budget.guided_from * budget.flow_steps else 0.0
        # The fused attention's backward takes ten times as long in bfloat16 as plain products do.
        with torch.autocast("cpu", torch.bfloat16, enabled=budget.bfloat16), sdpa_kernel(SDPBackend.MATH):
            flow = _flow_loss(network, encoders, (1 - at) * clean + at * noise, t, texts, noise - clean, guided)
            losses = {"flow": flow, "words": masked(encoders.t5, rng)}
            for parameter in parameters:
                parameter.grad = None
            (losses["flow"] + 0.05 * losses["words"]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for stepped in (*optimizers, *schedules):
            stepped.step()
        average.update()
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss.item() / 100
        if step % 100 == 99:
            log("flow", step + 1, sums)
            sums = {}
        if step % 2500 == 2499 and snapshot:
            average.swap()
            snapshot(network, encoders)
            average.swap()
    average.swap()
    return network.eval(), encoders.eval()


def _flow_loss(
    network: FluxTransformer2DModel,
    encoders: TextEncoders,
    noisy: Tensor,
    t: Tensor,
    texts: list[str],
    target: Tensor,
    guided: float,
) -> Tensor:
    """Mean squared error of the velocity; `guided` is the share by which targets lean away from no caption."""
    v = velocity(network, noisy, t, encoders(texts)).float()
    if guided:
        with torch.no_grad():
            uncaptioned = velocity(network, noisy, t, encoders([""] * len(texts))).float()
        target = target + guided * (v.detach() - uncaptioned)
    return (v - target).square().mean()


def _load(folder: Path, network: FluxTransformer2DModel, encoders: TextEncoders) -> None:
    """Weights of a base that `save` wrote."""
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer", use_safetensors=True)
    network.load_state_dict(transformer.float().state_dict())
    encoders.clip.load_state_dict(CLIPTextModel.from_pretrained(folder / "text_encoder", use_safetensors=True).state_dict())
    encoders.t5.load_state_dict(T5EncoderModel.from_pretrained(folder / "text_encoder_2", use_safetensors=True).state_dict())


def _optimizers(parameters: list[nn.Parameter], budget: Budget) -> list[torch.optim.Optimizer]:
    matrices = [p for p in parameters if p.ndim == 2 and min(p.shape) >= 64]
    taken = {id(p) for p in matrices}
    return common.optimizers(matrices, [p for p in parameters if id(p) not in taken], budget.muon_rate, budget.flow_rate)


def _shuffled(n: int, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of indices, each epoch in a new order."""
    while True:
        yield from torch.randperm(n, generator=rng)[: n // size * size].split(size)


@torch.no_grad()
def sample(network: FluxTransformer2DModel, encoders: TextEncoders, texts: list[str], seed: int, steps: int = 20) -> Tensor:
    """Latents (N, 16, 1, h, w) of `texts` by Euler steps from t = 1 to 0, evenly spaced."""
    noise = torch.randn(len(texts), LATENT_CHANNELS, 1, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(seed))
    x, text = noise, encoders(texts)
    for i in range(steps):
        x = x - velocity(network, x, torch.full((len(texts),), 1 - i / steps), text) / steps
    return x


# --- figures and files ---------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    vae: AutoencoderKL, network: FluxTransformer2DModel, encoders: TextEncoders, seed: int, n: int = 256
) -> tuple[dict[str, float], np.ndarray, list[str]]:
    """Figures of a base on unseen scenes, and `n` samples (n, S, S, 3) with their captions."""
    rng = np.random.default_rng([seed, 3])
    scenes = _scenes(rng, n)
    captions = [world.caption(scene) for scene in scenes]
    pixels = to_pixels(np.stack([world.render(scene) for scene in scenes]))
    latents = encode(vae, pixels)
    error = torch.from_numpy(decode(vae, latents)).float() / 255 - torch.from_numpy(to_images(pixels)).float() / 255
    images = decode(vae, sample(network, encoders, captions, seed))
    verdicts = np.array([metrics.follows_caption(image, scene) for image, scene in zip(images, scenes, strict=True)])
    figures = {
        "samples": float(n),
        "colours_right": float(verdicts[:, 0].mean()),
        "shapes_right": float(verdicts[:, 1].mean()),
        "both_right": float(verdicts.all(1).mean()),
        "vae_mean_absolute_error": error.abs().mean().item(),
        "vae_psnr_db": -10 * math.log10(error.square().mean().item()),
        "latent_std": latents.std().item(),
    }
    text, generator = encoders(captions), torch.Generator().manual_seed(seed)
    for t in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95):
        noise, times = torch.randn(latents.shape, generator=generator), torch.full((n,), t)
        wrong = velocity(network, (1 - t) * latents + t * noise, times, text) - (noise - latents)
        # The one-step prediction x_t - t v is off by t times the velocity's error.
        figures[f"velocity_error_t{t}"] = wrong.square().mean().item()
        figures[f"one_step_rmse_t{t}"] = t * wrong.square().mean().sqrt().item()
    return figures, images, captions


_CLASSES = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "tokenizer_2": ("transformers", "PreTrainedTokenizerFast"),
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def save(out: Path, vae: AutoencoderKL, network: FluxTransformer2DModel, encoders: TextEncoders) -> None:
    """Write a diffusers FLUX.1 folder: the VAE and the transformer in float16, the tiny text encoders in float32."""
    # Copies: a module's own `half` would change the one that is still being trained.
    copy.deepcopy(vae).half().save_pretrained(out / "vae")
    copy.deepcopy(network).half().save_pretrained(out / "transformer")
    encoders.clip.save_pretrained(out / "text_encoder")
    encoders.t5.save_pretrained(out / "text_encoder_2")
    common.save_tokenizer(encoders.clip_tokenizer, out / "tokenizer")
    common.save_tokenizer(encoders.t5_tokenizer, out / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(out / "scheduler")
    index: dict[str, str | list] = {"_class_name": "FluxPipeline", "_diffusers_version": diffusers.__version__}
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    index |= {name: list(kind) for name, kind in _CLASSES.items()}
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def load_vae(folder: Path) -> AutoencoderKL:
    """A trained VAE in a module of its own: one that diffusers loads writes the folder it came from into what is saved.

    Raises:
        OSError: no VAE is there.
        RuntimeError: its weights' shapes are not those of `VAE_CONFIG`.
    """
    trained = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
    vae = AutoencoderKL(**VAE_CONFIG | {name: trained.config[name] for name in ("shift_factor", "scaling_factor")})
    vae.load_state_dict(trained.state_dict())
    return vae.eval()


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser("python -m benchmarks.bases.flux", description="Train the demo's base.")
    budget = Budget()
    parser.add_argument("--out", type=Path, required=True, help="folder to write the base to")
    parser.add_argument("--report", type=Path, required=True, help="folder for the training curve and the sample sheet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--vae", type=Path, help="use this trained VAE folder (float32) and train only the rest")
    parser.add_argument("--start", type=Path, help="go on from this base's transformer and text encoders")
    parser.add_argument("--vae-share", type=float, default=budget.vae_share, help="of the VAE's steps: 0.01 for a look")
    parser.add_argument("--flow-steps", type=int, default=budget.flow_steps, help="0: the VAE alone")
    parser.add_argument("--scenes", type=int, default=budget.scenes, help="different pictures the flow is trained on")
    args = parser.parse_args(arguments)
    if args.vae and not args.flow_steps:
        parser.error("--vae with --flow-steps 0 leaves nothing to train")
    torch.set_num_threads(args.threads)
    budget = replace(budget, vae_share=args.vae_share, flow_steps=args.flow_steps, scenes=args.scenes)
    curve: list[dict[str, float | str]] = []
    started = time.process_time()

    def log(stage: str, step: int, values: dict[str, float]) -> None:
        row = {"stage": stage, "step": step, "cpu_seconds": round(time.process_time() - started, 1)}
        curve.append(row | {name: round(value, 5) for name, value in values.items()})
        print(json.dumps(curve[-1]), flush=True)

    def write_curve() -> None:
        (args.report / "curve.json").write_text(json.dumps(curve, indent=0) + "\n", encoding="utf-8")

    args.report.mkdir(parents=True, exist_ok=True)
    if args.vae:
        try:
            vae = load_vae(args.vae)
        except (OSError, RuntimeError) as error:
            parser.error(f"--vae {args.vae}: not a VAE of VAE_CONFIG: {error}")
    else:
        vae = train_vae(budget, args.seed, log)
        vae.save_pretrained(args.report / "vae")

    def write(network: FluxTransformer2DModel, encoders: TextEncoders) -> None:
        figures, images, captions = measure(vae, network, encoders, args.seed)
        figures |= {"cpu_seconds": time.process_time() - started, "seed": args.seed, **asdict(budget)}
        figures = {name: round(value, 5) for name, value in figures.items()}
        print(json.dumps(figures), flush=True)
        save(args.out, vae, network, encoders)
        (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        write_curve()
        sample_sheet.draw(args.report / "samples.png", images[:32], captions[:32])

    if args.flow_steps:
        write(*train_flow(vae, budget, args.seed, log, write, args.start))
    else:
        write_curve()


if __name__ == "__main__":
    main()
