"""musubi-tuner as a host: its own loop, loading, LoRA, caches and saving around our objective.

`train` checks everything that can be checked before a model is loaded, then gives the host's `train(args)` a network trainer
that overrides its seams only: `process_batch`, the `on_*` and `extra_*` hooks and `do_inference`. Hook arguments are taken by
their position, their names differ between the host's versions. The only module beside `patches/` that imports the host.

Order of the hooks: load_transformer, on_transformer_loaded, extra_trainable_params, prepare, resume, on_train_start,
extra_metadata, then for each batch process_batch and on_post_optimizer_step, and on_post_save.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from byg_plugin import families, sampling, timesteps
from byg_plugin.data.buckets import crop_to_bucket, to_tensor
from byg_plugin.data.media import load_image
from byg_plugin.data.tuples import TEXTS, read_tuples
from byg_plugin.hosts import musubi_cache, musubi_options
from byg_plugin.hosts.musubi_fields import BlockSwap, MusubiFields
from byg_plugin.models import flux_tokens
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch, Text, Velocity
from byg_plugin.training.checkpoint import save_file
from byg_plugin.training.config import Config
from byg_plugin.training.ema import EmaWeights
from byg_plugin.training.loop import law_of_t, lora_metadata, share_of_high_noise
from byg_plugin.training.randomness import coin, generator

logger = logging.getLogger(__name__)

STATE = "byg_state.json"
STATE_TENSORS = "byg_state.safetensors"
_TRAINERS = {"wan": ("wan_train_network", "WanNetworkTrainer"), "flux": ("flux_kontext_train_network", "FluxKontextNetworkTrainer")}
_PARSERS = {"wan": "wan_setup_parser", "flux": "flux_kontext_setup_parser"}
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
_PROCESS_BATCH = ("args", "accelerator", "transformer", "network", "batch", "latents", "noise", "noise_scheduler")


# --- the host's modules ---


@dataclass(frozen=True)
class Host:
    """The host's modules that the plugin uses."""

    family: str
    """`wan` or `flux`."""
    trainer: Any
    """The module of the family's network trainer."""

    @property
    def trainer_class(self) -> Any:
        return getattr(self.trainer, _TRAINERS[self.family][1])

    def parser(self) -> argparse.ArgumentParser:
        """The parser of the family's training script."""
        return getattr(self.trainer, _PARSERS[self.family])(self.trainer.setup_parser_common())

    def module(self, name: str) -> Any:
        """Another module of the host."""
        return _import(name)


def family_of(config: Config) -> str:
    """`wan` or `flux`: what the host has a trainer for."""
    return "wan" if config.model.family in families.WAN else "flux"


def open_host(config: Config) -> Host:
    """Import the host and look at what it can do.

    Raises:
        ValueError: it is not there, cannot be imported, or lacks something; lists all that is missing.
    """
    place = _put_on_path(config.model.host_path)
    family = family_of(config)
    if lacking := _lacking(family):
        raise ValueError(
            f"musubi-tuner in {place} is not one that this plugin works with (tested: v0.3.0 and v0.3.4), it lacks:\n"
            + "\n".join(f"  - {line}" for line in lacking)
        )
    return Host(family, _import(_TRAINERS[family][0]))


def _put_on_path(host_path: str | None) -> str:
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


def _import(name: str) -> Any:
    with _patches().imports_without_cuda():
        return importlib.import_module(f"musubi_tuner.{name}")


def _patches() -> Any:
    """`patches/musubi.py`: inside the package once that is installed, beside it in a clone."""
    name = "byg_plugin.patches.musubi"
    if name in sys.modules:
        return sys.modules[name]
    file = Path(__file__).resolve().parents[2] / "patches" / "musubi.py"
    if not file.is_file():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _lacking(family: str) -> list[str]:
    """What an incompatible host does not have, a line each."""
    module, name = _TRAINERS[family]
    try:
        trainer = getattr(_import(module), name, None)
    except ImportError as error:
        return [f"a module that its {name} imports: {error} (install what its README asks for)"]
    if trainer is None:
        return [f"{module}.{name}"]
    lacking = [f"the seam {name}.{seam}" for seam in _SEAMS if not callable(getattr(trainer, seam, None))]
    if "the seam" not in "".join(lacking):
        found = tuple(inspect.signature(trainer.process_batch).parameters)[1:]
        if found[:6] != _PROCESS_BATCH[:6] or len(found) != 12:
            lacking.append(f"{name}.process_batch with the parameters {', '.join(_PROCESS_BATCH)}, ...; it has {', '.join(found)}")
    if family == "wan":
        if not callable(getattr(trainer, "swap_high_low_weights", None)):
            lacking.append(f"{name}.swap_high_low_weights, which exchanges Wan2.2's experts")
        model = _import("wan.modules.model").WanModel
        if "f_indices" not in inspect.signature(model.forward).parameters:
            lacking.append("WanModel.forward(f_indices=...), which gives the source's tokens their positions")
    return lacking


