"""The objective in the seams of musubi-tuner's network trainers. Imports nothing of the host: its classes are handed in.

Overrides `process_batch`, the `on_*` and `extra_*` hooks and `do_inference`. Hook arguments are taken by their order, their
names differ between the host's versions. Order: load_transformer, on_transformer_loaded, extra_trainable_params, prepare,
resume, on_train_start, extra_metadata, then for each batch process_batch and on_post_optimizer_step, and on_post_save.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from byg_plugin import families, sampling
from byg_plugin.config.sections import Config
from byg_plugin.data.buckets import cover, to_tensor
from byg_plugin.data.rules import ROLES
from byg_plugin.documents import json_value
from byg_plugin.finite import all_finite, first_not_finite, not_finite, refuse_not_finite
from byg_plugin.hosts.batch import draw_batch
from byg_plugin.hosts.ema import EmaWeights
from byg_plugin.hosts.sharding import Shards, bytes_held
from byg_plugin.hosts.shards import make_shards
from byg_plugin.lora.card import LoraCard
from byg_plugin.models.geometry import SpecGeometry
from byg_plugin.musubi import cache as musubi_cache
from byg_plugin.musubi.fields import BlockSwap, MusubiFields
from byg_plugin.musubi.prompts import SIDE, source_frames
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch
from byg_plugin.objectives.draws import share_of_high_noise, side_of
from byg_plugin.randomness import generator
from byg_plugin.training.checkpoint import save_file
from byg_plugin.training.launch import Launch, check_processes

if TYPE_CHECKING:
    from byg_plugin.musubi.checkout import Checkout

logger = logging.getLogger(__name__)

STATE = "byg_state.json"
STATE_TENSORS = "byg_state.safetensors"
_WRITTEN_LAST = "random_states_*.pkl"  # by accelerate, after weights and optimizer


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
    state: Path | None = None
    """The state that was read."""


class UnpairedCycleTrainer:
    """The objective in the seams of a host's network trainer: mixed in before it by `make_trainer`.

    The class attributes are set there. Ours are called `byg_…`: the host's classes have a `config` and more of their own.
    """

    byg_config: Config
    byg_checkout: Checkout
    byg_launch: Launch

    def __init__(self) -> None:
        super().__init__()
        self.byg_progress = Progress()
        self.byg_objective = make_objective(self.byg_config.objective)
        self.byg_fields: MusubiFields
        self.byg_geometry = SpecGeometry(families.named(self.byg_config.model.family))
        self._byg_companions: list[Path] = []
        self._byg_proved = False
        self._byg_shards: Shards | None = None

    # --- start ---

    def on_transformer_loaded(self, args: Any, accelerator: Any, transformer: Any, *_: Any) -> None:
        """Before the LoRA: what was cached must fit the model, whose frozen weights may be cut into shards here."""
        length = getattr(transformer, "text_len", None)
        if length is not None and length != self.byg_config.conditioning.max_text_tokens:
            raise ValueError(
                f"conditioning.max_text_tokens = {self.byg_config.conditioning.max_text_tokens}: this model takes {length}, set it so"
            )
        if self.byg_launch.sharding:
            self._byg_shards = make_shards(self.byg_launch.sharding, accelerator.device)
            self._byg_shards.cut(transformer.eval().requires_grad_(False))

    def extra_trainable_params(self, args: Any, accelerator: Any, network: Any, transformer: Any, trainable_params: Any, *_: Any) -> Any:
        """Nothing more is trained; but this is the last seam before a state is loaded."""
        check_processes(accelerator)
        accelerator.register_save_state_pre_hook(self._save_state)
        accelerator.register_load_state_pre_hook(self._load_state)
        return trainable_params

    def on_train_start(self, args: Any, accelerator: Any, network: Any, transformer: Any, *_: Any) -> None:
        """Everything is on its device and a state is loaded."""
        # Not before: the host freezes the base after `on_transformer_loaded`.
        held, whole = bytes_held([accelerator.unwrap_model(transformer)])
        rank = accelerator.process_index
        logger.info("engine: %s, base held by rank %d: %d of %d bytes", self.byg_launch.name, rank, held, whole)
        plain = accelerator.unwrap_model(network)
        parameters = dict(plain.named_parameters())
        ema = EmaWeights(parameters, self.byg_config.objective.ema_decay)
        if self.byg_progress.state is not None:
            self._check_state(self.byg_progress.state, parameters)
            ema.load(self.byg_progress.ema)
        if getattr(self, "high_low_training", False):
            self.byg_geometry = SpecGeometry(self.byg_geometry.spec, float(self.timestep_boundary))  # type: ignore[attr-defined]
        self.byg_high_share = share_of_high_noise(self.byg_config, self.byg_geometry.boundary)
        swapped = bool(getattr(args, "blocks_to_swap", 0))
        self.byg_fields = MusubiFields(
            plain,
            ema,
            self.byg_checkout.family.call(self.byg_checkout.module, accelerator, transformer, self.byg_config.conditioning),
            experts=HostExperts(self, args, accelerator, transformer) if self.byg_geometry.boundary is not None else None,
            swap=BlockSwap(accelerator.unwrap_model(transformer)) if swapped else None,
            shards=self._byg_shards,
            device=accelerator.device,
        )
        if self.byg_progress.step:
            self._continue(args)

    def _check_state(self, folder: Path, parameters: Mapping[str, Tensor]) -> None:
        """The LoRA that the host has read, and our EMA, which must be of this LoRA."""
        refuse_not_finite(
            ((name, p.detach()) for name, p in parameters.items()), f"--resume {folder}: the host's LoRA", "take another state"
        )
        found = {name: tuple(value.shape) for name, value in self.byg_progress.ema.items()}
        wanted = {name: tuple(value.shape) for name, value in parameters.items()}
        for name in [*wanted, *found]:
            if found.get(name) != wanted.get(name):
                in_state, in_run = (f"has shape {each[name]}" if name in each else "is missing" for each in (found, wanted))
                raise ValueError(f"--resume {folder}: {STATE_TENSORS}: {name} {in_state}, in this run it {in_run}; take another state")

    def _continue(self, args: Any) -> None:
        """The host counts from 0 again: it would train all steps once more, and write over files that have the same numbers."""
        done = self.byg_progress.step
        check_steps_left(args.max_train_steps, done)
        args.max_train_steps -= done
        args.output_name = part_name(args.output_name, done)
        logger.info("resumed at step %d: %d steps are left; this part's files are called %s", done, args.max_train_steps, args.output_name)

    # --- a batch ---

    def process_batch(
        self, args: Any, accelerator: Any, transformer: Any, network: Any, batch: Any, latents: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """All passes of the objective, each differentiated here. What is returned has the loss's value and differentiates nothing."""
        seed, step = self.byg_config.train.seed, self.byg_progress.step
        source = latents.to(accelerator.device).float()
        source = source.unsqueeze(2) if source.ndim == 4 else source
        # Over the run and all ranks: every rank draws other numbers, a resumed run goes on with its own.
        micro_index = (
            step * args.gradient_accumulation_steps + self.byg_progress.micro
        ) * accelerator.num_processes + accelerator.process_index
        self.byg_progress.micro += 1
        choice = torch.rand(len(source), generator=generator(seed, "tuple", micro_index)).tolist()
        texts = musubi_cache.texts_of_batch(
            batch, len(source), self.byg_checkout.family, choice, self.byg_config.conditioning.max_text_tokens
        )
        step_batch = draw_batch(
            self.byg_config.objective,
            self.byg_geometry,
            source,
            texts,
            generator(seed, "noise", micro_index),
            source.device,
            kind=self.byg_objective.plan(step, seed).kind,
            high=side_of(self.byg_config.train.seed, self.byg_high_share, step),
        )
        if not self._byg_proved:
            self.byg_fields.prove_base(step_batch.noise, step_batch.t, step_batch.src_caption)
            self._byg_proved = True
        metrics = self.byg_objective.step(self.byg_fields, step_batch, partial(self._backward, accelerator))
        self._stop_if_not_finite(accelerator, metrics, args, step_batch)
        values = torch.stack([value.float() for value in metrics.values()]).tolist()
        reported = {f"loss/{name}": value for name, value in zip(metrics, values, strict=True)}
        return metrics["loss"].detach().clone().requires_grad_(), reported | {"identity_step": float(step_batch.identity_step)}

    def _backward(self, accelerator: Any, loss: Tensor, *, last: bool) -> float:
        """As the host would; it averages gradients over processes itself, after `process_batch`."""
        accelerator.backward(loss)
        self.byg_fields.backward_done()
        scale = 1.0 if accelerator.scaler is None else float(accelerator.scaler.get_scale())
        return scale / accelerator.gradient_accumulation_steps

    def _stop_if_not_finite(self, accelerator: Any, metrics: Mapping[str, Tensor], args: Any = None, batch: Batch | None = None) -> None:
        values = dict(metrics)
        if accelerator.scaler is None:  # a scaler expects infinities and skips such a step
            gradients = [p.grad for p in self.byg_fields.network.parameters() if p.grad is not None]
            if gradients:
                values["gradient"] = torch.stack(torch._foreach_norm(gradients)).sum()
        if bad := not_finite(values):
            raise FloatingPointError(
                f"{', '.join(bad)} is not finite at step {self.byg_progress.step + 1}; the weights were not changed. "
                + self._why(args, batch)
            )

    def _why(self, args: Any, batch: Batch | None) -> str:
        """The learning rate is blamed only when data and weights are clean."""
        if batch is not None:
            named = {"latents": batch.source} | {
                f"{role} ({part})": value for role in ROLES for part, value in getattr(batch, role).items()
            }
            if (name := first_not_finite(named)) is not None:
                file = _cache_file_not_finite(Path(args.dataset_config))
                return f"The cached {name} of this batch are the reason, they hold NaN or infinite values: remove {file} and cache again"
        if (name := first_not_finite((name, p.detach()) for name, p in self.byg_fields.network.named_parameters())) is not None:
            return f"The weights are the reason: {name} holds NaN or infinite values; go on with --resume of an earlier state"
        return "Data and weights are finite: try a lower musubi.learning_rate or musubi.max_grad_norm, or musubi.mixed_precision = 'bf16'"

    def on_post_optimizer_step(self, args: Any, accelerator: Any, network: Any, transformer: Any, sync_gradients: bool, *_: Any) -> None:
        """Our own step, and the EMA after it."""
        if sync_gradients:
            named = {name: p.detach() for name, p in self.byg_fields.network.named_parameters()}
            if not all_finite(list(named.values())):
                raise FloatingPointError(
                    f"{first_not_finite(named)} is not finite after step {self.byg_progress.step + 1}; nothing of this step is saved. "
                    "Try a lower musubi.learning_rate, or in musubi.optimizer_args a lower weight_decay; go on with --resume of an "
                    "earlier state"
                )
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
        card = LoraCard.of(config, self.byg_progress.step, weights, self.byg_geometry, base=Path(args.dit).name)
        step = None if weights == "live" else card.step  # the live one's is asked for once, at the start
        return replace(card, step=step, alpha=args.network_alpha, host="musubi").to_metadata()

    def on_post_save(
        self, args: Any, accelerator: Any, network: Any, transformer: Any, ckpt_name: str, save_dtype: Any, metadata: Any, *rest: Any
    ) -> None:
        """The EMA beside what the host has saved: `<name>-ema.safetensors`, in the same format."""
        self._drop_orphans()
        if not self.byg_config.objective.ema_decay:
            return
        saved = Path(args.output_dir) / ckpt_name
        companion = saved.with_name(f"{saved.stem}-ema{saved.suffix}")
        partial_file = companion.with_name(f".partial-{companion.name}")
        with _naming_a_full_disk(companion), self.byg_fields.ema_weights.swapped_in():
            self.byg_fields.network.save_weights(str(partial_file), save_dtype, {**metadata, **self._metadata(args, "ema")})
            os.replace(partial_file, companion)
        if args.huggingface_repo_id is not None:
            upload = self.byg_checkout.module("utils.huggingface_utils").upload
            upload(args, str(companion), f"/{companion.name}", force_sync_upload=bool(rest and rest[0]))
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
        record = {"step": self.byg_progress.step, "config": self.byg_config.model_dump(mode="json")}
        with _naming_a_full_disk(folder):
            save_file(tensors, folder / STATE_TENSORS)
            (folder / STATE).write_text(json.dumps(record, indent=2), encoding="utf-8")

    def _load_state(self, models: Any, input_dir: str) -> None:
        state = read_state(Path(input_dir))
        self.byg_progress = Progress(step=state["step"], ema=_read_ema(Path(input_dir)), state=Path(input_dir))

    # --- previews ---

    def process_sample_prompts(self, args: Any, accelerator: Any, sample_prompts: str, *rest: Any) -> Any:
        """Each prompt is an instruction and has a source: `make it snow --ci photo.jpg`, of clips `--cn clip.mp4`."""
        self.byg_checkout.check_prompts(sample_prompts)
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
        size = (width // SIDE * SIDE, height // SIDE * SIDE)
        pixels = self._source_pixels(sample_parameter, size, frame_count)
        vae.to(device)
        family, tokens = self.byg_checkout.family, self.byg_config.conditioning.max_text_tokens
        with _autocast(device, vae):
            source = family.encode_pixels(vae, pixels.to(device))
        vae.to("cpu")
        text = family.text_of_prompt(sample_parameter, "", tokens)
        assert text is not None
        negative = family.text_of_prompt(sample_parameter, "negative_", tokens) if do_classifier_free_guidance else None
        nodes = sampling.sampling_nodes(self.byg_geometry, sample_steps, "shifted", tuple(source.shape))  # type: ignore[arg-type]
        noise = torch.randn(source.shape, generator=generator, device=device)
        with self.byg_fields.ema() as velocity:
            field = velocity
            if negative is not None and cfg_scale is not None:
                spec = self.byg_geometry.spec
                assert spec.musubi is not None
                own = cfg_scale - (spec.musubi.unguided - spec.unguided)  # the host's formula and the family's
                field = sampling.guided(velocity, negative, lambda t: own, self.byg_geometry)
            latents = sampling.sample(field, noise, text, source, nodes)
        vae.to(device)
        with _autocast(device, vae):
            decoded = family.decode_latents(vae, latents)
        vae.to("cpu")
        return (decoded.float().cpu() / 2 + 0.5).clamp(0, 1)

    def _source_pixels(self, prompt: Any, size: tuple[int, int], frames: int) -> Tensor:
        """(1, 3, F, H, W) in [-1, 1]."""
        try:
            pictures = source_frames(prompt, frames, self.byg_checkout.load_video)
        except ValueError as error:  # it could be read when the run began
            raise ValueError(f"musubi.sample_prompts: a prompt {error}, and go on with --resume of the newest state") from error
        if prompt.get("control_video_path"):
            pictures = pictures[: self.byg_geometry.clip_frames(len(pictures))]
        return torch.stack([to_tensor(cover(picture, size)) for picture in pictures], dim=1)[None]


def _autocast(device: torch.device, vae: Any) -> torch.autocast:
    return torch.autocast(device.type, dtype=vae.dtype, enabled=vae.dtype != torch.float32)


def make_trainer(checkout: Checkout, config: Config, launch: Launch | None = None) -> Any:
    """The network trainer `unpaired-cycle` of a family, a subclass of the host's."""
    name = f"UnpairedCycle{checkout.trainer_class.__name__}"
    made: type[Any] = type(
        name,
        (UnpairedCycleTrainer, checkout.trainer_class),
        {"byg_config": config, "byg_checkout": checkout, "byg_launch": launch or Launch()},
    )
    return made()


# --- states ---


def check_steps_left(steps: int, done: int) -> None:
    """Of a run that goes on.

    Raises:
        ValueError: it is at its end.
    """
    if done >= steps:
        raise ValueError(f"musubi.max_train_steps = {steps}, and the state has {done} steps: raise it, nothing is left to do")


def part_name(output_name: str, step: int) -> str:
    """What the files of a part that goes on at a step are called by."""
    return f"{output_name}-from{step:06d}"


def read_state(folder: Path) -> dict[str, Any]:
    """What we know of a saved state.

    Raises:
        ValueError: there is none of ours.
    """
    try:
        state = json_value((folder / STATE).read_bytes().decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--resume {folder}: no state of this plugin there ({STATE}: {error}); a state is saved with musubi.save_state = true"
        ) from error
    step, config = (state.get("step"), state.get("config")) if isinstance(state, dict) else (None, None)
    if type(step) is not int or step < 0 or not isinstance(config, dict) or not all(isinstance(each, dict) for each in config.values()):
        what = f"step = {step!r:.40}, config is a {type(config).__name__}"
        raise ValueError(f"--resume {folder}: {STATE} is damaged: {what}; take another state")
    assert isinstance(state, dict)
    if not any(folder.glob(_WRITTEN_LAST)):
        raise ValueError(f"--resume {folder}: it was not written to its end ({_WRITTEN_LAST} is missing): take another state")
    return state


def _read_ema(folder: Path) -> dict[str, Tensor]:
    try:
        found = load_file(folder / STATE_TENSORS)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--resume {folder}: {STATE_TENSORS} cannot be read: {error}; take another state") from error
    refuse_not_finite(found, f"--resume {folder}: {STATE_TENSORS}", "take another state")
    return found


def states(output_dir: Path) -> list[Path]:
    """Saved states, by their steps; those that cannot be read, or were not written to their end, come first."""
    found = [path.parent for path in output_dir.glob(f"*/{STATE}")] if output_dir.is_dir() else []
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    try:
        return int(read_state(folder)["step"])
    except ValueError:
        return -1


def _cache_file_not_finite(dataset_config: Path) -> str:
    """The first of the host's cache files with NaN or infinite values, with its tensor. Reads them all: for a run that has failed."""
    for folder, _ in musubi_cache.cache_folders(dataset_config):
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    name = first_not_finite((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
            except (OSError, SafetensorError):
                continue
            if name is not None:
                return f"{path} (tensor {name})"
    return "what the host's cache folder has of it"


@contextmanager
def _naming_a_full_disk(path: Path) -> Iterator[None]:
    """safetensors reports a full disk in its own class."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"cannot write {path}: {error}. Make room, then go on with --resume of an earlier state, or start again"
        ) from error
