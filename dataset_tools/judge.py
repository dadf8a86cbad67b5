"""Edits to a vision-language model's scores of them (VIEScore, ImgEdit-Bench's), for `evaluate.py --judged`.

    python dataset_tools/judge.py --edits edits --out judged.jsonl --base-url http://127.0.0.1:8000/v1
    python byg_plugin/evaluate.py --edits edits --metrics viescore --judged judged.jsonl --out scores

What it will ask, and what that will cost, is said before the first request. Run the same command again after a kill: what was
answered is not asked again. An answer that cannot be read is asked for once more, then counted in OUT's .rejects.jsonl; nothing is
scored for it. An edit that has changed since is judged anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: the repository must be importable, this folder must not
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "dataset_tools"

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from byg_plugin import _cli
from byg_plugin.config.extras import require
from byg_plugin.data.buckets import cover
from byg_plugin.data.clips import clip_info, is_clip
from byg_plugin.data.media import image_size, load_image
from byg_plugin.data.rules import Finding
from byg_plugin.evaluation import frames
from byg_plugin.evaluation.items import Item, items_of, missing_files, refuse
from byg_plugin.evaluation.judged import QUESTIONS, Question, keys_of, sameness
from byg_plugin.evaluation.metrics.base import missing_texts
from byg_plugin.journal import read_records

from .asking import Attempt
from .backend import Backend, Chat, Picture, encode_frame, seed_of
from .backends import make_backend
from .inputs import in_shard, shard_file
from .judge_prompts import Words, words_of
from .parsing import Unparsable, Values
from .pool import Feed, Outcome, Results, refuse_inputs, run_pool
from .settings import JudgeSettings, read_settings

_FIELDS = ("score",)
_PATCH = 28 * 28  # pixels of one token of a picture, of Qwen's models
_LETTERS = 4  # of one token of a text
_SAID = 60  # tokens of a usual answer without thinking
_SAID_CHARACTERS = 1000  # of an answer, kept beside its scores
_SECONDS = 5.0  # an answer may take, where none has come yet


@dataclass(frozen=True, kw_only=True)
class Task:
    """One question about one edit.

    Attributes:
        item: the edit.
        question: what is asked.
        key: see `keys_of`.
    """

    item: Item
    question: Question
    key: str


def pictures(item: Item, question: Question, count: int, side: int) -> tuple[Picture, ...]:
    """What the judge sees: the source's picture or `count` frames where the question shows it, then the edit's.

    Images are shown in the source's size, as GEdit-Bench does it: a smaller edit is scaled up; one of a crop stands beside that crop.

    Raises:
        ValueError: a file cannot be read.
    """
    if is_clip(item.edit):
        seen = frames.look(item)
        moments = [round(index * (len(seen.edit) - 1) / (count - 1)) for index in range(count)]
        sources, edits = ([Image.fromarray(clip[moment]) for moment in moments] for clip in (seen.source, seen.edit))
    else:
        source, edit = load_image(item.source), load_image(item.edit)
        scale = min(source.width / edit.width, source.height / edit.height)
        size = (max(1, round(edit.width * scale)), max(1, round(edit.height * scale)))
        sources, edits = [cover(source, size)], [edit.resize(size, Image.Resampling.LANCZOS)]
    shown = [*sources, *edits] if question.with_source else edits
    return tuple(encode_frame(one, side) for one in shown)


def scores_of(question: Question) -> Values:
    """The reader of an answer's numbers: texts by part."""

    def read(found: Mapping[str, Any], fields: Sequence[str]) -> dict[str, str]:
        given = found.get("score")
        if given in (None, "", []):
            raise Unparsable("missing_fields", "missing or empty: score")
        numbers = given if isinstance(given, list) else [given]
        if len(numbers) != len(question.parts):
            raise Unparsable("count", f"score has {len(numbers)} number(s), {len(question.parts)} are asked for")
        return {part: f"{_number(value, question)!r}" for part, value in zip(question.parts, numbers, strict=True)}

    return read


def _number(value: object, question: Question) -> float:
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else float("nan")
    except (ValueError, OverflowError):
        number = float("nan")
    if not question.least <= number <= question.most:
        raise Unparsable("range", f"{str(value)[:40]!r} is no number from {question.least} to {question.most}")
    return number


