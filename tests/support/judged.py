"""Answers of a judge, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from byg_plugin.evaluation.items import from_manifest
from byg_plugin.evaluation.judged import QUESTIONS, keys_of, rejects_of

BY = {"model": "m", "words": "w", "image_side": 8, "frames": 4}
Numbers = list[tuple[list[float] | None, ...]]


def write_answers(path: Path, edits: Path, numbers: Numbers, ask: str = "viescore", **by: Any) -> Path:
    """Answers about the edits of a folder, by question; None: it could not be read."""
    for item, of_item in zip(from_manifest(edits), numbers, strict=True):
        for (name, key), question, given in zip(keys_of(item, QUESTIONS[ask]).items(), QUESTIONS[ask], of_item, strict=True):
            record: dict[str, Any] = {"of": key, "id": item.id, "edit_type": item.edit_type, "metric": name, "by": BY | by}
            if given is not None:
                record["scores"] = dict(zip(question.parts, given, strict=True))
            with (rejects_of(path) if given is None else path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    return path
