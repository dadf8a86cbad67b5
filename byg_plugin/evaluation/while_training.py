"""`[evaluate]`: edits of held-out tuples are scored while a run trains, and `best.json` names the best checkpoint.

A step's edits and their scores lie in `evaluations/step-000500`, means of all steps in `evaluation.jsonl` and the tracker. Metrics are
made when they are needed, one at a time, and dropped; on CUDA the network leaves the device meanwhile. What fails is told and never ends
a run. Choosing the best of many noisy scores flatters it: judge the chosen one on other items.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from PIL import Image

from byg_plugin import folders
from byg_plugin.config.sections import Config, EvaluateConfig
from byg_plugin.data.clips import is_clip, write_clip
from byg_plugin.data.dataset import split_tuples
from byg_plugin.data.tuples import EditTuple, read_tuples
from byg_plugin.evaluation import page, scores
from byg_plugin.evaluation.items import Item
from byg_plugin.evaluation.metrics import METRICS, Options, classes
from byg_plugin.evaluation.metrics.answers import JudgedMetric
from byg_plugin.evaluation.metrics.base import check_device
from byg_plugin.evaluation.scores import Row
from byg_plugin.evaluation.statistics import ALL, Mean, by_type, mean_of
from byg_plugin.images import save_png
from byg_plugin.training import best, checkpoint, logs, preview
from byg_plugin.training.loop import Trainer

logger = get_logger(__name__)
LOG = "evaluation.jsonl"
_OF_CLIPS = ("flicker", "dynamic", "motion")  # metrics that images have no value of
_TEXTS = ("instruction", "src_caption", "tgt_caption", "edit_type")


class TrainingScores:
    """A `Trainer`'s `evaluate`; call `start` before the run.

    Args:
        config: the whole configuration; `evaluate.every` is not 0.

    Raises:
        ValueError: a metric is unknown, or its model or package is not on this machine; `select` names what none gives; or it compares
            with ground truths, and no held-out item that is scored has one.
    """

    def __init__(self, config: Config):
        self._config = config
        section = config.evaluate
        if unknown := [name for name in section.metrics if name not in METRICS]:
            raise ValueError(f"evaluate.metrics = {list(section.metrics)}: {unknown[0]} is none of {', '.join(METRICS)}")
        self._made = classes(section.metrics)
        if judged := [name for name, made in self._made.items() if issubclass(made, JudgedMetric)]:
            raise ValueError(
                f"evaluate.metrics = {list(section.metrics)}: {judged[0]} needs a judge: not while training; leave it out, and score a "
                f"checkpoint's edits with evaluate.py"
            )
        self._options = _options(section)
        self._columns = {column: more for one in self._made.values() for column, more in one.columns.items()}
        self._higher = _direction(section, self._columns)
        _check_defined(config, {column: name for name, one in self._made.items() for column in one.columns})
        if any(column.endswith("_truth") for column in section.select):
            _check_truths(config, split_tuples(read_tuples(config.dataset), config.dataset.validation_items)[1])
        check_device(section.device, f'evaluate.device = "{section.device}"', 'set evaluate.device = "cpu"')
        if os.environ.get("RANK", "0") == "0":
            for name, made in self._made.items():
                try:
                    made(_options(section, device="cpu"))  # what it lacks is told now, and it is dropped
                except ValueError as error:
                    raise ValueError(f"evaluate.metrics: {name}: {error}; what is an option there is a key of [evaluate]") from error

    def start(self, trainer: Trainer) -> None:
        """What lies after the step that the run goes on from is set aside."""
        if trainer.accelerator.is_main_process:
            with preview.logged("going on with earlier evaluations"):
                logs.drop_lines_after(self._log(trainer), trainer.step)
                preview.set_aside_later(_folder(trainer, 0).parent, trainer.step)
                self._choose(trainer)

    def __call__(self, trainer: Trainer) -> None:
        """Score this step where it is due."""
        if not trainer.due(self._config.evaluate.every):
            return
        first = trainer.accelerator.is_main_process
        if trainer.anyone(first and trainer.step not in logs.steps_in(self._log(trainer))):
            self._evaluate(trainer, writes=first)
        trainer.accelerator.wait_for_everyone()

    # --- one step ---

    def _evaluate(self, trainer: Trainer, *, writes: bool) -> None:
        assert trainer.validation is not None, "the configuration asks for validation items"
        config, what = self._config, f"evaluation at step {trainer.step}"
        # Without the live weights' own dropout, and with the previews' weights, seeds and sampler.
        with trainer.together(f"the evaluation at step {trainer.step}"):  # of the edits alone: metrics wait for nobody, however long
            latents = preview.edited(
                config,
                trainer.family,
                trainer.host,
                trainer.validation,
                what,
                items=config.evaluate.items,
                unguided=False,
                agree=trainer.anyone,
            )
        if not writes or not latents:
            return
        with preview.logged(what):
            items = self._write(trainer, preview.decoded(config.model.dtype, trainer.family, trainer.host, latents))
            with trainer.host.off_device() if self._options.device == "cuda" else nullcontext():
                rows = self._score(items, _folder(trainer, trainer.step))
            self._report(trainer, items, rows)

    def _write(self, trainer: Trainer, columns: Iterable[Sequence[Sequence[Image.Image]]]) -> list[Item]:
        """Images as they are, clips losslessly and with the frames that were edited, which another rate may have chosen."""
        assert trainer.validation is not None
        final, items = _folder(trainer, trainer.step), []
        with folders.written_whole(final, replace=True) as folder:
            for index, ((source, edit), one) in enumerate(zip(columns, trainer.validation.tuples, strict=False)):
                fps = self._config.fps or 1.0
                if len(edit) > 1:
                    names = [f"{index:03d}_source.mkv", f"{index:03d}.mkv"]
                    for name, frames in zip(names, (source, edit), strict=True):
                        write_clip(folder / name, frames, fps, lossless=True)
                else:
                    names = [f"{index:03d}.png"]
                    save_png(edit[0], folder / names[0], {"step": trainer.step, "instruction": one.instruction})
                items.append(_item(one, final / names[-1], final / names[0] if len(names) > 1 else None, edit[0].size))
        return items

    def _score(self, items: Sequence[Item], folder: Path) -> list[Row]:
        """By every metric that works, one at a time."""
        merged: dict[str, dict[str, float | None]] = {item.id: {} for item in items}
        for name, made in self._made.items():
            with preview.logged(f"metric {name}"):
                rows, _ = scores.score(items, {name: made(self._options)}, folder)
                for row in rows:
                    merged[row.id] |= row.scores
        return [Row(id=item.id, edit_type=item.edit_type, scores=merged[item.id]) for item in items]

    def _report(self, trainer: Trainer, items: Sequence[Item], rows: Sequence[Row]) -> None:
        select = self._config.evaluate.select
        means = by_type(rows)[ALL]
        if len(select) > 1 and (values := [value for row in rows if (value := joint(row, select)) is not None]):
            means[_name(select)] = mean_of(values)
        if _name(select) not in means:
            logger.warning("evaluate.select = %s has no value at step %d: this checkpoint is no candidate", [*select], trainer.step)
        if not means:
            return
        trainer.append(self._log(trainer), _line(means))
        self._choose(trainer)
        sort_by = select[0] if select[0] in means else next(iter(means))
        folder, title = _folder(trainer, trainer.step), f"step {trainer.step}"
        page.write_page(folder / "report.html", title, items, rows, sort_by, self._columns[sort_by])

    # --- the best of all steps ---

    def _log(self, trainer: Trainer) -> Path:
        return trainer.folder / LOG

    def _choose(self, trainer: Trainer) -> None:
        """The best of the checkpoints that there are; of equals the earliest."""
        key = f"evaluate/{_name(self._config.evaluate.select)}"
        saved = {path.name for path in checkpoint.checkpoints(trainer.checkpoints)}
        lines = [line for line in logs.records(self._log(trainer)) if key in line and checkpoint.name_of(line["step"]) in saved]
        if not lines:
            best.write(trainer.folder, None)
            return
        chosen = max(lines, key=lambda line: (line[key] if self._higher else -line[key], -line["step"]))
        best.write(
            trainer.folder,
            {
                "step": chosen["step"],
                "checkpoint": f"{trainer.checkpoints.name}/{checkpoint.name_of(chosen['step'])}",
                "weights": self._config.sample.weights if self._config.objective.ema_decay else "live",
                "select": list(self._config.evaluate.select),
                "score": chosen[key],
                "sem": chosen.get(f"{key}/sem"),
                "of": len(lines),
                "scores": {name.removeprefix("evaluate/"): value for name, value in chosen.items() if name != "step"},
            },
        )


def joint(row: Row, columns: Sequence[str]) -> float | None:
    """The geometric mean of an item's scores, of which negative ones count as 0; None where one is not defined.

    What is judged is which of two checkpoints is better: a unit of either column cancels out of that, which it does not in a sum.
    """
    values = [row.scores.get(column) for column in columns]
    known = [max(0.0, value) for value in values if value is not None]
    return math.prod(known) ** (1 / len(known)) if len(known) == len(values) else None


def _direction(section: EvaluateConfig, columns: Mapping[str, bool]) -> bool:
    """Whether more is better of what selects."""
    key = f"evaluate.select = {list(section.select)}"
    if unknown := [column for column in section.select if column not in columns]:
        raise ValueError(f"{key}: {unknown[0]} is no column of evaluate.metrics, which have {', '.join(columns)}")
    if len(section.select) > 1 and (lower := [column for column in section.select if not columns[column]]):
        raise ValueError(f"{key}: of {lower[0]} less is better, it goes into no geometric mean; select it alone, or leave it out")
    return columns[section.select[0]]


def _check_defined(config: Config, metrics: Mapping[str, str]) -> None:
    """Refuse what selects and never has a value in training; `metrics` are the columns' own."""
    for column in config.evaluate.select:
        key = f"evaluate.select = {list(config.evaluate.select)}: {column}"
        if column.endswith("_outside"):
            raise ValueError(f"{key} needs masks, which there are none of while training; select {column.removesuffix('outside')}source")
        if metrics[column] in _OF_CLIPS and config.dataset.frames == 1:
            raise ValueError(f"{key} is of clips alone, and with dataset.frames = 1 edits are images; select a column of another metric")


