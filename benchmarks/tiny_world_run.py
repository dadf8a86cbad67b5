"""One run of a tiny-world study, of pictures or of clips: its data, its training, its evaluation, its JSON.

A run goes through the project's own configuration and `Trainer`; what is added is a clock and an evaluation every so many
steps. A run that was killed goes on from its last checkpoint: same losses, same curve, and only time that counted is counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from benchmarks import provenance
from byg_plugin import sampling
from byg_plugin.config.sections import ONCE_ALWAYS_WRITTEN, Config, keys_of
from byg_plugin.data import cache
from byg_plugin.data.buckets import to_tensor
from byg_plugin.data.tuples import read_tuples
from byg_plugin.demo import metrics, sheet, video_metrics, video_world, world
from byg_plugin.hosts import make_host
from byg_plugin.images import frames_of
from byg_plugin.models import make_family
from byg_plugin.objectives.base import Velocity
from byg_plugin.training.loop import Trainer
from byg_plugin.version import versions

FORMAT = 1  # raise when results change in a way that neither configuration nor data nor base shows
CURVE_POINTS = 6  # evaluations between the end of the identity warm-up and the end of training
BATCH = 32  # edits sampled at once
CPU = torch.device("cpu")


Edit = Any
"""One edit of a world: `world.Edit` or `video_world.ClipEdit`."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What a study needs of a world."""

    sample_split: Callable[..., list[Any]]
    write_dataset: Callable[..., Path]
    before: Callable[[Edit], np.ndarray]
    """The source: uint8 (SIZE, SIZE, 3) of a picture, (FRAMES, SIZE, SIZE, 3) of a clip."""
    after: Callable[[Edit], np.ndarray]
    evaluate: Callable[[Mapping[str, np.ndarray], Sequence[Edit]], metrics.Table]
    contact_sheet: Callable[[Path, Sequence[Edit], Mapping[str, np.ndarray]], Path]


def _picture_sheet(path: Path, edits: Sequence[Edit], images: Mapping[str, np.ndarray]) -> Path:
    return sheet.contact_sheet(path, edits, images, columns=8, rows=2)


