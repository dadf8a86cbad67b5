"""Edit tuples: what Appendix D calls (x, p_src, p_tgt, c, c_bar), read from JSONL or from a folder of same-stem .json.

Sources are images or clips.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byg_plugin.data import clips

if TYPE_CHECKING:
    from byg_plugin.training.config import DatasetConfig

TEXTS = ("src_caption", "tgt_caption", "instruction", "reverse_instruction")
OPTIONAL = ("edit_type", "target", "id", "meta")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, *clips.SUFFIXES)
_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class EditTuple:
    """One training example. `target` is the edited image or clip; only the paired baseline looks at it."""

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
    """Tuples of a JSONL file, or of a folder whose images have a .json (one tuple, or a list) of the same name beside them.

    Relative paths start from `root`, by default the file's folder. Texts lose blanks at their ends. Without an `id`, a hash
    of the contents stands for it.

    Raises:
        ValueError: see `read_tuples`.
    """
    if path.is_dir():
        if root is not None:
            raise ValueError(f"dataset.image_root = {root}: leave it out, the images of the folder {path} lie beside their .json")
        records, problems = _folder_records(path)
        root = path
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
        listed = "\n".join(f"  - {problem}" for problem in problems[:_SHOWN])
        raise ValueError(f"{path}: {len(problems)} problem(s), nothing was done:\n{listed}{more}")
    if not tuples:
        raise ValueError(f"{path}: no tuples in it; each line is a JSON object with source, {', '.join(TEXTS)}")
    return tuples


Records = list[tuple[str, Mapping[str, Any]]]


def _jsonl_records(path: Path) -> tuple[Records, list[str]]:
    records: Records = []
    problems: list[str] = []
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {bad} is not UTF-8 text ({error.reason}); save the file as UTF-8") from error
    # Not splitlines(): captions may hold U+2028 and the like, which it would split at.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            record = _parse(line, problems, f"line {number}")
            if record is not None:
                records.append((f"line {number}", record))
    return records, problems


def _folder_records(path: Path) -> tuple[Records, list[str]]:
    records: Records = []
    problems: list[str] = []
    images: dict[str, list[Path]] = {}
    for image in sorted(p for p in path.iterdir() if p.suffix.lower() in MEDIA_SUFFIXES):
        images.setdefault(image.stem, []).append(image)
    for beside in sorted(path.glob("*.json")):
        if len(found := images.get(beside.stem, [])) != 1:
            names = ", ".join(image.name for image in found) or "none"
            problems.append(f"{beside.name}: needs one image of the same name beside it, there is {names}")
            continue
        try:
            value = json.loads(beside.read_text(encoding="utf-8-sig"), object_pairs_hook=_object)
        except ValueError as error:
            problems.append(f"{beside.name}: not JSON: {error}")
            continue
        for index, record in enumerate(value if isinstance(value, list) else [value]):
            where = beside.name if not isinstance(value, list) else f"{beside.name}[{index}]"
            if not isinstance(record, dict):
                problems.append(f"{where}: expected a JSON object, got {type(record).__name__}")
            elif record.get("source", found[0].name) != found[0].name:
                problems.append(f"{where}: source = {record['source']!r} is not {found[0].name}, which it lies beside; leave it out")
            else:
                records.append((where, {**record, "source": found[0].name}))
    # A picture that some tuple names as its target needs no tuples of its own.
    targets = {_resolve(record["target"], path) for _, record in records if isinstance(record.get("target"), str)}
    every = [image for group in images.values() for image in group]
    bare = [image.name for image in every if not image.with_suffix(".json").is_file() and image not in targets]
    if bare:
        problems.append(
            f"{len(bare)} image(s) have no .json of the same name beside them with {', '.join(TEXTS)}: {', '.join(bare[:_SHOWN])}"
            + (", ..." if len(bare) > _SHOWN else "")
        )
    if not every:
        problems.append(f"no image or clip in this folder ({', '.join(MEDIA_SUFFIXES)}; folders inside it are not searched)")
    return records, problems


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the reader's default keeps the last of two equal keys and drops the other in silence."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} appears twice in one object")
    return dict(pairs)


def _parse(line: str, problems: list[str], where: str) -> Mapping[str, Any] | None:
    try:
        record = json.loads(line, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        problems.append(f"{where}: not JSON: {error.msg} at column {error.colno}")
        return None
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return None
    if not isinstance(record, dict):
        problems.append(f"{where}: expected a JSON object on each line, got {type(record).__name__}")
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
    # JSON can hold half a surrogate pair, which no file name and no tokenizer takes.
    problems += [f"{name} holds a broken character: {v!r}" for name, v in record.items() if isinstance(v, str) and not _is_unicode(v)]
    for name in ("source", "target"):
        value = record.get(name)
        if isinstance(value, str) and value.strip() and not _is_file(_resolve(value, root)):
            problems.append(f"{name}: no such file {_resolve(value, root)}")
    return problems


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, UnicodeEncodeError):  # a caption in the place of a path is too long for a name
        return False


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
    # As written, not as resolved: the id is the same on every machine.
    contents = json.dumps([record["source"].replace("\\", "/"), *texts.values(), target and target.replace("\\", "/")])
    return EditTuple(
        id=record.get("id") or hashlib.sha256(contents.encode()).hexdigest()[:16],
        source=_resolve(record["source"], root),
        edit_type=record.get("edit_type"),
        target=_resolve(target, root) if target else None,
        **texts,
    )
