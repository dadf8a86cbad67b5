"""Appendix D.2: captions of a table to prompts for a text-to-video model, or clips that exist already to tuples.

    python dataset_tools/prepare_captions.py --table VideoUFO.csv --out data/prompts.jsonl --count 400
    python dataset_tools/prepare_captions.py --clips my_clips --out data/tuples.jsonl --model Qwen/Qwen3-VL-30B-A3B-Instruct

From a table: rows drawn at random, freed of hints at style by a model (text alone), wrapped in a template with a random
style. Of clips: the model describes frames of each. What fails twice is in OUT's .rejects.jsonl; run it again to go on.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: the repository must be importable, this folder must not
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    __package__ = "dataset_tools"

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from byg_plugin import _cli
from byg_plugin.config.extras import require
from byg_plugin.data import clips
from byg_plugin.data.rules import ROLES, Finding
from byg_plugin.data.tuples import is_unicode, unwritable
from byg_plugin.user_files import base_of

from . import prompts
from .asking import Attempt
from .backend import Backend, Chat, Picture, encode_frame, seed_of
from .backends import make_backend
from .inputs import column, files_below, in_shard, name_now, passed_over, shard_file, source_name, table_rows
from .pool import Feed, Outcome, Results, Tally, refuse_inputs, run_pool
from .settings import CaptionsSettings, read_settings
from .video import STYLES, check_caption, hold_out, plain_style, style_of, video_tuple, wrap


@dataclass(frozen=True, kw_only=True)
class Row:
    """A caption to clean, or a clip to describe."""

    name: str
    caption: str | None = None
    clip: Path | None = None


def table_inputs(settings: CaptionsSettings) -> list[Row] | Iterator[Row]:
    """The rows that are drawn: the same ones at each run.

    Raises:
        ValueError: no such table or column.
    """
    assert settings.table is not None
    every = _captions(Path(settings.table), settings)
    if not settings.count:
        return every
    # Reservoir: only what is drawn is held.
    rng = random.Random(settings.seed)
    drawn: list[Row] = []
    for number, row in enumerate(every):
        if len(drawn) < settings.count:
            drawn.append(row)
        elif (index := rng.randrange(number + 1)) < settings.count:
            drawn[index] = row
    return drawn


def _captions(path: Path, settings: CaptionsSettings) -> Iterator[Row]:
    known = False
    for number, row in table_rows(path):
        caption = column(row, settings.caption_column)
        if not known and caption is None and settings.caption_column not in row:
            raise ValueError(f"{path}: no column {settings.caption_column!r} (--caption-column); it has {', '.join(map(str, row))}")
        known = True
        name = str(column(row, settings.id_column) or f"row{number}").encode(errors="backslashreplace").decode()
        yield Row(name=name, caption=str(caption or "").strip())


def clip_inputs(settings: CaptionsSettings, others: Counter[str]) -> Iterator[Row]:
    """The clips below the folder; its other files are counted in `others` by suffix.

    Raises:
        ValueError: no such folder.
    """
    assert settings.clips is not None
    folder, base = Path(settings.clips), base_of(settings.out)
    if not folder.is_dir():
        raise ValueError(f"clips = {folder}: no such folder")
    return (Row(name=source_name(path, base), clip=path) for path in files_below(folder, clips.SUFFIXES, others))


def sampled_frames(path: Path, count: int, longest_side: int) -> tuple[Picture, ...]:
    """`count` frames evenly over a clip (fewer of a shorter one), encoded.

    Raises:
        ValueError: it cannot be read.
    """
    total = clips.clip_info(path).frames
    wanted = {round((number + 0.5) * total / min(count, total) - 0.5) for number in range(min(count, total))}
    frames = clips.read_clip(path, max(wanted) + 1)
    return tuple(encode_frame(frame, longest_side) for number, frame in enumerate(frames) if number in wanted)


@dataclass
class Captioner:
    """Makes one prompt, or one tuple of a clip."""

    settings: CaptionsSettings
    backend: Backend

    async def make(self, row: Row) -> Outcome:
        """The row's outcome.

        Raises:
            ValueError: no row could be served.
        """
        settings, seed = self.settings, seed_of(self.settings.seed, row.name)
        attempt = Attempt(settings=settings, field=_NAME[row.clip is not None], name=row.name, seed=seed)
        if row.clip is None and not row.caption:
            return attempt.rejected("input", "no_caption", "the row has no caption")
        if row.caption and not is_unicode(row.caption):
            return attempt.rejected("input", "input", f"the caption holds a broken character: {row.caption!r}")
        if row.clip is not None and (why := unwritable(row.name)):
            return attempt.rejected("input", "input", why)
        try:
            chat, fields = await asyncio.to_thread(self._question, row, seed)
        except (ValueError, OSError) as error:
            return attempt.rejected("input", "input", str(error))

        def check(texts: dict[str, str]) -> list[Finding]:
            texts["style"] = plain_style(texts["style"]) if row.clip else random.Random(seed).choice(STYLES)
            return list(check_caption(texts["caption"], texts["style"]))

        def accept(texts: dict[str, str], findings: Sequence[Finding], repaired: bool) -> Outcome:
            return attempt.accepted(_record(row, texts["caption"], texts["style"]), texts["style"], findings, repaired)

        return await attempt.ask(self.backend, chat, fields, check, accept)

    def _question(self, row: Row, seed: int) -> tuple[Chat, Sequence[str]]:
        if row.clip is None:
            assert row.caption
            return Chat(system=prompts.SANITIZE_SYSTEM, turns=(prompts.sanitize_request(row.caption),), seed=seed), prompts.SANITIZE_FIELDS
        pictures = sampled_frames(row.clip, self.settings.frames, self.settings.image_side)
        return Chat(system=prompts.DESCRIBE_SYSTEM, turns=(prompts.DESCRIBE,), pictures=pictures, seed=seed), prompts.DESCRIBE_FIELDS


def _record(row: Row, caption: str, style: str) -> dict[str, Any]:
    if row.clip is not None:
        return video_tuple(row.name, row.name, caption, style, {})
    return {"id": row.name, "style": style, "caption": caption, "prompt": wrap(caption, style), "source_caption": row.caption}


_NAME: Mapping[bool, str] = {True: "source", False: "id"}


def prepare(settings: CaptionsSettings) -> tuple[Path, str, Tally]:
    """Make prompts or tuples of all that have none; returns (file, counts in words, counts).

    Raises:
        ValueError: settings, server or files are wrong; what was done before is on the disk.
    """
    require("json_repair", "reading models' answers", "data")
    of_clips = settings.clips is not None
    others: Counter[str] = Counter()
    rows = clip_inputs(settings, others) if of_clips else iter(table_inputs(settings))
    shard = (row for row in rows if in_shard(row.name, settings.shard_and_count))
    out = shard_file(Path(settings.out), settings.shard_and_count)
    refuse_inputs(out, {"table": settings.table, "clips": settings.clips})
    label = style_of if of_clips else lambda record: str(record.get("style", ""))
    results = Results(
        out,
        name=_NAME[of_clips],
        label=label,
        fields=ROLES if of_clips else ("prompt",),
        retry=settings.retry,
        alias=partial(name_now, base=base_of(settings.out)) if of_clips else None,
    )
    try:
        backend = make_backend(settings, proven=results.tally.accepted > 0)
        captioner = Captioner(settings=settings, backend=backend)
        feed: Feed[Row] = Feed(shard, lambda row: row.name, results, settings.limit)
        asyncio.run(_run(feed, captioner.make, backend, results, settings.in_flight))
        unread = f" (not read: {left})" if (left := passed_over(others)) else ""
        known = f", {feed.passed_over} done before or named more than once" if feed.passed_over else ""
        return out, f"{feed.given} done in this run{known}{unread}; in all {results.tally}", results.tally
    finally:
        results.close()


async def _run(feed: Feed[Row], work: Callable[[Row], Any], backend: Backend, results: Results, in_flight: int) -> None:
    try:
        await run_pool(feed, work, results, in_flight, what="captions")
    finally:
        await backend.close()


def _nothing(settings: CaptionsSettings, out: Path, tally: Tally) -> str:
    """Why there is no result."""
    if tally.rejected:
        what = "row was cleaned" if settings.clips is None else "clip was described"
        return f"no {what}: all were rejected, {out.stem}.rejects.jsonl beside {out} says why"
    if settings.clips is None:
        return f"table = {settings.table}: no row in it"
    return f"clips = {settings.clips}: no clip in it ({', '.join(clips.SUFFIXES)})"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    settings = read_settings(CaptionsSettings, "captions", __doc__ or "", arguments)
    out, counts, tally = prepare(settings)
    _cli.say(f"{counts}: {out}")
    if not tally.accepted and settings.shard_and_count[1] == 1:  # a shard may have nothing
        raise ValueError(_nothing(settings, out, tally))
    if settings.clips is not None and settings.hold_out and tally.accepted:
        _cli.say(str(hold_out(out, settings.hold_out, required=False)))


if __name__ == "__main__":
    _cli.run(main)