def _check_truths(config: Config, tuples: Sequence[EditTuple]) -> None:
    """Ground truths count for images alone."""
    scored = tuples[: config.evaluate.items]
    known = any(one.target is not None and not (config.dataset.frames > 1 and is_clip(one.source)) for one in scored)
    if not known:
        truth = next(column for column in config.evaluate.select if column.endswith("_truth"))
        raise ValueError(
            f"evaluate.select = {list(config.evaluate.select)}: {truth} needs an image with a target, and the {len(scored)} validation "
            f"item(s) that are scored have none; select {truth.removesuffix('truth')}source"
        )


def _options(section: EvaluateConfig, **changes: Any) -> Options:
    given = {name: getattr(section, name) for name in ("clip", "dino", "lpips_net", "device")} | changes
    files = {name: Path(path).expanduser() for name in ("aesthetic", "cotracker") if (path := getattr(section, name)) is not None}
    return Options(**{name: value for name, value in given.items() if value is not None}, **files)


def _name(select: Sequence[str]) -> str:
    return "_and_".join(select)


def _line(means: Mapping[str, Mean]) -> dict[str, float]:
    values = {f"evaluate/{column}": mean.mean for column, mean in means.items()}
    return values | {f"evaluate/{column}/sem": mean.sem for column, mean in means.items() if mean.sem is not None}


def _folder(trainer: Trainer, step: int) -> Path:
    return trainer.folder / "evaluations" / f"step-{step:06d}"


def _item(one: EditTuple, edit: Path, source: Path | None, size: tuple[int, int]) -> Item:
    """Of a clip `source` is a file of its own, and its target may have other frames."""
    reference = one.target if source is None else None
    texts = {name: getattr(one, name) for name in _TEXTS}
    return Item(id=one.id, source=source or one.source, edit=edit, reference=reference, size=size, **texts)
