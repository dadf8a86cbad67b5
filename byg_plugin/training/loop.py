"""The training loop of the embedded host: draws randomness, steps the objective, keeps what a user must not lose."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from torch.utils.data import DataLoader

from byg_plugin import __version__, sampling, timesteps
from byg_plugin.data.dataset import BucketBatches, CachedTuples, collate
from byg_plugin.folders import make_writable
from byg_plugin.hosts import make_host
from byg_plugin.hosts.start_lora import check_start
from byg_plugin.lora_formats import EXPERT_SUFFIXES
from byg_plugin.models.base import Family
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch, Metrics
from byg_plugin.progress import Progress
from byg_plugin.training import checkpoint, preview
from byg_plugin.training.config import Config, ObjectiveConfig
from byg_plugin.training.distributed import any_rank, average_gradients, broadcast_from_first, mean_over_ranks
from byg_plugin.training.randomness import coin, derived_seed, generator

logger = get_logger(__name__)

TEXT_ROLES = ("src_caption", "tgt_caption", "instruction", "reverse_instruction")
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
# What may differ between a checkpoint and the run that goes on from it without changing what is computed.
_FREE_ON_RESUME = {"sample", "output", "train.save_every", "train.keep_last", "train.log_every", "train.validate_every", "train.tracker"}
_FIXED_ON_RESUME = (
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "lora.experts",
    "model.family",
    "model.boundary",
    "conditioning.position",
    "objective.name",
    "train.optimizer",
)


class Interrupted(Exception):
    """Ctrl-C: everything is saved."""


class Trainer:
    """One run of `[train] steps` optimizer steps.

    Args:
        config: the whole configuration.
        family: the model family.
        accelerator: processes, devices and trackers.
        resume: None, "latest" or a checkpoint folder.
        on_step: called with the trainer after every optimizer step, on every rank, when all that belongs to the step is saved.

    Raises:
        ValueError: caches, output folder, checkpoint or options are unusable; nothing was changed.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        accelerator: Accelerator,
        resume: str | None = None,
        on_step: Callable[[Trainer], None] | None = None,
    ):
        self.config, self.family, self.accelerator = config, family, accelerator
        self.on_step = on_step
        self.accumulation = config.accumulation(accelerator.num_processes)
        self.folder = Path(config.output.dir)
        self.high_share = share_of_high_noise(config, family.boundary)
        # Cheap checks first: nothing is loaded for a run that cannot start.
        self.resume_from = self._check_output(resume)
        self.data = CachedTuples(config, family, "train")
        self.validation = CachedTuples(config, family, "validation") if config.dataset.validation_items else None
        self.batches = BucketBatches(self.data, config.train.batch_size, config.train.seed)
        state = checkpoint.load(self.resume_from) if self.resume_from else None
        if state:
            _check_same_run(config, state.config)
            self._check_place(state)
        check_start(config, fresh=state is None)

        # A resumed run has its weights: it needs no file that it started from.
        self.host = make_host(config, family, accelerator.device, fresh=state is None)
        self.parameters = list(self.host.parameters.values())
        broadcast_from_first(self.parameters)
        self.objective = make_objective(config.objective)
        if self.high_share is not None:
            logger.info(
                "boundary t = %s: the high-noise expert trains %.1f %% of the steps, the low-noise expert %.1f %%",
                family.boundary,
                100 * self.high_share,
                100 * (1 - self.high_share),
            )
        self.optimizer = _make_optimizer(config, self.parameters)
        self.step = 0
        if state:
            self._restore(state)
        self._stop = False
        # Steps that each side of the boundary has had so far.
        self._side_steps = Counter(self._side(step) for step in range(self.step))

    # --- start and state ---

    def _check_output(self, resume: str | None) -> Path | None:
        folder = self.folder / "checkpoints"
        existing = checkpoint.checkpoints(folder)
        found = checkpoint.find(folder, resume) if resume else None
        if found and existing and found.resolve() != existing[-1].resolve():
            raise ValueError(
                f"--resume {resume}: output.dir = {self.folder} has the later or other checkpoint {existing[-1].name}, which is never "
                f"overwritten: use --resume latest, or choose another output.dir"
            )
        if existing and not found:
            raise ValueError(
                f"output.dir = {self.folder} already has checkpoints up to {existing[-1].name}: go on with --resume latest, "
                f"or choose another output.dir"
            )
        try:
            make_writable(folder)
        except OSError as error:
            raise ValueError(f"output.dir = {self.folder} is not writable: {error.strerror}; choose another folder") from error
        return found

    def _check_place(self, state: checkpoint.TrainingState) -> None:
        if state.step > self.config.train.steps:
            raise ValueError(
                f"train.steps = {self.config.train.steps} is below the checkpoint's {state.step} steps: raise it, nothing is left to do"
            )
        if state.data != self.data.digest():
            logger.warning("--resume: the tuples are not those of the checkpoint; the order of batches differs from an uninterrupted run")

    def _restore(self, state: checkpoint.TrainingState) -> None:
        for name, parameter in self.host.parameters.items():
            parameter.data.copy_(state.lora[name])
        if self.config.objective.ema_decay:
            # A run that had no EMA goes on with one that starts at its weights.
            self.host.ema_weights.load(state.ema or state.lora)
        self.optimizer.load_state_dict(state.optimizer)
        self.step = state.step
        if self.accelerator.is_main_process:
            # Lines of steps after the checkpoint are about to be made again.
            for path in (self._log_path, self._validation_path):
                _drop_lines_after(path, state.step)

    @property
    def _log_path(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def _validation_path(self) -> Path:
        return self.folder / "validation.jsonl"

    # --- the loop ---

    def run(self) -> Path:
        """Train to `[train] steps`; returns the final LoRA file.

        Raises:
            Interrupted: after Ctrl-C, when everything is saved.
            FloatingPointError: a loss or gradient is not finite; the weights are those before this step.
        """
        config = self.config
        if self.resume_from and self.resume_from.resolve().parent != (self.folder / "checkpoints").resolve():
            self._save()  # a run that goes on in another folder needs nothing of the old one
        # Before the first step a preview alone; later, what a kill between saving and what follows it may have cost.
        self._preview_if_due()
        if self.step:
            self._validate_if_due()
        bar = Progress(total=config.train.steps, initial=self.step, desc="train", disable=not self.accelerator.is_main_process)
        with _interruptible(self), bar:
            for micro_batches in self._loader():
                started = time.perf_counter()
                metrics = self._optimizer_step(micro_batches)
                self.step += 1
                seconds = time.perf_counter() - started
                if self.step % config.train.log_every == 0 or self.step == config.train.steps:
                    self._log(metrics, seconds, bar)
                bar.update(1)
                self._after_step()
        return self._export()

    def _after_step(self) -> None:
        train = self.config.train
        stop = any_rank(self._stop, self.accelerator.device)
        last = self.step == train.steps
        # Saved before anything optional: a preview or a validation may fail, be slow or be interrupted.
        if last or stop or (train.save_every and self.step % train.save_every == 0):
            self._save()
        self._validate_if_due()
        self._preview_if_due()
        if self.on_step is not None:
            self.on_step(self)
        if stop and not last:
            raise Interrupted(f"interrupted after step {self.step}; everything is saved, go on with --resume latest")

    def _due(self, every: int) -> bool:
        return bool(every) and (self.step % every == 0 or self.step == self.config.train.steps)

    # What is on disk is asked by the first process alone: the others would see it change under them and miss the barrier.

    def _validate_if_due(self) -> None:
        if self._due(self.config.train.validate_every):
            if self.accelerator.is_main_process and self.step not in _steps_in(self._validation_path):
                self._validate()
            self.accelerator.wait_for_everyone()

    def _preview_if_due(self) -> None:
        if self._due(self.config.sample.every):
            if self.accelerator.is_main_process and not preview.folder(self.config, self.step).exists():
                preview.write(self.config, self.family, self.host, self.validation or self.data, self.step, self.accelerator)
            self.accelerator.wait_for_everyone()

    def _position(self, step: int, micro: int) -> int:
        """Index of this process's micro-batch in the run over all ranks: `randomness.py` draws from it."""
        return (step * self.accumulation + micro) * self.accelerator.num_processes + self.accelerator.process_index

    def _loader(self) -> Iterator[list[dict[str, Any]]]:
        """Lists of `accumulation` micro-batches, one list an optimizer step, from the current step on."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        order = (
            self.batches.micro_batch(step, micro, rank, world, self.accumulation)
            for step in range(self.step, self.config.train.steps)
            for micro in range(self.accumulation)
        )
        loader = DataLoader(
            self.data, batch_sampler=order, collate_fn=collate, num_workers=self.config.dataset.workers, worker_init_fn=_ignore_interrupts
        )
        step: list[dict[str, Any]] = []
        for micro_batch in loader:
            step.append(micro_batch)
            if len(step) == self.accumulation:
                yield step
                step = []

    def _optimizer_step(self, micro_batches: list[dict[str, Any]]) -> Metrics:
        """One optimizer step on this process's micro-batches; returns its metrics (means over the micro-steps)."""
        config = self.config
        identity_step, high = self._is_identity_step(), self._side(self.step)
        sums: Metrics = {}
        for micro, examples in enumerate(micro_batches):
            position = self._position(self.step, micro)
            torch.manual_seed(derived_seed(config.train.seed, "dropout", position))
            batch = self._batch(examples, generator(config.train.seed, "noise", position), identity_step, high=high)
            for name, value in self.objective.step(self.host, batch, self._backward).items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value / self._share(name)
        average_gradients(self.parameters)
        limit = config.train.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self._stop_if_not_finite(sums | {"gradient norm": norm})
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_ema(high)
        told = {"identity_step": float(identity_step), **({} if high is None else {"high_noise_step": float(high)})}
        return sums | {"grad_norm": norm} | {name: torch.tensor(value, device=norm.device) for name, value in told.items()}

    def _side(self, step: int) -> bool | None:
        """Whether an optimizer step trains the high-noise expert: one toss, the same on every rank; None without experts."""
        return side_of(self.config, self.high_share, step)

    def _update_ema(self, high: bool | None) -> None:
        """Of what this step has trained. An expert's average counts that expert's own steps: it starts as fast as a lone one's."""
        ema = self.host.ema_weights
        if high is None or self.config.lora.experts == "shared" or not ema.decay:
            ema.update(self.step + 1)
            return
        expert = self.family.experts[not high]
        mine = {name for name in self.host.parameters if name.partition(".")[0] == expert}
        self._side_steps[high] += 1
        ema.update(self._side_steps[high], mine)

    def _share(self, name: str) -> int:
        """What a metric of one micro-step is divided by: losses are averaged, counts are added up."""
        return 1 if name.startswith("zero_directions") else self.accumulation

    def _backward(self, loss: Tensor, *, last: bool) -> float:
        """Gradients are averaged over processes once, after the step: `last` needs nothing here."""
        scale = 1.0 / self.accumulation
        (loss * scale).backward()
        return scale

    def _is_identity_step(self) -> bool:
        return is_identity_step(self.config, self.step)

    def _batch(
        self, examples: dict[str, Any], rng: torch.Generator, identity_step: bool, t: Tensor | None = None, high: bool | None = None
    ) -> Batch:
        """A collated micro-batch on the device, with its noise and t (drawn on the CPU: the same on every device).

        `high`: the side of the experts' boundary on which t is drawn.
        """
        objective, device = self.config.objective, self.accelerator.device
        source = examples["source"]
        noise = torch.randn(source.shape, generator=rng)
        if t is None:
            t = draw_t(objective, len(source), rng, self.family.boundary, high)
        nodes = sampling.sampling_nodes(self.family, objective.rollout_steps, objective.rollout_schedule, tuple(source.shape))
        target = examples.get("target")
        return Batch(
            source=source.to(device),
            noise=noise.to(device),
            t=t.to(device),
            nodes=nodes.to(device),
            identity_step=identity_step,
            target=None if target is None else target.to(device),
            **{role: {name: value.to(device) for name, value in examples[role].items()} for role in TEXT_ROLES},
        )

    def _stop_if_not_finite(self, metrics: Metrics) -> None:
        bad = not_finite(metrics)
        if any_rank(bool(bad), self.accelerator.device):
            self.optimizer.zero_grad(set_to_none=True)
            kept = checkpoint.checkpoints(self.folder / "checkpoints")
            raise FloatingPointError(
                f"{', '.join(bad) or 'another process'} is not finite at step {self.step + 1}; the weights were not changed. "
                f"Last checkpoint: {kept[-1] if kept else 'none'}. Try a lower train.lr or train.max_grad_norm, or model.dtype = 'bfloat16'"
            )

    # --- what is written ---

    def _log(self, metrics: Metrics, seconds: float, bar: Any) -> None:
        values = mean_over_ranks(metrics)
        for name in values:
            if name.startswith("zero_directions"):
                values[name] *= self.accelerator.num_processes
        values |= {"lr": learning_rate(self.config, self.step - 1), "seconds": seconds}
        if not self.accelerator.is_main_process:
            return
        shown = {k: f"{values[k]:.3g}" for k in ("loss", "cosine_fwd", "cycle", "identity") if k in values}
        bar.set_postfix(shown, refresh=False)
        _append_json(self._log_path, {"step": self.step, **values})
        self.accelerator.log(values, step=self.step)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            lora = {name: p.detach() for name, p in self.host.parameters.items()}
            ema = self.host.ema_weights.state()
            state = checkpoint.TrainingState(
                step=self.step,
                lora=lora,
                ema=ema if self.config.objective.ema_decay else {},
                optimizer=self.optimizer.state_dict(),
                config=self.config.model_dump(mode="json"),
                data=self.data.digest(),
            )
            folder = self.folder / "checkpoints"
            extra = {"versions": versions(), "command": sys.argv}
            checkpoint.save(folder, state, self._lora_files(), keep_last=self.config.train.keep_last, extra=extra)
        self.accelerator.wait_for_everyone()

    def _lora_files(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        name, host = self.config.output.name, self.host
        saved = {"": ("live", {n: p.detach() for n, p in host.parameters.items()})}
        if self.config.objective.ema_decay:
            saved["-ema"] = ("ema", host.ema_weights.state())
        return {
            f"{name}{kind}{suffix}.safetensors": (tensors, lora_metadata(self.config, self.step, which, self.family, suffix))
            for kind, (which, weights) in saved.items()
            for suffix, tensors in host.lora_files(weights).items()
        }

    def _lora_names(self) -> list[str]:
        """Files of the live weights, the high-noise expert's first."""
        separate = self.high_share is not None and self.config.lora.experts != "shared"
        return [f"{self.config.output.name}{suffix}.safetensors" for suffix in (EXPERT_SUFFIXES.values() if separate else ("",))]

    def _export(self) -> Path:
        """Copies of the last checkpoint's LoRA files beside the checkpoints folder."""
        if self.accelerator.is_main_process:
            last = checkpoint.checkpoints(self.folder / "checkpoints")[-1]
            for path in last.glob("*.safetensors"):
                if path.name == checkpoint.TENSORS:
                    continue
                partial = self.folder / f".partial-{path.name}"
                try:
                    partial.write_bytes(path.read_bytes())
                    os.replace(partial, self.folder / path.name)
                except OSError as error:
                    partial.unlink(missing_ok=True)
                    raise ValueError(f"cannot write {self.folder / path.name}: {error.strerror}; the same file is {path}") from error
        return self.folder / next(iter(self._lora_names()))

    @torch.no_grad()
    def _validate(self) -> None:
        """Terms of the objective on held-out tuples at fixed t and noise: comparable over a run and between runs."""
        assert self.validation is not None, "the configuration asks for validation items"
        sums: dict[str, float] = {}
        count = len(self.validation) * len(VALIDATION_TIMES)
        for item in range(len(self.validation)):
            examples = collate([self.validation[item]])
            for index, t in enumerate(VALIDATION_TIMES):
                rng = generator(0, "validation", item * len(VALIDATION_TIMES) + index)
                batch = self._batch(examples, rng, identity_step=False, t=torch.tensor([t]))
                for name, value in self.objective.step(self.host, batch, None).items():
                    sums[name] = sums.get(name, 0.0) + value.item() / count
        values = {f"validation/{name}": value for name, value in sums.items()}
        _append_json(self._validation_path, {"step": self.step, **values})
        self.accelerator.log(values, step=self.step)


# --- pieces without state ---


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then constant or cosine to 0."""
    train = config.train
    if step < train.lr_warmup_steps:
        return train.lr * (step + 1) / (train.lr_warmup_steps + 1)
    if train.lr_schedule == "constant":
        return train.lr
    progress = (step - train.lr_warmup_steps) / max(1, train.steps - train.lr_warmup_steps)
    return train.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _make_optimizer(config: Config, parameters: list[Any]) -> torch.optim.Optimizer:
    train = config.train
    options: dict[str, Any] = {"lr": train.lr, "betas": train.betas, "weight_decay": train.weight_decay}
    if train.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options)
    if train.optimizer == "muon":
        # Every LoRA weight is a matrix. Matched to AdamW's root mean square, so that learning rates are of the same order.
        return torch.optim.Muon(parameters, lr=train.lr, weight_decay=train.weight_decay, adjust_lr_fn="match_rms_adamw")
    import bitsandbytes as bnb

    return bnb.optim.AdamW8bit(parameters, **options)


def law_of_t(objective: ObjectiveConfig) -> dict[str, Any]:
    """The keywords of `timesteps` that say how t is distributed."""
    return {"distribution": objective.t_distribution, "s": objective.t_shift, "t_min": objective.t_min, "t_max": objective.t_max}


def share_of_high_noise(config: Config, boundary: float | None) -> float | None:
    """Probability that a step trains the high-noise expert; None for a family without experts.

    Raises:
        ValueError: the law of t never reaches an expert that is to be trained.
    """
    if boundary is None:
        return None
    objective = config.objective
    share = timesteps.probability_above(boundary, **law_of_t(objective))
    wanted = {"high_noise": share, "low_noise": 1 - share}
    if config.lora.experts in wanted:
        wanted = {config.lora.experts: wanted[config.lora.experts]}
    for expert, probability in wanted.items():
        if not probability:
            raise ValueError(
                f"objective.t_min = {objective.t_min} and objective.t_max = {objective.t_max} lie on one side of the experts' boundary "
                f"t = {boundary}: the {expert.replace('_', '-')} expert would never be trained; widen them"
            )
    return {"high_noise": 1.0, "low_noise": 0.0}.get(config.lora.experts, share)


def is_identity_step(config: Config, step: int) -> bool:
    """Whether an optimizer step (from 0) has the identity loss alone: in the warm-up, then by a toss, the same on every rank."""
    objective = config.objective
    if objective.name != "unpaired_cycle":
        return False
    return step < objective.identity_warmup_steps or coin(config.train.seed, step, objective.identity_probability)


def side_of(config: Config, high_share: float | None, step: int) -> bool | None:
    """Whether an optimizer step trains the high-noise expert: one toss, the same on every rank; None without experts."""
    return None if high_share is None else coin(config.train.seed, step, high_share, "expert")


def draw_t(objective: ObjectiveConfig, size: int, rng: torch.Generator, boundary: float | None, high: bool | None) -> Tensor:
    """(size,) times of the configured law; `high` (of `side_of`): on that side of the experts' boundary."""
    law = law_of_t(objective)
    if high is None:
        return timesteps.sample_t(size, rng, **law)
    assert boundary is not None
    return timesteps.sample_t_beside(size, rng, boundary, high, **law)


def not_finite(metrics: Mapping[str, Tensor]) -> list[str]:
    """Names of what is infinite or nan. One transfer for all: a read of each would wait for the device that many times a step."""
    finite = torch.stack([value.float() for value in metrics.values()]).isfinite().tolist()
    return [name for name, good in zip(metrics, finite, strict=True) if not good]


def lora_metadata(
    config: Config, step: int, weights: str, family: Family | None = None, suffix: str = "", base: str | None = None
) -> dict[str, str]:
    """Metadata of a LoRA file: what a reader needs and what a maker wants to know. No paths, prompts or keys.

    `family` adds what only video has; `suffix` is what follows the file's stem, and names the expert of a pair; `base` is the base's
    place, where `[model]` does not have it.
    """
    expert = {value: key for key, value in EXPERT_SUFFIXES.items()}.get(suffix)
    base = base or config.model.part(expert or "transformer")
    video = {}
    if family is not None and family.boundary is not None:
        video = {"byg.boundary": repr(family.boundary), "byg.expert": suffix.removeprefix("_") or "both"}
    if family is not None and config.dataset.frames > 1:
        video |= {"byg.frames": str(family.clip_frames(config.dataset.frames)), "byg.fps": repr(config.fps)}
    return {
        **video,
        "byg.version": __version__,
        "byg.family": config.model.family,
        "byg.position": config.conditioning.position,
        "byg.guidance": repr(config.conditioning.guidance),
        "byg.max_text_tokens": str(config.conditioning.max_text_tokens),
        "byg.rank": str(config.lora.rank),
        "byg.alpha": str(config.lora.rank),  # the scale is folded into B
        "byg.base": base.replace("\\", "/").rstrip("/").rpartition("/")[2],
        "byg.resolution": str(config.dataset.resolution),
        "byg.schedule": config.sample.schedule,
        "byg.targets": config.lora.targets or "",
        "byg.objective": config.objective.model_dump_json(),
        "byg.weights": weights,
        "byg.step": str(step),
    }


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {"byg_plugin": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "diffusers", "peft", "accelerate", "transformers", "safetensors", "bitsandbytes"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _check_same_run(config: Config, saved: dict[str, Any]) -> None:
    """Refuse what cannot continue, and say loudly what makes the run another one."""
    now = config.model_dump(mode="json")
    changed = [
        (f"{section}.{key}", saved.get(section, {}).get(key), value)
        for section, values in now.items()
        for key, value in values.items()
        if saved.get(section, {}).get(key) != value
    ]
    fixed = [f"{key}: {old!r} -> {new!r}" for key, old, new in changed if key in _FIXED_ON_RESUME]
    if fixed:
        raise ValueError(f"--resume: the checkpoint was trained with other values of {'; '.join(fixed)}; set them back, or start a new run")
    for key, old, new in changed:
        if key not in _FREE_ON_RESUME and key.partition(".")[0] not in _FREE_ON_RESUME:
            logger.warning("--resume: %s was %r and is now %r; the curve will differ from an uninterrupted run", key, old, new)


def _append_json(path: Path, record: dict[str, Any]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; make room, then go on with --resume latest") from error


def _records(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a kill or a full disk cut off is no line."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _steps_in(path: Path) -> set[int]:
    return {record["step"] for record in _records(path)}


def _drop_lines_after(path: Path, step: int) -> None:
    if path.exists():
        partial = path.with_name(f".partial-{path.name}")
        kept = [json.dumps(record) + "\n" for record in _records(path) if record["step"] <= step]
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)


def _ignore_interrupts(worker: int) -> None:
    """A loader process: Ctrl-C reaches the whole group, and only the training process may answer it. SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """First Ctrl-C (or a scheduler's SIGTERM): finish the step, save, stop. Second: stop at once."""

    def handler(signum: int, frame: FrameType | None) -> None:
        if trainer._stop:
            raise KeyboardInterrupt
        trainer._stop = True
        print("\ninterrupted: saving after this step (Ctrl-C again to stop at once)", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