PICTURES = World(
    sample_split=world.sample_split,
    write_dataset=world.write_dataset,
    before=lambda edit: world.render(edit.before),
    after=lambda edit: world.render(edit.after),
    evaluate=metrics.evaluate,
    contact_sheet=_picture_sheet,
)
CLIPS = World(
    sample_split=video_world.sample_split,
    write_dataset=video_world.write_dataset,
    before=lambda edit: video_world.render(edit.before, edit.motion),
    after=lambda edit: video_world.render(edit.after, edit.motion),
    evaluate=video_metrics.evaluate,
    contact_sheet=sheet.clip_contact_sheet,
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that one run is."""

    world: World = PICTURES

    name: str
    title: str
    kind: str
    """`train`, or a row without training: `truth`, `copy`, `base`."""
    seed: int
    stage: str
    overrides: tuple[str, ...]
    """What makes it differ from the recipe, as `section.key=value`."""
    config: Config
    train_edits: tuple[Edit, ...]
    train_recipe: Mapping[str, Any]
    """Arguments of the world's `write_dataset` that write `train_edits`."""
    eval_edits: tuple[Edit, ...]
    curve_edits: int
    """How many of `eval_edits` the curve is measured on; the end is measured on all."""
    result: Path
    """The JSON."""

    @property
    def folder(self) -> Path:
        """Checkpoints, clock and curve."""
        return Path(self.config.output.dir)


# --- what a result depends on ---


def eval_edits(n: int, seed: int, split: str, edit_types: Sequence[str], of: World = PICTURES) -> tuple[Edit, ...]:
    """At least `n` edits, as many of each type, types in turn: any first few are balanced too."""
    each = -(-n // len(edit_types))
    by_type = [of.sample_split(each, seed, f"{split}-{edit_type}", (edit_type,)) for edit_type in edit_types]
    return tuple(edit for group in zip(*by_type, strict=True) for edit in group)


def identity(plan: Plan) -> dict[str, str]:
    """Digests of what the result is a function of: settings (no paths), data and base."""
    data = digest_edits(plan.eval_edits, len(plan.eval_edits), plan.world)
    if plan.kind == "train":
        data += digest_edits(plan.train_edits, 16, plan.world) + f"/{plan.curve_edits}/{CURVE_POINTS}"
    found = {"config": _sha(json.dumps(settings(plan), sort_keys=True)), "data": _sha(data)}
    if plan.kind in ("base", "train"):
        found["base"] = base_digest(Path(plan.config.model.part("transformer")))
    if plan.kind == "train" and plan.config.objective.criticised:
        found["critic"] = base_digest(Path(str(plan.config.critic.path)), CRITIC_MADE)
    return found


def settings(plan: Plan) -> dict[str, dict[str, Any]]:
    """The configuration without places, as far as the row depends on it, and how edits are judged."""
    limits = [metrics.EDIT_SHARE, metrics.KEEP_ERROR, metrics.MASK_IOU, metrics.PEBBLE_ERROR]
    found: dict[str, dict[str, Any]] = {"study": {"kind": plan.kind, "format": FORMAT, "limits": limits}}
    if plan.kind not in ("base", "train"):
        return found
    every = plan.config.model_dump(mode="json")
    for section, key in (("model", "path"), ("critic", "path"), ("dataset", "tuples"), ("dataset", "cache_dir"), ("output", "dir")):
        every[section].pop(key)
    sections = list(every) if plan.kind == "train" else ["conditioning", "sample"]
    found |= {section: every[section] for section in sections}
    found["study"]["seed"] = plan.seed
    return found


def changes(record: Mapping[str, Any], plan: Plan) -> list[str]:
    """What makes a result stale: settings, data or base that are not its own.

    An option that did not exist when it was made changes nothing while it has its default.
    """
    now, then = identity(plan), record["identity"]
    found = [f"another {part}" for part in ("base", "data", "critic") if then.get(part) != now.get(part)]
    for section, values in settings(plan).items():
        old = record["config"].get(section, {})
        for key, value in values.items():
            before = old[key] if key in old else default_of(section, key)
            if before != value and not (value is None and f"{section}.{key}" in ONCE_ALWAYS_WRITTEN):
                found.append(f"{section}.{key}: {before} -> {value}")
    return found


def default_of(section: str, key: str) -> Any:
    """A key's default as a record has it, in the types of JSON; None for an unknown key."""
    options = keys_of(section)
    default = options[key].default if key in options else None
    return list(default) if isinstance(default, tuple) else default


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@lru_cache(maxsize=16)
def digest_edits(edits: tuple[Edit, ...], rendered: int, of: World = PICTURES) -> str:
    """Of the exact scenes, and of the pixels of the first of them: a world that is drawn otherwise is another one."""
    digest = hashlib.sha256(json.dumps([asdict(edit) for edit in edits]).encode())
    for edit in edits[:rendered]:
        digest.update(of.before(edit).tobytes())
        digest.update(of.after(edit).tobytes())
    return digest.hexdigest()


BASE_MADE = "--base {}: no such base; make one with python -m benchmarks.bases.flux (clips: benchmarks.bases.wan)"
CRITIC_MADE = "critic.path = {}: no such critic; make one with python -m benchmarks.bases.critic"


def base_digest(folder: Path, missing: str = BASE_MADE) -> str:
    """Of every file of a base, or of a critic, that decides what it computes: weights, configurations, tokenizers."""
    records = ("figures.json", "history.json", "model_index.json")  # they compute nothing
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json") and path.name not in records)
    if not files:
        raise ValueError(missing.format(folder))
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(folder).as_posix()).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit that is checked out, `-changed` when the code differs from it, `unknown` outside a clone."""
    head, changed = provenance.commit("byg_plugin", "configs", "benchmarks/*.py")
    return head[:12] + ("-changed" if changed else "")


# --- files ---


def write_json(path: Path, record: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
    partial.write_text(json.dumps(_tidy(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _tidy(value: Any) -> Any:
    """Six digits, and no NaN: JSON has none."""
    if isinstance(value, Mapping):
        return {key: _tidy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tidy(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_json(path: Path) -> Any:
    """None when there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON; one that a kill cut off is none."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


# --- data ---


def prepare(plan: Plan) -> None:
    """Write and cache the training tuples that are not there yet."""
    tuples = Path(plan.config.dataset.tuples)
    if not tuples.is_file():
        plan.world.write_dataset(tuples.parent, **plan.train_recipe)
    family, items = make_family(plan.config), read_tuples(plan.config.dataset)
    cache.cache_latents(plan.config, family, items, CPU)
    cache.cache_texts(plan.config, family, items, CPU)


# --- evaluation ---


class Evaluator:
    """Edits of a fixed set from fixed noise, made in this process exactly as `EditPipeline` makes them.

    Args:
        config: the run's configuration: `[sample]` steps and schedule.
        edits: what is edited; edit i starts from the noise of seed i.
        of: the edits' world.
    """

    def __init__(self, config: Config, edits: Sequence[Edit], of: World = PICTURES):
        self.edits, self._world = edits, of
        self._config, self.family = config, make_family(config)
        self._vae = self.family.load_vae(CPU)
        sources = [of.before(edit) for edit in edits]
        self._moving = sources[0].ndim == 4
        self.sources = self.encoded(sources)
        encoders = self.family.load_text_encoders(CPU)
        texts = dict.fromkeys(text for edit in edits for text in (edit.instruction, edit.tgt_caption))
        self._texts = {text: self.family.encode_texts(encoders, [text]) for text in texts}

    def encoded(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """uint8 pictures (S, S, 3), or clips (F, S, S, 3) -> latents."""
        frames = [picture if self._moving else picture[None] for picture in pictures]
        pixels = [torch.stack([to_tensor(Image.fromarray(frame)) for frame in clip], dim=1) for clip in frames]
        batches = [torch.stack(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
        return torch.cat([self.family.encode_pixels(self._vae, batch) for batch in batches])

    def edit(self, velocity: Velocity, n: int) -> dict[str, np.ndarray]:
        """The first `n` edits by id, like their sources."""
        return self._make(velocity, [edit.instruction for edit in self.edits[:n]], with_source=True, first_seed=0)

    def imagine(self, velocity: Velocity, first_seed: int) -> dict[str, np.ndarray]:
        """Every target caption as text-to-image (or text-to-video), from the base: no source."""
        return self._make(velocity, [edit.tgt_caption for edit in self.edits], with_source=False, first_seed=first_seed)

    def _make(self, velocity: Velocity, texts: Sequence[str], *, with_source: bool, first_seed: int) -> dict[str, np.ndarray]:
        return self.decoded(self.latents(velocity, texts, with_source=with_source, first_seed=first_seed))

    @torch.no_grad()
    def latents(self, velocity: Velocity, texts: Sequence[str], *, with_source: bool = True, first_seed: int = 0) -> Tensor:
        """Sampled by the first texts, one an edit."""
        sample, shape = self._config.sample, tuple(self.sources[:1].shape)
        made = []
        for start in range(0, len(texts), BATCH):
            batch = range(start, min(start + BATCH, len(texts)))
            noise = torch.cat([sampling.seeded_noise(shape, first_seed + i, CPU) for i in batch])
            text = {name: torch.cat([self._texts[texts[i]][name] for i in batch]) for name in self._texts[texts[start]]}
            source = self.sources[batch.start : batch.stop] if with_source else None
            options = {"steps": sample.steps, "schedule": sample.schedule, "seeds": [first_seed + i for i in batch]}
            made.append(sampling.sample_as_configured(self._config, self.family, velocity, noise, text, source, **options))
        return torch.cat(made)

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> dict[str, np.ndarray]:
        """Pictures or clips of the first edits, by their ids."""
        images: dict[str, np.ndarray] = {}
        batches = (self.family.decode_latents(self._vae, latents[start : start + BATCH]) for start in range(0, len(latents), BATCH))
        for edit, pixels in zip(self.edits, (pixels for batch in batches for pixels in batch), strict=False):
            made = np.stack([np.asarray(frame) for frame in frames_of(pixels)])
            images[edit.id] = made if self._moving else made[0]
        return images

    def score(self, images: Mapping[str, np.ndarray]) -> metrics.Table:
        """The metrics of the edits that are there."""
        return self._world.evaluate(images, [edit for edit in self.edits if edit.id in images])


# --- training ---


def curve_steps(config: Config) -> list[int]:
    """Steps after which a run is evaluated: the end of the identity warm-up, `CURVE_POINTS` between, the end."""
    steps = config.train.steps
    first = min(steps, getattr(config.objective, "identity_warmup_steps", 0))
    return sorted({first + round((steps - first) * k / (CURVE_POINTS + 1)) for k in range(CURVE_POINTS + 2)} - {0})


class _Watch:
    """Called after every step: counts the time of training alone and evaluates where the curve has a point."""

    def __init__(self, plan: Plan, evaluator: Evaluator):
        self.plan, self.evaluator = plan, evaluator
        self.points = curve_steps(plan.config)
        self._clock_path, self._curve_path = plan.folder / "clock.jsonl", plan.folder / "curve.json"
        self.clock: list[dict[str, float]] = []
        self.curve: dict[str, Any] = {"points": [], "table": None}
        self._parent = os.getppid()

    def start(self, trainer: Trainer) -> None:
        """Take up what was measured up to the trainer's step, and what a kill left out at that step."""
        self.clock = [line for line in read_lines(self._clock_path) if line["step"] <= trainer.step]
        self._clock_path.write_text("".join(json.dumps(line) + "\n" for line in self.clock), encoding="utf-8")
        kept = read_json(self._curve_path) or self.curve
        self.curve["points"] = [point for point in kept["points"] if point["step"] <= trainer.step]
        self.curve["table"] = kept["table"] if trainer.step == self.plan.config.train.steps else None
        if trainer.step:
            self._evaluate_if_due(trainer)
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def __call__(self, trainer: Trainer) -> None:
        last = self.clock[-1] if self.clock else {"cpu": 0.0, "wall": 0.0}
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        self.clock.append({"step": trainer.step, "cpu": last["cpu"] + cpu, "wall": last["wall"] + wall})
        with open(self._clock_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(self.clock[-1]) + "\n")
        if os.getppid() != self._parent:  # who started us is dead: two of us would train into one folder
            raise KeyboardInterrupt
        self._evaluate_if_due(trainer)
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def _evaluate_if_due(self, trainer: Trainer) -> None:
        if trainer.step not in self.points or trainer.step in [point["step"] for point in self.curve["points"]]:
            return
        last = trainer.step == self.plan.config.train.steps
        some = self.plan.curve_edits
        with trainer.host.ema() as velocity:
            images = self.evaluator.edit(velocity, len(self.plan.eval_edits) if last else some)
        if last:
            self.curve["table"] = self.evaluator.score(images)
            self.plan.world.contact_sheet(self.plan.folder / "contact_sheet.png", self.plan.eval_edits, images)
        subset = {edit.id: images[edit.id] for edit in self.plan.eval_edits[:some]}
        cpu = self.clock[-1]["cpu"] if self.clock else 0.0
        self.curve["points"].append({"step": trainer.step, "cpu_seconds": cpu, "table": self.evaluator.score(subset)})
        write_json(self._curve_path, self.curve)

    def seconds(self) -> dict[str, float]:
        """CPU and wall seconds of training, and CPU seconds a step: of all, of warm-up steps and of those after it."""
        config = self.plan.config
        warmup = getattr(config.objective, "identity_warmup_steps", 0)
        at = {0: 0.0} | {int(line["step"]): line["cpu"] for line in self.clock}
        end, turn = max(at), max((step for step in at if step <= warmup), default=0)
        found = {"cpu_seconds": at[end], "wall_seconds": self.clock[-1]["wall"], "seconds_per_step": at[end] / end}
        if turn:
            found["seconds_per_warmup_step"] = at[turn] / turn
        if turn and end > turn:
            found["seconds_per_later_step"] = (at[end] - at[turn]) / (end - turn)
        return found


def run(plan: Plan) -> dict[str, Any]:
    """Make one row of the table: train or go on training, evaluate, write the JSON and return it.

    Raises:
        Interrupted, KeyboardInterrupt: what is done so far is kept; call it again.
    """
    record = {
        "name": plan.name,
        "title": plan.title,
        "kind": plan.kind,
        "stage": plan.stage,
        "seed": plan.seed,
        "overrides": [override.replace(f"{provenance.ROOT.as_posix()}/", "") for override in plan.overrides],  # no path of this machine
        "identity": identity(plan),
        "config": settings(plan),
        "commit": commit(),
        "edits": len(plan.eval_edits),
    }
    if plan.kind == "train":
        record |= _train(plan, record["identity"])
    else:
        record["table"] = _row_without_training(plan)
    write_json(plan.result, record)
    shutil.rmtree(plan.folder / "checkpoints", ignore_errors=True)
    return read_json(plan.result)


def _row_without_training(plan: Plan) -> metrics.Table:
    edits = plan.eval_edits
    if plan.kind == "truth":
        return plan.world.evaluate({edit.id: plan.world.after(edit) for edit in edits}, edits)
    if plan.kind == "copy":
        return plan.world.evaluate({edit.id: plan.world.before(edit) for edit in edits}, edits)
    assert plan.kind == "base", plan.kind
    evaluator = Evaluator(plan.config, edits, plan.world)
    with make_host(plan.config, make_family(plan.config), CPU).base() as velocity:
        return evaluator.score(evaluator.imagine(velocity, first_seed=plan.seed * 100_000))


def _train(plan: Plan, now: Mapping[str, str]) -> dict[str, Any]:
    mark = plan.folder / "identity.json"
    if plan.folder.exists() and read_json(mark) != dict(now):
        shutil.rmtree(plan.folder)  # a training of other settings, base or data
    write_json(mark, now)
    prepare(plan)
    resume = "latest" if any((plan.folder / "checkpoints").glob("step-*")) else None
    watch = _Watch(plan, Evaluator(plan.config, plan.eval_edits, plan.world))
    trainer = Trainer(plan.config, make_family(plan.config), Accelerator(cpu=True), resume, on_step=watch)
    watch.start(trainer)
    trainer.run()
    parameters = sum(p.numel() for p in trainer.host.parameters.values())
    return {
        "steps": plan.config.train.steps,
        **watch.seconds(),
        "lora_parameters": parameters,
        "machine": {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), **versions()},
        "curve": watch.curve["points"],
        "training": _windows(read_lines(plan.folder / "log.jsonl"), watch.points),
        "table": watch.curve["table"],
    }


def _windows(log: Sequence[Mapping[str, float]], ends: Sequence[int]) -> list[dict[str, float]]:
    """Means of the logged terms between the curve's points; identity steps count only where there are no others."""
    windows = []
    for first, last in zip([0, *ends[:-1]], ends, strict=True):
        lines = [line for line in log if first < line["step"] <= last]
        lines = [line for line in lines if not line["identity_step"]] or lines
        names = sorted({name for line in lines for name in line} - {"step", "seconds", "identity_step"})
        means = {name: float(np.mean([line[name] for line in lines if name in line])) for name in names}
        windows.append({"from": first, "to": last, "lines": len(lines), **means})
    return windows
