"""The training loop of the embedded host: draws randomness, steps the objective, keeps what a user must not lose."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from byg_plugin.config.sections import Config
from byg_plugin.data.dataset import BucketBatches, CachedTuples, collate
from byg_plugin.data.tuples import TEXTS
from byg_plugin.documents import json_value
from byg_plugin.families import EXPERT_SUFFIXES
from byg_plugin.finite import all_finite, first_not_finite, not_finite
from byg_plugin.folders import DISCARDED, make_writable, set_aside, write_text
from byg_plugin.hosts import make_host
from byg_plugin.hosts.batch import draw_batch
from byg_plugin.lora.card import LoraCard
from byg_plugin.lora.start import check_start
from byg_plugin.models.base import Family
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import Batch, Metrics
from byg_plugin.objectives.draws import is_identity_step, share_of_high_noise, side_of
from byg_plugin.progress import Progress
from byg_plugin.randomness import derived_seed, generator
from byg_plugin.training import checkpoint, preview
from byg_plugin.training.distributed import any_rank, average_gradients, broadcast_from_first, mean_over_ranks
from byg_plugin.version import __version__

logger = get_logger(__name__)

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
        discard_later: go on from a checkpoint of `output.dir` that has later ones; they and their previews are renamed
            `discarded-step-...`, and lines of logs after it are dropped.
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
        *,
        discard_later: bool = False,
    ):
        self.config, self.family, self.accelerator = config, family, accelerator
        self.on_step = on_step
        self.accumulation = config.accumulation(accelerator.num_processes)
        self.folder = Path(config.output.dir)
        self.high_share = share_of_high_noise(config, family.boundary)
        # Cheap checks first: nothing is loaded for a run that cannot start.
        self.resume_from = self._check_output(resume, discard_later)
        self.data = CachedTuples(config, family, "train")
        self.validation = CachedTuples(config, family, "validation") if config.dataset.validation_items else None
        self.batches = BucketBatches(self.data, config.train.batch_size, config.train.seed)
        state = checkpoint.load(self.resume_from) if self.resume_from else None
        if state:
            assert self.resume_from is not None
            _check_same_run(config, state.config)
            self._check_place(state)
            layout = _layout(config, family, accelerator.device)
            checkpoint.compare(self.resume_from, state, layout)
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
            assert list(layout.lora) == list(self.host.parameters), "the layout is the host's"
            self._restore(state)
        self._clear_later()
        self._stop = False
        # Steps that each side of the boundary has had so far.
        self._side_steps = Counter(self._side(step) for step in range(self.step))

    # --- start and state ---

    def _check_output(self, resume: str | None, discard_later: bool) -> Path | None:
        folder = self.checkpoints
        existing = checkpoint.checkpoints(folder)
        found = None if resume is None else checkpoint.find(folder, resume)
        mine = found is not None and self._is_mine(found)
        if discard_later and (not mine or resume == "latest"):
            raise ValueError(
                f"--discard-later goes with --resume FOLDER, and FOLDER must be a checkpoint in {folder}"
                + (f", e.g. {existing[-1]}" if existing else "; there is none")
            )
        if found and existing and not discard_later and found.resolve() != existing[-1].resolve():
            which = f"{'later' if mine else 'other'} checkpoint {existing[-1].name}"
            discard = f"add --discard-later, which renames later ones to {DISCARDED}step-...; or " if mine else ""
            raise ValueError(
                f"--resume {resume}: output.dir = {self.folder} has the {which}, which is never overwritten: {discard}choose another "
                f"output.dir; or go on from the newest with --resume latest"
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
        # The options are this run's: a checkpoint's own would silently outlive a changed weight decay.
        options = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state.optimizer["state"], "param_groups": options})
        self.step = state.step

    def _clear_later(self) -> None:
        """Before the first step: what lies after it, of a killed start or of discarded checkpoints, is about to be made again."""
        self.accelerator.wait_for_everyone()  # the others have looked at what is there
        if not self.accelerator.is_main_process:
            return
        if self.resume_from and self._is_mine(self.resume_from):
            with self._told_if_full(self.checkpoints):
                later = checkpoint.later(self.checkpoints, self.resume_from)
                for path in later:
                    logger.warning("--discard-later: %s is now %s", path, set_aside(path))
                if later:
                    preview.set_aside_later(self.config, self.step)
        for path in (self._log_path, self._validation_path):
            with self._told_if_full(path):
                _drop_lines_after(path, self.step)

    def _is_mine(self, path: Path) -> bool:
        return path.resolve() in [each.resolve() for each in checkpoint.checkpoints(self.checkpoints)]

    @contextmanager
    def _told_if_full(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            remedy = checkpoint.make_room(self.checkpoints)
            raise ValueError(f"cannot write {path}: {error.strerror or error}. {remedy}") from error

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.folder / "checkpoints"

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
            FloatingPointError: a loss, a gradient or a weight is not finite; nothing of this step is saved.
        """
        config = self.config
        if self.resume_from and not self._is_mine(self.resume_from):
            self._save()  # a run that goes on in another folder needs nothing of the old one
        # Before the first step a preview alone; later, what a kill between saving and what follows it may have cost.
        self._preview_if_due(again=not self.step)
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

    def _preview_if_due(self, again: bool = True) -> None:
        """`again`: also where there is one, which then is of an earlier start."""
        if self._due(self.config.sample.every):
            data = self.validation or self.data
            if self.accelerator.is_main_process and (again or not preview.is_whole(self.config, data, self.step)):
                preview.write(self.config, self.family, self.host, data, self.step, self.accelerator)
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
        terms: list[Metrics] = []
        for micro, examples in enumerate(micro_batches):
            position = self._position(self.step, micro)
            torch.manual_seed(derived_seed(config.train.seed, "dropout", position))
            batch = self._batch(examples, generator(config.train.seed, "noise", position), identity_step, high=high)
            terms.append(self.objective.step(self.host, batch, self._backward))
            for name, value in terms[-1].items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value / self._share(name)
        average_gradients(self.parameters)
        limit = config.train.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self._stop_if_not_finite(sums | {"gradient norm": norm}, micro_batches, terms)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._stop_if_spoilt()
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
        return draw_batch(
            self.config.objective,
            self.family,
            examples["source"],
            examples,
            rng,
            self.accelerator.device,
            identity_step=identity_step,
            high=high,
            t=t,
            target=examples.get("target"),
        )

    def _stop_if_not_finite(self, metrics: Metrics, micro_batches: Sequence[dict[str, Any]] = (), terms: Sequence[Metrics] = ()) -> None:
        """Before the optimizer: names the term, and where it came from: the data, the weights, or else the step's size."""
        bad = not_finite(metrics)
        if any_rank(bool(bad), self.accelerator.device):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"{', '.join(bad) or 'another process'} is not finite at step {self.step + 1}; the weights were not changed. "
                f"{self._why(micro_batches, terms)}. {self._way_back()}"
            )

    def _stop_if_spoilt(self) -> None:
        """After the optimizer: what it has made of finite gradients (a weight decay of 1e308, a rate of 1e30) must not be saved."""
        if not all_finite([p.detach() for p in self.parameters]):
            name = first_not_finite((name, p.detach()) for name, p in self.host.parameters.items())
            raise FloatingPointError(
                f"{name} is not finite after step {self.step + 1}, although its gradient was; nothing of this step is saved. "
                f"Try a lower train.lr ({self.config.train.lr}) or train.weight_decay ({self.config.train.weight_decay}). "
                + self._way_back()
            )

    def _stop_if_not_savable(self, state: checkpoint.TrainingState) -> None:
        """Also what no step looks at: the averages and the optimizer's moments."""
        moments, _ = checkpoint.split_optimizer(state.optimizer)
        every = {f"the LoRA's {k}": v for k, v in state.lora.items()} | {f"the EMA's {k}": v for k, v in state.ema.items()} | moments
        if (name := first_not_finite(every)) is not None:
            raise FloatingPointError(
                f"{name} is not finite after step {self.step}; nothing of it is saved. "
                f"Try a lower train.lr or train.max_grad_norm. {self._way_back()}"
            )

    def _why(self, micro_batches: Sequence[dict[str, Any]], terms: Sequence[Metrics]) -> str:
        """Where a loss that is not finite came from. The learning rate is blamed only when data and weights are clean."""
        guilty = [examples for examples, found in zip(micro_batches, terms, strict=True) if not_finite(found)] or list(micro_batches)
        entries = [self._not_finite_entry(examples) for examples in guilty]
        if found := [entry for entry in entries if entry]:
            return f"The data are the reason: {'; '.join(found)}; remove dataset.cache_dir and cache again"
        weights = {f"the LoRA's {name}": p.detach() for name, p in self.host.parameters.items()}
        weights |= {f"the EMA's {name}": value for name, value in self.host.ema_weights.state().items()}
        networks: dict[str, nn.Module] = getattr(self.host, "networks", {})
        frozen = ((f"{key}'s {name}", p.detach()) for key, network in networks.items() for name, p in network.named_parameters())
        if (name := first_not_finite(weights)) is not None or (name := first_not_finite(frozen)) is not None:
            return f"The weights are the reason: {name} holds NaN or infinite values"
        tuples = ", ".join(dict.fromkeys(self._tuple_name(index) for examples in guilty for index in examples["index"]))
        told = f" (tuples: {tuples:.300})" if tuples else ""
        return f"Data{told} and weights are finite: try a lower train.lr or train.max_grad_norm, or model.dtype = 'bfloat16'"

    def _not_finite_entry(self, examples: Mapping[str, Any]) -> str | None:
        """The first tensor of a micro-batch with NaN or infinite values, by its tuple."""
        named = {name: examples[name] for name in ("source", "target") if name in examples}
        named |= {f"{role} ({part})": value for role in TEXTS for part, value in examples[role].items()}
        for place, index in enumerate(examples["index"]):
            if (name := first_not_finite((name, value[place]) for name, value in named.items())) is not None:
                return f"the cached {name} of tuple {self._tuple_name(index)} holds NaN or infinite values"
        return None

    def _tuple_name(self, index: int) -> str:
        item = self.data.tuples[index]
        return f"{item.id} ({item.source})"

    def _way_back(self) -> str:
        told = checkpoint.way_back(self.checkpoints)
        return told[0].upper() + told[1:]

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
        self._append(self._log_path, values)

    def _append(self, path: Path, values: dict[str, float]) -> None:
        """A line of a log, and what the tracker makes of it."""
        with self._told_if_full(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, **values}) + "\n")
        if self.accelerator.trackers:
            # TensorBoard's writer has a thread of its own, whose errors come here, one line late.
            with self._told_if_full(Path(f"{self.folder} (train.tracker)")):
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
            self._stop_if_not_savable(state)
            extra = {"versions": versions(), "command": sys.argv}
            checkpoint.save(self.checkpoints, state, self._lora_files(), keep_last=self.config.train.keep_last, extra=extra)
        self.accelerator.wait_for_everyone()

    def _lora_files(self) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        name, host = self.config.output.name, self.host
        saved = {"": ("live", {n: p.detach() for n, p in host.parameters.items()})}
        if self.config.objective.ema_decay:
            saved["-ema"] = ("ema", host.ema_weights.state())
        return {
            f"{name}{kind}{suffix}.safetensors": (tensors, LoraCard.of(self.config, self.step, which, self.family, suffix).to_metadata())
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
            last = checkpoint.checkpoints(self.checkpoints)[-1]
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
        self._append(self._validation_path, values)


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


def _layout(config: Config, family: Family, device: torch.device) -> checkpoint.Layout:
    """What a checkpoint of this run holds. The optimizer tells: it is asked for one step of zeros of each shape."""
    from byg_plugin.hosts.diffusers import lora_layout

    shapes = lora_layout(config, family)
    states: dict[tuple[int, ...], dict[str, str]] = {}
    for shape in set(shapes.values()):
        weight = nn.Parameter(torch.zeros(shape, device=device))
        weight.grad = torch.zeros_like(weight)
        optimizer = _make_optimizer(config, [weight])
        optimizer.step()
        tensors, scalars = checkpoint.split_optimizer(optimizer.state_dict())
        states[shape] = {name.removeprefix("optimizer/0/"): checkpoint.kind(value) for name, value in tensors.items()}
        states[shape] |= {name: checkpoint.kind(value) for name, value in scalars["state"]["0"].items()}
    return checkpoint.Layout(
        lora={name: checkpoint.kind(torch.empty(shape, device="meta")) for name, shape in shapes.items()},
        optimizer={name: states[shape] for name, shape in shapes.items()},
    )


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


def _step_of(line: str) -> int | None:
    """The step of a line that we wrote; None: someone else's."""
    try:
        record = json_value(line)
    except ValueError:
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else None


def _lines(path: Path) -> list[str]:
    """The lines of a log with their ends; one that a kill or a full disk cut off is no line."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape") if path.is_file() else ""
    return [line for line in text.split("\n")[:-1] if line]


def _steps_in(path: Path) -> set[int]:
    return {step for line in _lines(path) if (step := _step_of(line)) is not None}


def _drop_lines_after(path: Path, step: int) -> None:
    """Lines that are none of ours stay where they are.

    Raises:
        OSError: the log cannot be read or written.
    """
    if not path.is_file():
        return
    steps = [(line, _step_of(line)) for line in _lines(path)]
    if foreign := [line for line, found in steps if found is None]:
        logger.warning("%s: %d lines are not a record of a step and are left as they are, e.g. %.60r", path, len(foreign), foreign[0])
    write_text(path, "".join(f"{line}\n" for line, found in steps if found is None or found <= step))


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
