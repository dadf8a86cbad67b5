"""The training loop of the embedded host: draws randomness, steps the objective, keeps what a user must not lose."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import Tensor
from torch.utils.data import DataLoader

from byg_plugin.config.sections import Config
from byg_plugin.critics import check_critic, check_instructions, make_critic
from byg_plugin.data.dataset import BucketBatches, CachedTuples, collate
from byg_plugin.families import EXPERT_SUFFIXES
from byg_plugin.folders import set_aside
from byg_plugin.hosts import adapter_shapes, make_host
from byg_plugin.hosts.batch import draw_batch
from byg_plugin.hosts.blocks import blocks_of
from byg_plugin.hosts.sharding import bytes_held
from byg_plugin.lora.start import check_start
from byg_plugin.models.base import Family
from byg_plugin.objectives import make_objective
from byg_plugin.objectives.base import EDIT, FULL, IDENTITY, Batch, Critique, Metrics
from byg_plugin.objectives.draws import share_of_high_noise, side_of
from byg_plugin.progress import Progress, report
from byg_plugin.randomness import derived_seed, generator
from byg_plugin.training import best, checkpoint, logs, preview
from byg_plugin.training.checkpoint import naming_a_full_disk
from byg_plugin.training.diagnosis import Diagnosis
from byg_plugin.training.engine import Engine
from byg_plugin.training.engines import make_engine
from byg_plugin.training.headers import exported, header
from byg_plugin.training.launch import Launch
from byg_plugin.training.optimizers import learning_rate
from byg_plugin.training.resume import find_start, is_in, load_start
from byg_plugin.training.watchdog import Watchdog, hear_in, watched
from byg_plugin.version import versions

logger = get_logger(__name__)

PROBED_SOURCES = 16  # pictures that a critic is tried with
VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
_MOVED = 10.0  # seconds: an optimizer step takes less
_ONE_SIGNAL = 1.0  # seconds in which signals that say the same are one


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
        launch: what the launcher asks for; None: plain processes.
        critique: for an objective that asks one; None: that of `[critic]`.
        on_step: called with the trainer after every optimizer step, on every rank, when all that belongs to the step is saved.
        evaluate: the same, and before the first step of a run that goes on.

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
        launch: Launch | None = None,
        critique: Critique | None = None,
        evaluate: Callable[[Trainer], None] | None = None,
    ):
        self.config, self.family, self.accelerator = config, family, accelerator
        self.on_step, self.evaluate = on_step, evaluate
        self.accumulation, launch = config.accumulation(accelerator.num_processes), launch or Launch()
        self.folder = Path(config.output.dir)
        self.high_share = share_of_high_noise(config, family.boundary)
        # Cheap checks first: nothing is loaded for a run that cannot start.
        self.resume_from = find_start(self.folder, resume, discard_later)
        self.objective = make_objective(config.objective)
        critic = check_critic(config) if config.objective.criticised and critique is None else None
        self.data = CachedTuples(config, family, "train")
        self.validation = CachedTuples(config, family, "validation") if config.dataset.validation_items else None
        if critic is not None:
            check_instructions(critic, self._judged())
        types = {item.edit_type for item in self.data.tuples}
        for key, named in config.objective.named_types.items():
            if missing := set(named) - types:
                raise ValueError(
                    f"objective.{key}: no tuple has edit_type = {', '.join(map(repr, sorted(missing)))}, so it would never be used; name "
                    "types of dataset.tuples"
                )
        beside = config.objective.texts_beside(config.model.spec)
        self.beside = {name: self.data.encoding(text) for name, text in beside.items()}
        self.batches = BucketBatches(self.data, config.train.batch_size, config.train.seed)
        state = None
        if self.resume_from:
            state, layout = load_start(
                self.resume_from, config, family, self.objective, self.data.digest(), accelerator.device, launch.stage
            )
        check_start(config, None if state else partial(adapter_shapes, config, family, (EDIT,)))
        for doubt in (*config.doubts(), *config.objective.doubts_of_types(types)):
            logger.warning(doubt)
        if critic is not None:
            shown = [self.data[index]["source"] for index in range(min(PROBED_SOURCES, len(self.data)))]
            critique = make_critic(config, family, accelerator.device, shown)

        # A resumed run has its weights: it needs no file that it started from.
        self.host = make_host(
            config, family, accelerator.device, fresh=state is None, adapters=self.objective.adapters, sharding=launch.sharding
        )
        self.host.critique = critique
        trained = {name: adapter.parameters for name, adapter in self.host.adapters.items()}
        self.watchdog = Watchdog(
            config.train.collective_timeout, accelerator.process_index, self._rescue, others=accelerator.num_processes > 1
        )
        self._own_engine = make_engine(launch, config.train, trained, self.accumulation, accelerator.device)
        self.engine = watched(self._own_engine, self.watchdog, sharded=bool(launch.sharding))
        if launch.sharding:
            hear_in([block for network in self.host.networks.values() for block in blocks_of(network)], self.watchdog)
        self.engine.broadcast()
        held, whole = bytes_held(list(self.host.networks.values()))
        logger.info("engine: %s, base held by this rank %d of %d bytes", launch.name, held, whole, main_process_only=False)
        self.diagnosis = Diagnosis(config.train, self.host, self.data, self.engine, self.checkpoints)
        if self.high_share is not None:
            logger.info(
                "boundary t = %s: the high-noise expert trains %.1f %% of the steps, the low-noise expert %.1f %%",
                family.boundary,
                100 * self.high_share,
                100 * (1 - self.high_share),
            )
        self.step = 0
        self._refuse_another_step(state.step if state else 0)
        if state:
            assert {n: list(layout[n].lora) for n in layout} == {n: list(trained[n]) for n in trained}, "the layout is the host's"
            self._restore(state)
        self._clear_later()
        self._stop = False
        self._moving = False
        """Whether the weights are on their way from one step to the next; an exception leaves them there."""
        # Held meanwhile, and while a checkpoint is written: the watchdog's thread writes one too.
        self._still = threading.Lock()
        self._holds_still = False
        self._rescued: int | None = None
        """The step that the watchdog's thread has saved."""
        # Steps that have trained each adapter, of separate experts each one's part of it.
        self._steps_of = Counter(trained for step in range(self.step) for trained in self._trained_by(step))

    # --- start and state ---

    def _judged(self) -> list[tuple[str, str]]:
        """(id, instruction) of the tuples that a critic is asked about."""
        types = self.config.objective.asked_types
        every = [*self.data.tuples, *(self.validation.tuples if self.validation else ())]
        return [(item.id, item.instruction) for item in every if not types or item.edit_type in types]

    def _refuse_another_step(self, step: int) -> None:
        """The processes of a second machine may have found another checkpoint, or none."""
        mean = self.engine.mean({"step": torch.tensor(float(step), device=self.accelerator.device)})["step"]
        if self.engine.any(mean != step):
            raise ValueError(
                f"output.dir = {self.folder}: process {self.accelerator.process_index} goes on from step {step}, others from another: "
                "give a folder that all machines see"
            )

    def _restore(self, state: checkpoint.TrainingState) -> None:
        for name, adapter in self.host.adapters.items():
            found = state.adapters[name]
            for key, parameter in adapter.parameters.items():
                parameter.data.copy_(found.lora[key])
            if adapter.ema.decay:
                # A run that had no EMA goes on with one that starts at its weights.
                adapter.ema.load(found.ema or found.lora)
        self.engine.load_state({name: adapter.optimizer for name, adapter in state.adapters.items()})
        self.step = state.step

    def _clear_later(self) -> None:
        """Before the first step: what lies after it, of a killed start or of discarded checkpoints, is about to be made again."""
        self.accelerator.wait_for_everyone()  # the others have looked at what is there
        if not self.accelerator.is_main_process:
            return
        if self.resume_from and is_in(self.checkpoints, self.resume_from):
            with naming_a_full_disk(self.checkpoints, self.checkpoints):
                later = checkpoint.later(self.checkpoints, self.resume_from)
                for path in later:
                    logger.warning("--discard-later: %s is now %s", path, set_aside(path))
                if later:
                    preview.set_aside_later(preview.folder(self.config.output, 0).parent, self.step)
        for path in (self._log_path, self._validation_path):
            with naming_a_full_disk(path, self.checkpoints):
                logs.drop_lines_after(path, self.step)

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
        with self.watchdog.running():
            return self._run()

    def _run(self) -> Path:
        config = self.config
        if self.resume_from and not is_in(self.checkpoints, self.resume_from):
            self._save()  # a run that goes on in another folder needs nothing of the old one
        # Before the first step a preview alone; later, what a kill between saving and what follows it may have cost.
        self._preview_if_due(again=not self.step)
        if self.step:
            self._validate_if_due()
            if self.evaluate is not None:
                self.evaluate(self)
        bar = Progress(total=config.train.steps, initial=self.step, desc="train", disable=not self.accelerator.is_main_process)
        with _interruptible(self), bar:
            for micro_batches in self._loader():
                started = time.perf_counter()
                try:
                    metrics = self._optimizer_step(micro_batches)
                    self.step += 1
                    self._moving = False
                finally:
                    if self._holds_still:
                        self._holds_still = False
                        self._still.release()
                seconds = time.perf_counter() - started
                if self.step % config.train.log_every == 0 or self.step == config.train.steps:
                    self._log(metrics, seconds, bar)
                bar.update(1)
                self._after_step()
        return self._export()

    def together(self, what: str) -> AbstractContextManager[None]:
        """Around passes: with a base in shards they wait for the others, with a whole one for nobody."""
        return self.watchdog.waiting(what) if self.host.sharding else nullcontext()

    def _rescue(self, *, ends: bool) -> str:
        """In the watchdog's thread, while the main one waits or works: save the last whole step, where the others need not be asked.

        Args:
            ends: nothing comes after it; else the main thread works on, and may save yet.
        """
        if not self._still.acquire(timeout=_MOVED):
            return self._not_saved(ends)
        try:
            saved = checkpoint.checkpoints(self.checkpoints)
            if saved and saved[-1].name == checkpoint.name_of(self.step):
                return f"step {self.step} is saved: go on with --resume latest"
            if self._moving or not self.engine.whole or not self.step:
                return self._not_saved(ends)
            # A step that has just ended may still be on its way on the device: only in a hang nothing is.
            with _beside(self.accelerator.device) if ends else nullcontext():
                self._write_checkpoint(self._state(self._own_engine))
            self._rescued = self.step
            return f"step {self.step} is saved now: go on with --resume latest"
        finally:
            self._still.release()

    def _not_saved(self, ends: bool) -> str:
        if not ends:
            return f"step {self.step} is not saved yet: training saves it when it is through with what it does"
        return f"step {self.step} could not be saved; {checkpoint.way_back(self.checkpoints)}"

    def _after_step(self) -> None:
        train = self.config.train
        stop = self.engine.any(self._stop)
        last = self.step == train.steps
        # Saved before anything optional: a preview or a validation may fail, be slow or be interrupted.
        if last or stop or (train.save_every and self.step % train.save_every == 0):
            self._save()
        self._validate_if_due()
        self._preview_if_due()
        if self.evaluate is not None:
            self.evaluate(self)
        if self.on_step is not None:
            self.on_step(self)
        if stop and not last:
            raise Interrupted(f"interrupted after step {self.step}; everything is saved, go on with --resume latest")

    def due(self, every: int) -> bool:
        """Whether this step is one of every so many (0: never), or the last."""
        return bool(every) and (self.step % every == 0 or self.step == self.config.train.steps)

    # What is on disk is asked by the first process alone: the others would see it change under them and miss the barrier.

    def _validate_if_due(self) -> None:
        if self.due(self.config.train.validate_every):
            if self.anyone(self.accelerator.is_main_process and self.step not in logs.steps_in(self._validation_path)):
                with self.together(f"the validation at step {self.step}"):
                    self._validate()
            self.accelerator.wait_for_everyone()

    def _preview_if_due(self, again: bool = True) -> None:
        """`again`: also where there is one, which then is of an earlier start."""
        if self.due(self.config.sample.every):
            data = self.validation or self.data
            first = self.accelerator.is_main_process
            if self.anyone(first and (again or not preview.is_whole(self.config, data, self.step))):
                with self.together(f"the preview at step {self.step}"):
                    preview.write(self.config, self.family, self.host, data, self.step, self.accelerator, writes=first, agree=self.anyone)
            self.accelerator.wait_for_everyone()

    def anyone(self, asked: bool) -> bool:
        """Whether a process says yes whose passes this one takes part in: weights in shards are gathered by all of them."""
        return self.engine.any(asked) if self.host.sharding else asked

    def _micro_index(self, step: int, micro: int) -> int:
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
        micro_batches: list[dict[str, Any]] = []
        for micro_batch in loader:
            # Each tensor of a loader process holds an open file until it is gone, and a process may have 1,024.
            micro_batches.append(_cloned(micro_batch) if self.config.dataset.workers else micro_batch)
            if len(micro_batches) == self.accumulation:
                yield micro_batches
                micro_batches = []

    def _optimizer_step(self, micro_batches: list[dict[str, Any]]) -> Metrics:
        """One optimizer step on this process's micro-batches; returns its metrics (means over the micro-steps)."""
        config = self.config
        plan, high = self.objective.plan(self.step, config.train.seed), self._side(self.step)
        sums: Metrics = {}
        terms: list[Metrics] = []
        self.engine.begin(self._trained_by(self.step))
        for micro, examples in enumerate(micro_batches):
            micro_index = self._micro_index(self.step, micro)
            torch.manual_seed(derived_seed(config.train.seed, "dropout", micro_index))
            batch = self._batch(examples, generator(config.train.seed, "noise", micro_index), plan.kind, high=high)
            with self.together(f"the passes of step {self.step + 1}"):
                terms.append(self.objective.step(self.host, batch, self._backward))
            for name, value in terms[-1].items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value / self._share(name)

        def check(norms: Mapping[str, Tensor]) -> None:
            trained = {name: norms[name] for name in plan.adapters}
            self.diagnosis.before_step(self.step + 1, sums, trained, micro_batches, terms)
            self._still.acquire()
            self._holds_still = self._moving = True

        norms = self.engine.step(learning_rate(config.train, self.step), check)
        self.diagnosis.after_step(self.step + 1)
        self._update_ema()
        kinds = {"identity_step": plan.kind.partition("-")[0] == IDENTITY, **({} if high is None else {"high_noise_step": high})}
        flags = {name: torch.tensor(float(value), device=self.accelerator.device) for name, value in kinds.items()}
        return sums | _by_adapter("grad_norm", norms) | flags

    def _backward(self, loss: Tensor, *, last: bool) -> float:
        scale = self.engine.backward(loss, last=last)
        self.host.after_backward()
        return scale

    def _side(self, step: int) -> bool | None:
        """Whether an optimizer step trains the high-noise expert: one toss, the same on every rank; None without experts."""
        return side_of(self.config.train.seed, self.high_share, step)

    def _trained_by(self, step: int) -> list[tuple[str, str | None]]:
        """(adapter, expert) that an optimizer step trains; the expert is None where there is one LoRA for all."""
        high = self._side(step)
        expert = None if high is None or self.config.lora.experts == "shared" else self.family.experts[not high]
        return [(adapter, expert) for adapter in self.objective.plan(step, self.config.train.seed).adapters]

    def _update_ema(self) -> None:
        """Of what this step has trained. An expert's average counts that expert's own steps: it starts as fast as a lone one's."""
        for trained in self._trained_by(self.step):
            self._steps_of[trained] += 1
            name, expert = trained
            adapter = self.host.adapters[name]
            names = None if expert is None else {key for key in adapter.parameters if key.partition(".")[0] == expert}
            adapter.ema.update(self._steps_of[trained], names)

    def _share(self, name: str) -> int:
        """What a metric of one micro-step is divided by: losses are averaged, counts are added up."""
        return 1 if name.startswith("zero_directions") else self.accumulation

    def _batch(
        self, examples: dict[str, Any], rng: torch.Generator, kind: str = FULL, t: Tensor | None = None, high: bool | None = None
    ) -> Batch:
        return draw_batch(
            self.config.objective,
            self.family,
            examples["source"],
            examples,
            rng,
            self.accelerator.device,
            kind=kind,
            high=high,
            t=t,
            target=examples.get("target"),
            words=examples["words"],
            beside=self.beside,
            updates=sum(count for (adapter, _), count in self._steps_of.items() if adapter == EDIT),
        )

    # --- what is written ---

    def _log(self, metrics: Metrics, seconds: float, bar: Any) -> None:
        values = self.engine.mean(metrics)
        for name in values:
            if name.startswith("zero_directions"):
                values[name] *= self.accelerator.num_processes
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # a norm whose update was left out may not be
        values |= {"lr": learning_rate(self.config.train, self.step - 1), "seconds": seconds, **self.diagnosis.left_out()}
        if not self.accelerator.is_main_process:
            return
        shown = {k: f"{values[k]:.3g}" for k in ("loss", "cosine_fwd", "cycle", "identity") if k in values}
        bar.set_postfix(shown, refresh=False)
        self.append(self._log_path, values)

    def append(self, path: Path, values: Mapping[str, float]) -> None:
        """A line of a log, and what the tracker makes of it."""
        with naming_a_full_disk(path, self.checkpoints):
            logs.append(path, self.step, values)
        if self.accelerator.trackers:
            # TensorBoard's writer has a thread of its own, whose errors come here, one line late.
            with naming_a_full_disk(Path(f"{self.folder} (train.tracker)"), self.checkpoints):
                self.accelerator.log(values, step=self.step)

    def _state(self, engine: Engine) -> checkpoint.TrainingState:
        """What a checkpoint holds, whole on every process."""
        optimizers = engine.state()
        return checkpoint.TrainingState(
            step=self.step,
            adapters={
                name: checkpoint.AdapterState(
                    lora=engine.gathered(adapter.ema.live()),
                    ema=engine.gathered(adapter.ema.state()) if adapter.ema.decay else {},
                    optimizer=optimizers[name],
                )
                for name, adapter in self.host.adapters.items()
            },
            config=self.config.model_dump(mode="json"),
            data=self.data.digest(),
        )

    def _save(self) -> None:
        state = self._state(self.engine)
        if self.accelerator.is_main_process:
            with self._still:
                if self._rescued != self.step:
                    self._write_checkpoint(state)
        with self.watchdog.waiting(f"the first process, which saves step {self.step}"):
            self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, state: checkpoint.TrainingState) -> None:
        self.diagnosis.before_saving(state)
        extra = {"versions": versions(), "command": sys.argv}
        files = self._lora_files(state.adapters[EDIT])
        spared = best.checkpoint_in(self.folder)
        checkpoint.save(self.checkpoints, state, files, keep_last=self.config.train.keep_last, spared=spared, extra=extra)

    def _lora_files(self, adapter: checkpoint.AdapterState) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
        name = self.config.output.name
        saved = {"": ("live", adapter.lora), "-ema": ("ema", adapter.ema)}
        files = {}
        for kind, (which, weights) in saved.items():
            for suffix, tensors in self.host.lora_files(weights).items() if weights else ():
                said = {"step": self.step, "weights": which, "title": f"{name}{kind}{suffix}", "suffix": suffix}
                files[f"{name}{kind}{suffix}.safetensors"] = tensors, header(self.config, self.family, tensors, **said)
        return files

    def _lora_names(self) -> list[str]:
        """Files of the live weights, the high-noise expert's first."""
        separate = self.high_share is not None and self.config.lora.experts != "shared"
        return [f"{self.config.output.name}{suffix}.safetensors" for suffix in (EXPERT_SUFFIXES.values() if separate else ("",))]

    def _export(self) -> Path:
        """The last checkpoint's LoRA files beside the checkpoints folder."""
        if self.accelerator.is_main_process:
            last = checkpoint.checkpoints(self.checkpoints)[-1]
            for path in last.glob("*.safetensors"):
                if path.name == checkpoint.TENSORS:
                    continue
                unfinished = self.folder / f".partial-{path.name}"
                try:
                    unfinished.write_bytes(exported(path, self.config.output))
                    os.replace(unfinished, self.folder / path.name)
                except OSError as error:
                    unfinished.unlink(missing_ok=True)
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
                batch = replace(self._batch(examples, rng, t=torch.tensor([t])), updates=None)
                for name, value in self.objective.step(self.host, batch, None).items():
                    sums[name] = sums.get(name, 0.0) + value.item() / count
        if self.accelerator.is_main_process:
            self.append(self._validation_path, {f"validation/{name}": value for name, value in sums.items()})


