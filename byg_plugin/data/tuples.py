"""Edit tuples: what Appendix D calls (x, p_src, p_tgt, c, c_bar), read from JSONL or from a folder of same-stem .json."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byg_plugin.training.config import DatasetConfig

TEXTS = ("src_caption", "tgt_caption", "instruction", "reverse_instruction")
OPTIONAL = ("edit_type", "target", "id", "meta")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class EditTuple:
    """One training example. `target` is the edited image; only the paired baseline looks at it."""

    id: str
    source: Path
    src_caption: str
    tgt_caption: str
    instruction: str
    reverse_instruction: str
    edit_type: str | None = None
    target: Path | None = None


def read_tuples(dataset: DatasetConfig) -> list[EditTuple]:
    """The tuples of a `[dataset]` section.

    Raises:
        ValueError: the place is missing, or lists every problem of its tuples (the first 20 in words).
    """
    root = Path(dataset.image_root) if dataset.image_root else None
    if root is not None and not root.is_dir():
        raise ValueError(f"dataset.image_root = {root}: no such folder")
    return read_tuples_file(Path(dataset.tuples), root)


def read_tuples_file(path: Path, root: Path | None = None) -> list[EditTuple]:
    """Tuples of a JSONL file or a folder; relative paths start from `root`, by default the file's folder.

    Raises:
        ValueError: see `read_tuples`.
    """
    if path.is_dir():
        records, problems = _folder_records(path)
        root = root or path
    elif path.is_file():
        records, problems = _jsonl_records(path)
        root = root or path.parent
    else:
        raise ValueError(f"dataset.tuples = {path}: no such file or folder")
    tuples: list[EditTuple] = []
    seen: dict[str, str] = {}
    for where, record in records:
        found = _problems(record, root)
        problems += [f"{where}: {problem}" for problem in found]
        if found:
            continue
        item = _make(record, root)
        if item.id in seen:
            same = "has the same contents as" if "id" not in record else f"has the id {item.id!r} of"
            problems.append(f"{where}: duplicate id: {same} {seen[item.id]}; remove one or give it another id")
        seen.setdefault(item.id, where)
        tuples.append(item)
    if problems:
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(f"{path}: {len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems[:_SHOWN]) + more)
    if not tuples:
        raise ValueError(f"{path}: no tuples in it; each line is a JSON object with source, {', '.join(TEXTS)}")
    return tuples


Records = list[tuple[str, Mapping[str, Any]]]


def _jsonl_records(path: Path) -> tuple[Records, list[str]]:
    records: Records = []
    problems = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    # Not splitlines(): captions may hold U+2028 and the like, which it would split at.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            record = _parse(line, problems, f"line {number}")
            if record is not None:
                records.append((f"line {number}", record))
    return records, problems


def _folder_records(path: Path) -> tuple[Records, list[str]]:
    records: Records = []
    problems = []
    images = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    for image in images:
        beside = image.with_suffix(".json")
        if not beside.is_file():
            problems.append(f"{image.name}: no {beside.name} beside it with {', '.join(TEXTS)}")
            continue
        try:
            value = json.loads(beside.read_text(encoding="utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            problems.append(f"{beside.name}: not JSON: {error}")
            continue
        for index, record in enumerate(value if isinstance(value, list) else [value]):
            where = beside.name if not isinstance(value, list) else f"{beside.name}[{index}]"
            if isinstance(record, dict):
                records.append((where, {"source": image.name, **record}))
            else:
                problems.append(f"{where}: expected a JSON object, got {type(record).__name__}")
    if not images:
        problems.append(f"no image in this folder ({', '.join(IMAGE_SUFFIXES)})")
    return records, problems


def _parse(line: str, problems: list[str], where: str) -> Mapping[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        problems.append(f"{where}: not JSON: {error.msg} at column {error.colno}")
        return None
    if not isinstance(record, dict):
        problems.append(f"{where}: expected a JSON object, got {type(record).__name__}")
        return None
    return record


def _problems(record: Mapping[str, Any], root: Path) -> list[str]:
    known = ("source", *TEXTS, *OPTIONAL)
    problems = list(_unknown(record, known))
    for name in ("source", *TEXTS):
        value = record.get(name)
        if name not in record:
            problems.append(f"{name} is missing")
        elif not isinstance(value, str):
            problems.append(f"{name} = {value!r} is not a text")
        elif not value.strip():
            problems.append(f"{name} is empty")
    for name in ("edit_type", "target", "id"):
        value = record.get(name)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            problems.append(f"{name} = {value!r} is not a text; leave it out if there is none")
    for name in ("source", "target"):
        value = record.get(name)
        if isinstance(value, str) and value.strip() and not _resolve(value, root).is_file():
            problems.append(f"{name}: no such file {_resolve(value, root)}")
    return problems


def _unknown(record: Mapping[str, Any], known: tuple[str, ...]) -> Iterator[str]:
    for name in record:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            yield f"unknown field {name!r}; " + (f"did you mean {close[0]!r}?" if close else "put side data into 'meta'")


def _resolve(text: str, root: Path) -> Path:
    # Written on Windows, read anywhere; a backslash is no part of a name that a data set should have.
    path = Path(text if Path(text).is_absolute() else text.replace("\\", "/"))
    return path if path.is_absolute() else root / path


def _make(record: Mapping[str, Any], root: Path) -> EditTuple:
    texts = {name: record[name].strip() for name in TEXTS}
    target = record.get("target")
    contents = json.dumps([record["source"], *texts.values(), target])
    return EditTuple(
        id=record.get("id") or hashlib.sha256(contents.encode()).hexdigest()[:16],
        source=_resolve(record["source"], root),
        edit_type=record.get("edit_type"),
        target=_resolve(target, root) if target else None,
        **texts,
    )