# --- the network's call ---


class HostFamily:
    """What `sampling` and the LoRA's metadata ask of a family, without its models."""

    def __init__(self, config: Config, boundary: float | None = None):
        self.name = config.model.family
        self.boundary = boundary

    def clip_frames(self, frames: int) -> int:
        """4n + 1 for Wan."""
        return (frames - 1) // 4 * 4 + 1 if self.name in families.WAN else 1

    def shifted_nodes(self, nodes: Tensor, latent_shape: Sequence[int]) -> Tensor:
        """The family's inference shift."""
        if self.name in families.WAN:
            return timesteps.shift(nodes, families.WAN[self.name].shift)
        return flux_tokens.shifted_nodes(nodes, latent_shape)


def to_host_timestep(t: Tensor) -> Tensor:
    """t in [0, 1] -> the host's unit for Wan, thousandths, in float32. (Its own training adds 1 to them; its sampling does not.)"""
    return t.float() * 1000


def wan_call(accelerator: Any, transformer: Any, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
    """Velocity of the host's Wan: noisy (B, C, F, H, W), t (B,), source like noisy or None -> like noisy, float32.

    The source's frames follow the noisy ones and have their positions.
    """
    frames = noisy.shape[2]
    latents = noisy if source is None else torch.cat([noisy, source], dim=2)
    # Lists: the host hashes them.
    positions = None if source is None else [[*range(frames)] * 2 for _ in range(len(noisy))]
    length = latents.shape[2] * (latents.shape[3] // 2) * (latents.shape[4] // 2)
    with accelerator.autocast():
        out = transformer(
            latents.float(), t=to_host_timestep(t), context=text["umt5"].to(noisy.device).float(), seq_len=length, f_indices=positions
        )
    return torch.stack(list(out))[:, :, :frames].float()


def flux_call(
    accelerator: Any, transformer: Any, position: str, guidance: float, noisy: Tensor, t: Tensor, text: Text, source: Tensor | None
) -> Tensor:
    """Velocity of the host's FLUX: noisy (B, C, 1, H, W), t (B,), source like noisy or None -> like noisy, float32."""
    h, w = noisy.shape[-2:]
    tokens, ids = flux_tokens.pack(noisy), flux_tokens.position_ids(h, w, 0, noisy.device)
    if source is not None:
        first = 1 if position == "kontext" else 0
        ids = torch.cat([ids, flux_tokens.position_ids(h, w, first, noisy.device)])
        tokens = torch.cat([tokens, flux_tokens.pack(source)], dim=1)
    t5 = text["t5"].to(noisy.device).float()
    with accelerator.autocast():
        out = transformer(
            img=tokens.float(),
            img_ids=ids.expand(len(noisy), -1, -1),
            txt=t5,
            txt_ids=torch.zeros(len(noisy), t5.shape[1], 3, device=noisy.device),
            timesteps=t.float(),
            y=text["pooled"].to(noisy.device).float(),
            guidance=torch.full_like(t, guidance, dtype=torch.float32),
        )
    return flux_tokens.unpack(out[:, : flux_tokens.pack_length(h, w)].float(), h, w)


class HostExperts:
    """Wan2.2's experts, exchanged by the host's trainer; see `musubi_fields.Experts`."""

    def __init__(self, trainer: Any, args: Any, accelerator: Any, transformer: Any):
        self._trainer, self._rest = trainer, (args, accelerator, transformer)
        self.boundary = float(trainer.timestep_boundary)

    @property
    def high(self) -> bool:
        return bool(self._trainer.current_model_is_high_noise)

    def exchange(self) -> None:
        self._trainer.next_model_is_high_noise = not self.high
        self._trainer.swap_high_low_weights(*self._rest)


# --- the network trainer ---


@dataclass
class Progress:
    """Our own count: the host's begins at 0 whenever it is started."""

    step: int = 0
    """Optimizer steps done."""
    micro: int = 0
    """Batches since the last optimizer step."""
    ema: dict[str, Tensor] = field(default_factory=dict)
    """As read from a state; empty for a new run."""


class UnpairedCycleTrainer:
    """The objective in the seams of a host's network trainer: mixed in before it by `make_trainer`.

    The class attributes are set there. Ours are called `byg_…`: the host's classes have a `config` and more of their own.
    """

    byg_config: Config
    byg_host: Host

    def __init__(self) -> None:
        super().__init__()
        self.byg_progress = Progress()
        self.byg_objective = make_objective(self.byg_config.objective)
        self.byg_fields: MusubiFields
        self.byg_family = HostFamily(self.byg_config)
        self._byg_companions: list[Path] = []

    # --- start ---

    def on_transformer_loaded(self, args: Any, accelerator: Any, transformer: Any, *_: Any) -> None:
        """Before the LoRA: what was cached must fit the model."""
        length = getattr(transformer, "text_len", None)
        if length is not None and length != self.byg_config.conditioning.max_text_tokens:
            raise ValueError(
                f"conditioning.max_text_tokens = {self.byg_config.conditioning.max_text_tokens}: this model takes {length}, set it so"
            )

    def extra_trainable_params(self, args: Any, accelerator: Any, network: Any, transformer: Any, trainable_params: Any, *_: Any) -> Any:
        """Nothing more is trained; but this is the last seam before a state is loaded."""
        kind = accelerator.distributed_type.value
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU"):
            raise ValueError(
                f"accelerate launch asks for {kind}, under which this objective's several backward passes go wrong: run plain multi-GPU"
            )
        accelerator.register_save_state_pre_hook(self._save_state)
        accelerator.register_load_state_pre_hook(self._load_state)
        return trainable_params

    def on_train_start(self, args: Any, accelerator: Any, network: Any, transformer: Any, *_: Any) -> None:
        """Everything is on its device and a state is loaded."""
        plain = accelerator.unwrap_model(network)
        ema = EmaWeights(dict(plain.named_parameters()), self.byg_config.objective.ema_decay)
        if self.byg_progress.ema:
            ema.load(self.byg_progress.ema)
        if getattr(self, "high_low_training", False):
            self.byg_family.boundary = float(self.timestep_boundary)  # type: ignore[attr-defined]
        self.byg_high_share = share_of_high_noise(self.byg_config, self.byg_family.boundary)
        swapped = bool(getattr(args, "blocks_to_swap", 0))
        self.byg_fields = MusubiFields(
            plain,
            ema,
            self._call(accelerator, transformer),
            experts=HostExperts(self, args, accelerator, transformer) if self.byg_family.boundary is not None else None,
            swap=BlockSwap(accelerator.unwrap_model(transformer)) if swapped else None,
        )
        if self.byg_progress.step:
            self._continue(args)

    def _call(self, accelerator: Any, transformer: Any) -> Velocity:
        if self.byg_host.family == "wan":
            return partial(wan_call, accelerator, transformer)
        conditioning = self.byg_config.conditioning
        return partial(flux_call, accelerator, transformer, conditioning.position, conditioning.guidance)

    def _continue(self, args: Any) -> None:
        """The host counts from 0 again: it would train all steps once more, and write over files that have the same numbers."""
        done = self.byg_progress.step
        if done >= args.max_train_steps:
            raise ValueError(
                f"musubi.max_train_steps = {args.max_train_steps}, and the state has {done} steps: raise it, nothing is left to do"
            )
        args.max_train_steps -= done
        args.output_name = f"{args.output_name}-from{done:06d}"
        logger.info("resumed at step %d: %d steps are left; this part's files are called %s", done, args.max_train_steps, args.output_name)

    # --- a batch ---

    def process_batch(
        self, args: Any, accelerator: Any, transformer: Any, network: Any, batch: Any, latents: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """All passes of the objective, each differentiated here. What is returned has the loss's value and differentiates nothing."""
        seed, step = self.byg_config.train.seed, self.byg_progress.step
        objective = self.byg_config.objective
        source = latents.to(accelerator.device).float()
        source = source.unsqueeze(2) if source.ndim == 4 else source
        # Position in the run over all ranks: every rank draws other numbers, a resumed run goes on with its own.
        position = (
            step * args.gradient_accumulation_steps + self.byg_progress.micro
        ) * accelerator.num_processes + accelerator.process_index
        self.byg_progress.micro += 1
        rng = generator(seed, "noise", position)
        noise = torch.randn(source.shape, generator=rng)
        t = self._draw_t(len(source), rng, step)
        choice = torch.rand(len(source), generator=generator(seed, "tuple", position)).tolist()
        tokens = self.byg_config.conditioning.max_text_tokens
        texts = musubi_cache.texts_of_batch(batch, len(source), self.byg_host.family, choice, tokens)
        nodes = sampling.sampling_nodes(self.byg_family, objective.rollout_steps, objective.rollout_schedule, tuple(source.shape))  # type: ignore[arg-type]
        step_batch = Batch(
            source=source,
            noise=noise.to(source.device),
            t=t.to(source.device),
            nodes=nodes.to(source.device),
            identity_step=step < objective.identity_warmup_steps or coin(seed, step, objective.identity_probability),
            **{role: {name: value.to(source.device) for name, value in text.items()} for role, text in texts.items()},
        )
        metrics = self.byg_objective.step(self.byg_fields, step_batch, partial(self._backward, accelerator))
        self._stop_if_not_finite(accelerator, metrics)
        values = torch.stack([value.float() for value in metrics.values()]).tolist()
        told = {f"loss/{name}": value for name, value in zip(metrics, values, strict=True)}
        return metrics["loss"].detach().clone().requires_grad_(), told | {"identity_step": float(step_batch.identity_step)}

    def _draw_t(self, size: int, rng: torch.Generator, step: int) -> Tensor:
        law = law_of_t(self.byg_config.objective)
        if self.byg_high_share is None or self.byg_family.boundary is None:
            return timesteps.sample_t(size, rng, **law)
        high = coin(self.byg_config.train.seed, step, self.byg_high_share, "expert")
        return timesteps.sample_t_beside(size, rng, self.byg_family.boundary, high, **law)

    def _backward(self, accelerator: Any, loss: Tensor, *, last: bool) -> float:
        """As the host would; it averages gradients over processes itself, after `process_batch`."""
        accelerator.backward(loss)
        self.byg_fields.backward_done()
        scale = 1.0 if accelerator.scaler is None else float(accelerator.scaler.get_scale())
        return scale / accelerator.gradient_accumulation_steps

    def _stop_if_not_finite(self, accelerator: Any, metrics: Mapping[str, Tensor]) -> None:
        values = dict(metrics)
        if accelerator.scaler is None:  # a scaler expects infinities and skips such a step
            gradients = [p.grad for p in self.byg_fields.network.parameters() if p.grad is not None]
            if gradients:
                values["gradient"] = torch.stack(torch._foreach_norm(gradients)).sum()
        finite = torch.stack([value.float() for value in values.values()]).isfinite().tolist()
        bad = [name for name, good in zip(values, finite, strict=True) if not good]
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} is not finite at step {self.byg_progress.step + 1}; the weights were not changed. Try a lower "
                "musubi.learning_rate or musubi.max_grad_norm, or musubi.mixed_precision = 'bf16'"
            )

    def on_post_optimizer_step(self, args: Any, accelerator: Any, network: Any, transformer: Any, sync_gradients: bool, *_: Any) -> None:
        """Our own step, and the EMA after it."""
        if sync_gradients:
            self.byg_progress.step += 1
            self.byg_progress.micro = 0
            self.byg_fields.ema_weights.update(self.byg_progress.step)

    # --- what is written ---

    def extra_metadata(self, args: Any) -> dict[str, str]:
        """Of the live LoRA; the host adds its own, among them ss_steps."""
        return self._metadata(args, "live")

    def _metadata(self, args: Any, weights: str) -> dict[str, str]:
        side, frames = musubi_cache.sizes(Path(args.dataset_config))
        dataset = self.byg_config.dataset.model_copy(update={"resolution": side, "frames": frames})
        config = self.byg_config.model_copy(update={"dataset": dataset})
        found = lora_metadata(config, self.byg_progress.step, weights, self.byg_family, base=Path(args.dit).name)  # type: ignore[arg-type]
        if weights == "live":
            del found["byg.step"]  # asked for once, at the start
        return found | {"byg.alpha": repr(args.network_alpha), "byg.host": "musubi"}

    def on_post_save(
        self, args: Any, accelerator: Any, network: Any, transformer: Any, ckpt_name: str, save_dtype: Any, metadata: Any, *_: Any
    ) -> None:
        """The EMA beside what the host has saved: `<name>-ema.safetensors`, in the same format."""
        self._drop_orphans()
        if not self.byg_config.objective.ema_decay:
            return
        saved = Path(args.output_dir) / ckpt_name
        companion = saved.with_name(f"{saved.stem}-ema{saved.suffix}")
        partial_file = companion.with_name(f".partial-{companion.name}")
        with self.byg_fields.ema_weights.swapped_in():
            self.byg_fields.network.save_weights(str(partial_file), save_dtype, {**metadata, **self._metadata(args, "ema")})
        os.replace(partial_file, companion)
        self._byg_companions.append(saved)

    def _drop_orphans(self) -> None:
        """The host removes old files of its own (save_last_n_steps) and knows nothing of their companions."""
        for saved in [path for path in self._byg_companions if not path.exists()]:
            saved.with_name(f"{saved.stem}-ema{saved.suffix}").unlink(missing_ok=True)
            self._byg_companions.remove(saved)

    def _save_state(self, models: Any, weights: Any, output_dir: str) -> None:
        """Beside the host's own state, which accelerate pickles; ours is safetensors and JSON."""
        folder = Path(output_dir)
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in self.byg_fields.ema_weights.state().items()}
        save_file(tensors, folder / STATE_TENSORS)
        record = {"step": self.byg_progress.step, "config": self.byg_config.model_dump(mode="json")}
        (folder / STATE).write_text(json.dumps(record, indent=2), encoding="utf-8")

    def _load_state(self, models: Any, input_dir: str) -> None:
        state = read_state(Path(input_dir))
        self.byg_progress = Progress(step=state["step"], ema=_read_ema(Path(input_dir)))

    # --- previews ---

    def process_sample_prompts(self, args: Any, accelerator: Any, sample_prompts: str, *rest: Any) -> Any:
        """Each prompt is an instruction and has a source: `make it snow --ci photo.jpg`, of clips `--cn clip.mp4`."""
        for number, prompt in enumerate(self.byg_host.trainer.load_prompts(sample_prompts), 1):
            source = _source_of(prompt)
            if source is None or not Path(source).is_file():
                what = "has no source" if source is None else f"has the source {source}, which is no file"
                raise ValueError(f"musubi.sample_prompts = {sample_prompts}: prompt {number} {what}; add --ci IMAGE (of a clip --cn CLIP)")
        return super().process_sample_prompts(args, accelerator, sample_prompts, *rest)  # type: ignore[misc]

    def on_before_sample_images(self, *_: Any) -> None:
        """The host switches its blocks itself before and after."""
        if self.byg_fields.swap is not None:
            self.byg_fields.swap.forget()

    def on_after_sample_images(self, *_: Any) -> None:
        """See `on_before_sample_images`."""
        if self.byg_fields.swap is not None:
            self.byg_fields.swap.forget()

    @torch.no_grad()
    def do_inference(
        self,
        accelerator: Any,
        args: Any,
        sample_parameter: Any,
        vae: Any,
        dit_dtype: Any,
        transformer: Any,
        discrete_flow_shift: Any,
        sample_steps: int,
        width: int,
        height: int,
        frame_count: int,
        generator: torch.Generator,
        do_classifier_free_guidance: bool,
        guidance_scale: Any,
        cfg_scale: float | None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        """An edit of the prompt's source by the EMA weights -> pixels (1, 3, F, H, W) in [0, 1].

        Euler over the family's shifted schedule; `edit.py` has the published solver.
        """
        device = accelerator.device
        size = (width // 16 * 16, height // 16 * 16)
        pixels = self._source_pixels(sample_parameter, size, frame_count)
        vae.to(device)
        source = self._encode(vae, pixels.to(device))
        vae.to("cpu")
        text = self._sample_text(sample_parameter, "")
        against = self._sample_text(sample_parameter, "negative_") if do_classifier_free_guidance and cfg_scale not in (None, 1.0) else None
        nodes = sampling.sampling_nodes(self.byg_family, sample_steps, "shifted", tuple(source.shape))  # type: ignore[arg-type]
        noise = torch.randn(source.shape, generator=generator, device=device)
        with self.byg_fields.ema() as velocity:
            latents = sampling.sample(_guided(velocity, against, cfg_scale), noise, text, source, nodes)
        vae.to(device)
        decoded = self._decode(vae, latents)
        vae.to("cpu")
        return (decoded.float().cpu() / 2 + 0.5).clamp(0, 1)

    def _source_pixels(self, prompt: Any, size: tuple[int, int], frames: int) -> Tensor:
        """(1, 3, F, H, W) in [-1, 1]."""
        place = _source_of(prompt)
        assert place is not None, "process_sample_prompts has looked"
        if "control_video_path" not in prompt:
            pictures = [load_image(Path(place))]
        else:
            media = self.byg_host.module("dataset.media_utils")
            pictures = [Image.fromarray(array) for array in media.load_video(place, 0, frames)]
            pictures = pictures[: self.byg_family.clip_frames(len(pictures))]
        return torch.stack([to_tensor(crop_to_bucket(picture, size)) for picture in pictures], dim=1)[None]

    def _encode(self, vae: Any, pixels: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, dtype=vae.dtype, enabled=vae.dtype != torch.float32):
            if self.byg_host.family == "wan":
                return torch.stack(list(vae.encode(pixels))).float()
            return vae.encode(pixels[:, :, 0].to(vae.dtype)).float().unsqueeze(2)

    def _decode(self, vae: Any, latents: Tensor) -> Tensor:
        with torch.autocast(latents.device.type, dtype=vae.dtype, enabled=vae.dtype != torch.float32):
            if self.byg_host.family == "wan":
                return torch.stack(list(vae.decode(latents)))
            return vae.decode(latents[:, :, 0].to(vae.dtype)).unsqueeze(2)

    def _sample_text(self, prompt: Any, kind: str) -> Text | None:
        tokens = self.byg_config.conditioning.max_text_tokens
        if self.byg_host.family == "flux":
            return None if kind else {"t5": prompt["t5_vec"], "pooled": prompt["clip_l_pooler"]}
        rows = prompt.get(f"{kind}t5_embeds")
        if rows is None:
            return None
        return {"umt5": torch.cat([rows, rows.new_zeros(tokens - len(rows), rows.shape[1])])[None]}


def _source_of(prompt: Any) -> str | None:
    images = prompt.get("control_image_path") or [None]
    return prompt.get("control_video_path") or images[0] or prompt.get("image_path")


def _guided(velocity: Velocity, against: Text | None, scale: float | None) -> Velocity:
    """Classifier-free guidance whose negative branch has the source too."""
    if against is None or scale is None:
        return velocity

    def guided(noisy: Tensor, t: Tensor, text: Text, source: Tensor | None) -> Tensor:
        base = velocity(noisy, t, against, source)
        return base + scale * (velocity(noisy, t, text, source) - base)

    return guided


def make_trainer(host: Host, config: Config) -> Any:
    """The network trainer `unpaired-cycle` of a family, a subclass of the host's."""
    name = f"UnpairedCycle{host.trainer_class.__name__}"
    made: type[Any] = type(name, (UnpairedCycleTrainer, host.trainer_class), {"byg_config": config, "byg_host": host})
    return made()


# --- states ---


def read_state(folder: Path) -> dict[str, Any]:
    """What we know of a saved state.

    Raises:
        ValueError: there is none of ours.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        step = state["step"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--resume {folder}: no state of this plugin there ({STATE}: {error}); a state is saved with musubi.save_state = true"
        ) from error
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"--resume {folder}: {STATE} is damaged: step = {step!r}")
    return state


def _read_ema(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / STATE_TENSORS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--resume {folder}: {STATE_TENSORS} cannot be read: {error}") from error


def states(output_dir: Path) -> list[Path]:
    """Saved states, by their steps."""
    found = [path.parent for path in output_dir.glob(f"*/{STATE}")] if output_dir.is_dir() else []
    return sorted(found, key=lambda path: read_state(path)["step"])


def _resume_from(config: Config, resume: str | None, args: Any) -> None:
    folder = Path(args.output_dir)
    there = states(folder)
    if resume is None:
        last = Path(f"{folder / args.output_name}.safetensors")
        if last.exists() or there:
            shown = there[-1] if there else last
            raise ValueError(f"musubi.output_dir = {folder} already has {shown.name}: go on with --resume FOLDER, or choose another")
        return
    if resume == "latest":
        newest = f"--resume {there[-1]}" if there else "none is there yet"
        raise ValueError(f"--resume latest: the host unpickles the state it reads, which can run code, so name the folder: {newest}")
    saved = read_state(Path(resume))["config"]
    now = config.model_dump(mode="json")
    for section, key in (("model", "family"), ("conditioning", "position"), ("lora", "rank")):
        if saved[section][key] != now[section][key]:
            raise ValueError(
                f"--resume: the state was trained with {section}.{key} = {saved[section][key]!r}, now it is {now[section][key]!r}"
            )
    for key in ("objective", "conditioning"):
        changed = [name for name, value in now[key].items() if saved[key].get(name) != value]
        if changed:
            logger.warning("--resume: %s differ from the state's; the curve will differ from an uninterrupted run", ", ".join(changed))
    logger.warning("--resume %s: the host reads optimizer and random states with pickle; only resume from a folder you trust", resume)
    args.resume = resume


# --- commands ---


def prepare(config: Config, resume: str | None = None) -> tuple[Host, argparse.Namespace, int]:
    """Everything that can be checked before a model is loaded: host, options, caches, state.

    Returns:
        the host, its arguments, and the number of its items.

    Raises:
        ValueError: something the user can mend.
    """
    for variable, name in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron"),
    ):
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise ValueError(
                f"accelerate launch asks for {name}, under which this objective's several backward passes go wrong: run plain multi-GPU"
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() not in ("NO", ""):
        raise ValueError("accelerate launch asks for dynamo, inside which the LoRA cannot be taken off: answer NO, and set musubi.compile")
    host = open_host(config)
    args = musubi_options.arguments(config, host.parser())
    share_of_high_noise(config, families.WAN[config.model.family].boundary if config.model.family in families.WAN else None)
    items = musubi_cache.check(Path(args.dataset_config), host.family, read_tuples(config.dataset))
    _resume_from(config, resume, args)
    return host, args, items


def train(config: Config, resume: str | None = None) -> Path:
    """Train in the host; returns the LoRA file.

    Raises:
        ValueError: something the user can mend, before any model is loaded.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    host, args, _ = prepare(config, resume)
    make_trainer(host, config).train(args)
    return Path(args.output_dir) / f"{args.output_name}.safetensors"


def dry_run(config: Config) -> None:
    """Print what would be trained."""
    host, args, items = prepare(config)
    tuples = read_tuples(config.dataset)
    print(f"host: {Path(inspect.getfile(host.trainer)).parent}, {host.trainer_class.__name__}")
    print(f"items with latents and texts: {items}, tuples: {len(tuples)}")
    print(f"LoRA: {args.network_module}, rank {args.network_dim}, alpha {args.network_alpha}")
    print(f"{args.max_train_steps} steps of {args.optimizer_type}")


def cache_texts(config: Config, *, prune: bool = False) -> None:
    """Add the four roles to the host's text cache files; what is there already is kept.

    Raises:
        ValueError: items and tuples do not match, a file is missing or cannot be written.
    """
    if prune:
        raise ValueError("--prune: the host's own caching scripts remove files of items that are gone; leave it out")
    host = open_host(config)
    tuples = read_tuples(config.dataset)
    every = musubi_cache.matched(_dataset_items(host, config), tuples)
    encoder = _encoder_identity(config, host.family)
    todo = [(item, some) for item, some in every if not musubi_cache.is_current(item.path, some, encoder)]
    if todo:
        texts = sorted({getattr(one, role) for _, some in todo for one in some for role in TEXTS})
        encoded = encode_texts(host, config, texts)
        for item, some in todo:
            musubi_cache.write_roles(item, some, encoded.__getitem__, host.family, encoder)
    print(f"{len(todo)} items' texts cached, {len(every) - len(todo)} were current", flush=True)


def _dataset_items(host: Host, config: Config) -> list[musubi_cache.Item]:
    """The items of the host's dataset, as its own caching scripts see them."""
    place = config.musubi.get("dataset_config")
    if not isinstance(place, str) or not Path(place).is_file():
        raise ValueError(f"musubi.dataset_config = {place!r}: no such file; give the host's dataset TOML")
    utils = host.module("dataset.config_utils")
    blueprint = utils.BlueprintGenerator(utils.ConfigSanitizer()).generate(
        utils.load_user_config(place), argparse.Namespace(), architecture=musubi_cache.ARCHITECTURES[host.family][0]
    )
    found = {}
    for dataset in utils.generate_dataset_group_by_blueprint(blueprint.dataset_group).datasets:
        for batch in dataset.retrieve_text_encoder_output_cache_batches(1):
            for item in batch:
                path = Path(item.text_encoder_output_cache_path)
                found[path] = musubi_cache.Item(stem=Path(item.item_key).stem, path=path, caption=item.caption or "")
    return list(found.values())


_ENCODER_OPTIONS = {"wan": ("t5",), "flux": ("text_encoder1", "text_encoder2")}


def _encoder_identity(config: Config, family: str) -> str:
    parts = []
    for name in _ENCODER_OPTIONS[family]:
        place = config.musubi.get(name)
        if not isinstance(place, str) or not Path(place).is_file():
            raise ValueError(f"musubi.{name} = {place!r}: no such file; give the text encoder that the host's own caching takes")
        parts.append(f"{Path(place).name}:{Path(place).stat().st_size}")
    return "|".join([*parts, "fp8" if config.musubi.get("fp8_t5") else "bf16", str(config.conditioning.max_text_tokens)])


@torch.no_grad()
def encode_texts(host: Host, config: Config, texts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Encodings by text, with the host's encoders and settings, on the CPU."""
    from byg_plugin.training.device import resolve_device

    device = resolve_device(config.model.device)
    if host.family == "wan":
        return _encode_wan(host, config, texts, device)
    return _encode_flux(host, config, texts, device)


def _encode_wan(host: Host, config: Config, texts: Sequence[str], device: torch.device) -> dict[str, dict[str, Tensor]]:
    own = config.musubi
    shared = host.module("wan.configs.shared_config").wan_shared_cfg
    encoder = host.module("wan.modules.t5").T5EncoderModel(
        text_len=shared.text_len, dtype=shared.t5_dtype, device=device, weight_path=own["t5"], fp8=bool(own.get("fp8_t5"))
    )
    found = {}
    for text in texts:
        with torch.autocast(device.type, dtype=shared.t5_dtype, enabled=bool(own.get("fp8_t5"))):
            found[text] = {"umt5": encoder([text], device)[0].to(shared.t5_dtype).cpu()}
    return found


def _encode_flux(host: Host, config: Config, texts: Sequence[str], device: torch.device) -> dict[str, dict[str, Tensor]]:
    own = config.musubi
    utils, models = host.module("flux.flux_utils"), host.module("flux.flux_models")
    dtype = torch.float8_e4m3fn if own.get("fp8_t5") else torch.bfloat16
    t5_tokenizer, t5 = utils.load_t5xxl(own["text_encoder1"], dtype=dtype, device=device, disable_mmap=True)
    clip_tokenizer, clip = utils.load_clip_l(own["text_encoder2"], dtype=torch.bfloat16, device=device, disable_mmap=True)
    found = {}
    for text in texts:
        ids = [
            tokenizer([text], max_length=length, padding="max_length", truncation=True, return_tensors="pt")["input_ids"].to(device)
            for tokenizer, length in ((t5_tokenizer, models.T5XXL_MAX_LENGTH), (clip_tokenizer, 77))
        ]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            sequence = t5(input_ids=ids[0], attention_mask=None, output_hidden_states=False)["last_hidden_state"]
            pooled = clip(ids[1])["pooler_output"]
        found[text] = {"t5": sequence[0].to(torch.bfloat16).cpu(), "pooled": pooled.to(torch.bfloat16).cpu()}
    return found