@dataclass
class Judge:
    """Asks one question about one edit."""

    settings: JudgeSettings
    words: Words
    by: Mapping[str, Any]
    backend: Backend

    async def judge(self, task: Task) -> Outcome:
        """The task's outcome; never raises for what is wrong with an edit or an answer.

        Raises:
            ValueError: nothing could be served (the server is gone, the key is wrong).
        """
        item, question, settings = task.item, task.question, self.settings
        attempt = _Attempt(
            settings=settings,
            field="of",
            name=task.key,
            seed=seed_of(settings.seed, task.key),
            prompt_version=self.words.version,
            head={**head(task), "by": dict(self.by)},
        )
        try:
            shown = await asyncio.to_thread(pictures, item, question, settings.frames, settings.image_side)
        except (ValueError, OSError) as error:
            return attempt.rejected("input", "input", str(error))
        asked = self.words.ask(question, item.instruction or "", item.edit_type, settings.frames if is_clip(item.edit) else 1)
        chat = Chat(system=self.words.system, turns=(asked,), pictures=shown, seed=attempt.seed)

        def accept(texts: dict[str, str], findings: Sequence[Finding], repaired: bool) -> Outcome:
            attempt.side["said"] = attempt.answers[-1][:_SAID_CHARACTERS]
            scores = {part: float(text) for part, text in texts.items()}
            record = {"of": task.key, **attempt.head, "scores": scores}
            return attempt.accepted(record, question.name, findings, repaired)

        return await attempt.ask(self.backend, chat, _FIELDS, lambda texts: (), accept, scores_of(question))


@dataclass(kw_only=True)
class _Attempt(Attempt):
    head: Mapping[str, Any]

    def rejected(self, kind: str, reason: str, message: str) -> Outcome:
        outcome = super().rejected(kind, reason, message)
        return Outcome(record={**self.head, **outcome.record}, accepted=False, label=outcome.label)


def head(task: Task) -> dict[str, Any]:
    """What names a task in both files."""
    return {"id": task.item.id, "edit_type": task.item.edit_type, "metric": task.question.name}


def tasks_of(settings: JudgeSettings, words: Words) -> list[Task]:
    """Every question about every edit of this shard, checked.

    Raises:
        ValueError: files or instructions are missing, or do not go together.
    """
    given = {name: Path(value) for name in ("edits", "tuples", "results") if (value := getattr(settings, name)) is not None}
    items = items_of(given)
    questions = QUESTIONS[settings.ask]
    refuse(missing_files(items), "files")
    refuse([problem for item in items for problem in missing_texts("a judge", ("instruction",), item)], "the edits")
    refuse([problem for item in items for problem in frames.problems(item)], "the edits")
    lacking = [f"{item.id}: no words for {one.name}" for item in items for one in questions if words.lacks(one, item.edit_type)]
    refuse(lacking, f"--prompts {settings.prompts}")
    tasks = [
        Task(item=item, question=question, key=key)
        for item in items
        for question, key in zip(questions, keys_of(item, questions).values(), strict=True)
    ]
    return [task for task in tasks if in_shard(task.key, settings.shard_and_count)]


def plan(tasks: Sequence[Task], settings: JudgeSettings, words: Words, seconds: float | None) -> str:
    """What will be asked and what it costs, in words. Tokens of pictures are counted as Qwen's models take them.

    Args:
        tasks: that are still to be done.
        seconds: that an answer took so far; None where none has come.
    """
    sent = sum(_tokens(task, settings, words) for task in tasks)
    said = _SAID * len(tasks)
    count = sum(_shown(task, settings) for task in tasks)
    pace = f"{seconds:.1f} s an answer as so far" if seconds is not None else f"{_SECONDS:g} s an answer [assumed]"
    minutes = len(tasks) * (seconds or _SECONDS) / settings.in_flight / 60
    cost = "no --price-in and --price-out, so no sum"
    if settings.price_in is not None and settings.price_out is not None:
        cost = f"{(sent * settings.price_in + said * settings.price_out) / 1e6:.2f} in the currency of --price-in and --price-out"
    return (
        f"{len(tasks)} questions with {count} pictures for {settings.model}: about {sent / 1e6:.3g} million tokens sent, "
        f"{said / 1e6:.3g} million answered [estimate, without repairs and thinking]; {cost}; up to {settings.in_flight} at once, "
        f"{minutes:.1f} min at {pace}"
    )