# --- pieces without state ---


def _by_adapter(name: str, norms: Mapping[str, Tensor]) -> Metrics:
    return {name if adapter == EDIT else f"{name}/{adapter}": norm for adapter, norm in norms.items()}


def _cloned(value: Any) -> Any:
    """Tensors of this process, in the same mapping."""
    if isinstance(value, Tensor):
        return value.clone()
    return {key: _cloned(one) for key, one in value.items()} if isinstance(value, dict) else value


def _beside(device: torch.device) -> AbstractContextManager[Any]:
    """A stream of its own: work on the default one would wait for the collective that hangs there."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _ignore_interrupts(worker: int) -> None:
    """A loader process: Ctrl-C reaches the whole group, and only the training process may answer it. SIGTERM ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """First Ctrl-C (or a scheduler's SIGTERM): finish the step, save, stop. Second Ctrl-C: stop at once.

    One Ctrl-C comes twice at once where a launcher hands on what the terminal has sent to all; a scheduler's SIGTERM likewise, and it
    repeats itself. The first process saves the last whole step if this one takes long: launchers and schedulers kill.
    """
    first: list[float] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        if first:
            if signum == signal.SIGINT and time.monotonic() - first[0] > _ONE_SIGNAL:
                raise KeyboardInterrupt
            return
        first.append(time.monotonic())
        trainer._stop = True
        trainer.watchdog.interrupted()
        report("\ninterrupted: saving after this step (Ctrl-C again to stop at once)")

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
