"""Images to edit tuples (Appendix D.1 of the paper): one edit an image, invented by a vision-language model or by rules.

    python dataset_tools/generate_edits.py --images data/photos --out data/tuples.jsonl --base-url http://127.0.0.1:8000/v1
    python dataset_tools/generate_edits.py --images data/photos --out data/tuples.jsonl --backend rules
    python dataset_tools/generate_edits.py --config configs/data_images.toml --images data/photos --out data/tuples.jsonl --shard 2/4

Every image ends in exactly one line: of OUT, or of OUT's .rejects.jsonl with the reason. Run the same command again after
a kill: what is done is not done again. A picture of types and lengths lies beside it at the end.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from byg_plugin import _cli
from byg_plugin.config.extras import require
from byg_plugin.data import media
from byg_plugin.data.rules import ROLES, Finding, check_texts, is_photorealistic
from byg_plugin.data.tuples import IMAGE_SUFFIXES
from byg_plugin.user_files import base_of

from . import backend_rules, prompts
from .asking import Attempt
from .backend import Backend, Chat, encode_image, seed_of
from .backends import make_backend
from .balance import PRIORITY, Balance
from .inputs import TABLES, ImageInput, folder_images, in_shard, is_table, name_now, passed_over, shard_file, table_images
from .pool import Feed, Outcome, Results, refuse_inputs, run_pool
from .settings import GenerateSettings, read_settings


def inputs(settings: GenerateSettings, others: Counter[str]) -> Iterator[ImageInput]:
    """The images of this shard; a folder's other files are counted in `others` by suffix.

    Raises:
        ValueError: no such folder or table; while they are read: no such column.
    """
    path, base = Path(settings.images), base_of(settings.out)
    if not (path.is_file() if is_table(path) else path.is_dir()):
        raise ValueError(f"images = {path}: no such folder or table ({', '.join(TABLES)})")
    if is_table(path):
        every = table_images(
            path,
            base,
            root=Path(settings.image_root) if settings.image_root else None,
            image=settings.image_column,
            caption=settings.caption_column,
            style=settings.style_column,
            default_style=settings.style,
        )
    else:
        every = folder_images(path, base, settings.style, others)
    return (item for item in every if in_shard(item.source, settings.shard_and_count))


@dataclass
class Editor:
    """Makes one tuple of one image."""

    settings: GenerateSettings
    balance: Balance
    backend: Backend | None
    """None: by rules."""

    async def make(self, item: ImageInput) -> Outcome:
        """The image's outcome; never raises for what is wrong with the image.

        Raises:
            ValueError: no image could be served (the server is gone, the key is wrong).
        """
        attempt = _Attempt(self, item)
        if item.problem:
            return attempt.rejected("input", "input", item.problem)
        self.balance.reserve(attempt.offered)
        chosen = None
        try:
            made = attempt.by_model(self.backend, self.settings.image_side) if self.backend else attempt.by_rules()
            outcome = await made
            chosen = outcome.label if outcome.accepted else None
            return outcome
        finally:
            self.balance.release(attempt.offered, chosen)


class _Attempt(Attempt):
    def __init__(self, editor: Editor, item: ImageInput):
        settings = editor.settings
        super().__init__(settings=settings, field="source", name=item.source, seed=seed_of(settings.seed, item.source))
        self.item = item
        self.rng = random.Random(self.seed)
        style = item.style
        self.to_photo = (
            editor.backend is not None
            and style is not None
            and not is_photorealistic(style)
            and self.rng.random() < settings.style_conversion
        )
        # Rules serve three types alone: all of them, in a drawn order.
        k = settings.k if editor.backend else len(backend_rules.TYPES)
        self.offered = ("style_change",) if self.to_photo else editor.balance.draw(self.rng, k)
        if editor.backend:
            self.side["offered"] = list(self.offered)
        if style:
            self.side["source_style"] = style

    async def by_model(self, backend: Backend, image_side: int) -> Outcome:
        item = self.item
        try:
            picture = await asyncio.to_thread(encode_image, item.path, image_side)
        except (ValueError, OSError) as error:
            return self.rejected("input", "input", str(error))
        asked = prompts.edit_request(self.offered, caption=item.caption, source_style=item.style, to_photo=self.to_photo)
        chat = Chat(system=prompts.SYSTEM, turns=(asked,), pictures=(picture,), seed=self.seed)
        return await self.ask(backend, chat, prompts.FIELDS, self._check, self._tuple)

    async def by_rules(self) -> Outcome:
        item = self.item
        try:
            await asyncio.to_thread(media.load_image, item.path)
        except (ValueError, OSError) as error:
            return self.rejected("input", "input", str(error))
        try:
            texts = backend_rules.propose(item.caption, item.style, self.offered, self.rng)
        except backend_rules.NotServed as error:
            return self.rejected("rules", error.reason, str(error))
        findings = list(check_texts(texts, source_style=item.style))
        if broken := [finding for finding in findings if finding.hard]:
            return self.rejected("rules", broken[0].reason, "; ".join(finding.message for finding in broken))
        return self._tuple(texts, findings, False)

    def _check(self, texts: dict[str, str]) -> list[Finding]:
        named = _type_name(texts["edit_type"])
        findings = []
        if named in self.offered:
            texts["edit_type"] = named
        else:
            message = f"edit_type = {texts['edit_type']!r}, offered: {', '.join(self.offered)}"
            findings.append(Finding(reason="edit_type", message=message))
        target_style = prompts.PHOTOREALISTIC if self.to_photo else None
        return [*findings, *check_texts(texts, source_style=self.item.style, target_style=target_style)]

    def _tuple(self, texts: dict[str, str], findings: Sequence[Finding], repaired: bool) -> Outcome:
        record = {"source": self.name, **{name: texts[name] for name in (*ROLES, "edit_type")}}
        return self.accepted(record, texts["edit_type"], findings, repaired)


def _type_name(text: str) -> str:
    return text.strip().casefold().replace("colour", "color").replace("-", "_").replace("/", "_").replace(" ", "_")


@dataclass
class Done:
    """What a run leaves."""

    out: Path
    rejects: Path
    summary: str
    accepted: int
    new: int
    reasons: dict[str, int] = field(default_factory=dict)
    passed_over: str = ""
    known: int = 0


def generate(settings: GenerateSettings) -> Done:
    """Make tuples of all images that have none.

    Raises:
        ValueError: settings, server or files are wrong; what was done before is on the disk.
    """
    require("json_repair", "reading models' answers", "data")
    others: Counter[str] = Counter()
    items = inputs(settings, others)
    out = shard_file(Path(settings.out), settings.shard_and_count)
    refuse_inputs(out, {"images": settings.images})
    results = Results(
        out,
        name="source",
        label=lambda record: str(record.get("edit_type", "")),
        fields=ROLES,
        retry=settings.retry,
        alias=partial(name_now, base=base_of(settings.out)),
    )
    try:
        priority = dict.fromkeys(backend_rules.TYPES, 1.0) if settings.backend == "rules" else PRIORITY
        balance = Balance(priority, {name: results.tally.labels[name] for name in priority})
        backend = None if settings.backend == "rules" else make_backend(settings, proven=results.tally.accepted > 0)
        editor = Editor(settings=settings, balance=balance, backend=backend)
        feed: Feed[ImageInput] = Feed(items, lambda item: item.source, results, settings.limit)
        asyncio.run(_run(feed, editor, results, settings.in_flight))
        tally = results.tally
        return Done(
            out=out,
            rejects=results.rejects,
            summary=str(tally),
            accepted=tally.accepted,
            new=feed.given,
            reasons=dict(tally.reasons),
            passed_over=passed_over(others),
            known=feed.passed_over,
        )
    finally:
        results.close()


async def _run(feed: Feed[ImageInput], editor: Editor, results: Results, in_flight: int) -> None:
    try:
        await run_pool(feed, editor.make, results, in_flight, what="edits")
    finally:
        if editor.backend:
            await editor.backend.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; see the module."""
    settings = read_settings(GenerateSettings, "generate", __doc__ or "", arguments)
    done = generate(settings)
    _cli.say(f"{done.new} images done in this run; in all {done.summary}: {done.out}")
    if done.known:
        _cli.say(f"passed over: {done.known} that were done before or are named more than once")
    if done.reasons:
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(done.reasons.items(), key=lambda item: -item[1]))
        _cli.say(f"rejected because: {listed}; {done.rejects} has each with its reason")
    if done.passed_over:
        _cli.say(f"not read: {done.passed_over} (images are {', '.join(IMAGE_SUFFIXES)})")
    if done.accepted:
        from .plot import plot_summary

        _cli.say(f"types and lengths: {plot_summary(done.out)}")
    elif done.reasons:
        raise ValueError("no tuple was made: all images were rejected")
    else:
        raise ValueError(f"images = {settings.images}: no image in it ({', '.join(IMAGE_SUFFIXES)})")


if __name__ == "__main__":
    _cli.run(main)