def _shown(task: Task, settings: JudgeSettings) -> int:
    each = settings.frames if is_clip(task.item.edit) else 1
    return each * (2 if task.question.with_source else 1)


def _tokens(task: Task, settings: JudgeSettings, words: Words) -> int:
    item = task.item
    width, height = clip_info(item.edit).size if is_clip(item.edit) else image_size(item.source)
    scale = min(1.0, settings.image_side / max(width, height))
    letters = len(words.system) + len(words.ask(task.question, item.instruction or "", item.edit_type))
    return round(_shown(task, settings) * width * height * scale**2 / _PATCH + letters / _LETTERS)


def judge(settings: JudgeSettings, say: Callable[[str], None] = _cli.say) -> Results:
    """Ask all questions that have no answer yet.

    Raises:
        ValueError: settings, server or files are wrong; what was answered before is on the disk.
    """
    require("json_repair", "reading models' answers", "data")
    words = words_of(Path(settings.prompts) if settings.prompts else None)
    out = shard_file(Path(settings.out), settings.shard_and_count)
    by = {"model": settings.model, "words": words.version, "image_side": settings.image_side, "frames": settings.frames}
    refuse_inputs(out, {name: getattr(settings, name) for name in ("edits", "tuples", "prompts")})
    tasks = tasks_of(settings, words)
    results = Results(
        out,
        name="of",
        label=lambda record: str(record.get("metric", "")),
        fields=("scores",),
        retry=settings.retry,
        check=lambda path, record: _refuse_another(path, record, by),
    )
    try:
        known, seconds = _known(out)
        known |= {str(record.get("of")) for record in read_records(results.rejects)}
        due = [task for task in tasks if task.key not in known]
        say(plan(due[: settings.limit or None], settings, words, seconds))
        if due:
            backend = make_backend(settings, proven=results.tally.accepted > 0)
            work = Judge(settings=settings, words=words, by=by, backend=backend)
            feed: Feed[Task] = Feed(iter(due), lambda task: task.key, results, settings.limit)
            asyncio.run(_run(feed, work, results))
    finally:
        results.close()
    return results


def _known(out: Path) -> tuple[set[str], float | None]:
    """Keys that have answers, and how many seconds those took on average."""
    keys: set[str] = set()
    took: list[float] = []
    for record in read_records(out):
        keys.add(str(record.get("of")))
        meta = record.get("meta")
        if isinstance(meta, dict) and isinstance(meta.get("seconds"), int | float):
            took.append(meta["seconds"])
    return keys, sum(took) / len(took) if took else None


def _refuse_another(path: Path, record: Mapping[str, Any], by: Mapping[str, Any]) -> None:
    if (other := record.get("by", by)) != by:
        raise ValueError(f"out: {path} holds answers by {other}, and these would be by {dict(by)}; give them a file of their own")


async def _run(feed: Feed[Task], work: Judge, results: Results) -> None:
    try:
        await run_pool(feed, work.judge, results, work.settings.in_flight, what="judge")
    finally:
        await work.backend.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    settings = read_settings(JudgeSettings, "judge", __doc__ or "", arguments)
    results = judge(settings)
    tally = results.tally
    _cli.say(f"{tally.accepted} answers ({tally.repaired} of them after a repair), {tally.rejected} could not be read: {results.out}")
    if tally.reasons:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(tally.reasons.items(), key=lambda item: -item[1]))
        _cli.say(f"not scored because: {listed}; {results.rejects} has each; --retry parse asks them again")
    given: dict[str, list[Mapping[str, float]]] = {}
    for record in read_records(results.out):
        given.setdefault(str(record["metric"]), []).append(record["scores"])
    for warning in sameness(given):
        _cli.say(f"warning: {warning}")
    if not tally.accepted:
        raise ValueError("no answer could be read: is the model one that sees pictures, and are the words those of --ask?")


if __name__ == "__main__":
    _cli.run(main)
