"""Edit tuples: what Appendix D calls (x, p_src, p_tgt, c, c_bar), read from JSONL or from a folder of same-stem .json.

Sources are images or clips.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from byg_plugin import shipped
from byg_plugin.data import clips
from byg_plugin.data.rules import ROLES, RULES, Finding, check_texts
from byg_plugin.documents import json_value, other_encoding, utf8
from byg_plugin.user_files import files_in, hidden_in, listed

if TYPE_CHECKING:
    from byg_plugin.config.sections import DatasetConfig

OPTIONAL = ("edit_type", "target", "id", "split", "meta")
SPLITS = ("train", "validation")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MEDIA_SUFFIXES = (*IMAGE_SUFFIXES, *clips.SUFFIXES)
_SHOWN = 20
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EditTuple:
    """One training example. `target` is the edited image or clip; only the paired baseline looks at it.

    `split` says on which side of training and validation it is; None: dataset.validation_items chooses.
    """

    id: str
    source: Path
    src_caption: str
    tgt_caption: str
    instruction: str
    reverse_instruction: str
    edit_type: str | None = None
    target: Path | None = None
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """One place of a tuples file: a record and what there is to say of it.

    Attributes:
        where: line number or file, for messages.
        record: as it is written; None where there is none.
        item: the tuple, if no finding is hard.
        findings: hard ones and discouraged forms.
    """

    where: str
    record: Mapping[str, Any] | None = None
    item: EditTuple | None = None
    findings: tuple[Finding, ...] = ()


def read_tuples(dataset: DatasetConfig) -> list[EditTuple]:
    """The tuples of a `[dataset]` section.

    Raises:
        ValueError: the place is missing, or lists every problem of its tuples (the first 20 in words).
    """
    check_paths(dataset)
    root = Path(dataset.image_root) if dataset.image_root else None
    return read_tuples_file(Path(dataset.tuples), root, rules=dataset.rules)


def check_paths(dataset: DatasetConfig) -> None:
    """Whether a `[dataset]` section's tuples and images are there at all, without reading them.

    Raises:
        ValueError: one is missing.
    """
    if dataset.image_root and not Path(dataset.image_root).is_dir():
        raise ValueError(f"dataset.image_root = {dataset.image_root}: no such folder")
    if not Path(dataset.tuples).exists():
        raise ValueError(f"dataset.tuples = {dataset.tuples}: no such file or folder")


def read_tuples_file(path: Path, root: Path | None = None, *, rules: Literal["error", "warn"] = "error") -> list[EditTuple]:
    """Tuples of a JSONL file, or of a folder whose images have a .json (one tuple, or a list) of the same name beside them.

    Relative paths start from `root`, by default the file's folder. Texts lose blanks at their ends. Without an `id`, a hash
    of the contents stands for it. Texts that break a hard rule of `rules.py` are problems; with `rules = "warn"` they are
    taken. What is taken in spite of a finding is counted in one warning.

    Raises:
        ValueError: see `read_tuples`.
    """
    tuples: list[EditTuple] = []
    problems: list[str] = []
    discouraged: Counter[str] = Counter()
    broken_rule = False
    for seen in inspect_tuples(path, root):
        wrong = [f for f in seen.findings if f.hard and (rules == "error" or f.reason not in RULES)]
        problems += [f"{seen.where}: {f.message}" + (f"; {RULES[f.reason]}" if f.reason in RULES else "") for f in wrong]
        if wrong or seen.item is None:
            broken_rule |= any(f.reason in RULES for f in wrong)
            continue
        discouraged.update(f.reason for f in seen.findings)
        tuples.append(seen.item)
    if problems:
        remedy = '\nto train on such texts all the same: dataset.rules = "warn"' if broken_rule else ""
        raise ValueError(f"{path}: {len(problems)} problem(s), nothing was done:\n{listed(problems, _SHOWN)}{remedy}")
    if not tuples:
        raise ValueError(f"{path}: no tuples in it; each line is a JSON object with source, {', '.join(ROLES)}")
    if discouraged:
        counts = ", ".join(f"{count} {reason}" for reason, count in discouraged.most_common())
        logger.warning("%s: texts in discouraged forms (%s); %s names the lines", path, counts, shipped.command("dataset_tools.validate"))
    return tuples


def inspect_tuples(path: Path, root: Path | None = None) -> Iterator[Inspected]:
    """Every record of a tuples file or folder with its findings, one after another; a JSONL file is never held whole.

    Raises:
        ValueError: there is no such file or folder.
    """
    if path.is_dir():
        if root is not None:
            raise ValueError(f"dataset.image_root = {root}: leave it out, the images of the folder {path} lie beside their .json")
        records, root = _folder_records(path), path
    elif path.is_file():
        records, root = _jsonl_records(path), root or path.parent
    else:
        raise ValueError(f"dataset.tuples = {path}: no such file or folder")
    seen: dict[str, str] = {}
    for where, record, problems in records:
        findings = [Finding(reason="schema", message=problem) for problem in problems]
        if record is None:
            yield Inspected(where=where, findings=tuple(findings))
            continue
        findings += _schema(record, root)
        item = None
        if not findings:
            item = _make(record, root)
            findings += check_texts({role: getattr(item, role) for role in ROLES}, source_style=_source_style(record))
            if item.id in seen:
                same = "has the same contents as" if "id" not in record else f"has the id {item.id!r} of"
                message = f"duplicate id: {same} {seen[item.id]}; remove one or give it another id"
                findings.append(Finding(reason="duplicate", message=message))
            seen.setdefault(item.id, where)
        yield Inspected(where=where, record=record, item=item, findings=tuple(findings))


Records = Iterator[tuple[str, Mapping[str, Any] | None, list[str]]]


def _jsonl_records(path: Path) -> Records:
    with path.open("rb") as file:
        # By bytes, at line feeds alone: captions may hold U+2028 and the like, which text lines are split at.
        for number, line in enumerate(file, start=1):
            where = f"line {number}"
            if number == 1 and (other := other_encoding(line)):
                yield where, None, [f"{other} text; save the file as UTF-8"]
                return  # the other lines are no better
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield where, None, [f"not UTF-8 text ({error.reason}); save the file as UTF-8"]
                continue
            if text.strip():
                yield where, *_parse(text)


def _folder_records(path: Path) -> Records:
    images: dict[str, list[Path]] = {}
    targets: set[Path] = set()
    for image in files_in(path, MEDIA_SUFFIXES):
        images.setdefault(image.stem, []).append(image)
    for beside in files_in(path, (".json",)):
        if len(found := images.get(beside.stem, [])) != 1:
            names = ", ".join(image.name for image in found) or "none"
            yield beside.name, None, [f"needs one image of the same name beside it, there is {names}"]
            continue
        try:
            text = utf8(beside.read_bytes())
        except (ValueError, OSError) as error:
            yield beside.name, None, [str(error)]
            continue
        try:
            value = load_json(text)
        except ValueError as error:
            yield beside.name, None, [f"not JSON: {error}{_escape_hint(error)}"]
            continue
        for index, record in enumerate(value if isinstance(value, list) else [value]):
            where = beside.name if not isinstance(value, list) else f"{beside.name}[{index}]"
            if not isinstance(record, dict):
                yield where, None, [f"expected a JSON object, got {type(record).__name__}"]
            elif record.get("source", found[0].name) != found[0].name:
                yield where, None, [f"source = {record['source']!r} is not {found[0].name}, which it lies beside; leave it out"]
            else:
                if isinstance(record.get("target"), str):
                    targets.add(_resolve(record["target"], path))
                yield where, {**record, "source": found[0].name}, []
    # A picture that some tuple names as its target needs no tuples of its own.
    every = [image for group in images.values() for image in group]
    bare = [image.name for image in every if not image.with_suffix(".json").is_file() and image not in targets]
    if bare:
        names = ", ".join(bare[:_SHOWN]) + (", ..." if len(bare) > _SHOWN else "")
        yield path.name, None, [f"{len(bare)} image(s) have no .json of the same name beside them with {', '.join(ROLES)}: {names}"]
    if not every:
        searched = f"{', '.join(MEDIA_SUFFIXES)}; folders inside it are not searched{hidden_in(path, MEDIA_SUFFIXES)}"
        yield path.name, None, [f"no image or clip in this folder ({searched})"]


def load_json(text: str) -> Any:
    """A JSON value in which no object has a key twice; the reader's default keeps the last and drops the other in silence.

    Raises:
        ValueError: it is none, or nested without end.
    """
    return json_value(text, unique_keys=True)


def _escape_hint(error: ValueError) -> str:
    """Paths of Windows are what holds a backslash."""
    return "; in JSON a backslash is written \\\\, and in a path / serves as well" if "escape" in str(error) else ""


def _parse(line: str) -> tuple[Mapping[str, Any] | None, list[str]]:
    try:
        record = load_json(line)
    except json.JSONDecodeError as error:
        return None, [f"not JSON: {error.msg} at column {error.colno}{_escape_hint(error)}"]
    except ValueError as error:
        return None, [str(error)]
    if not isinstance(record, dict):
        return None, [f"expected a JSON object on each line, got {type(record).__name__}"]
    return record, []


def _schema(record: Mapping[str, Any], root: Path) -> Iterator[Finding]:
    for problem in _field_problems(record):
        yield Finding(reason="schema", message=problem)
    for name in ("source", "target"):
        value = record.get(name)
        if isinstance(value, str) and value.strip() and not is_file(_resolve(value, root)):
            yield Finding(reason="file", message=f"{name}: no such file {path_words(value, root)}")


def path_words(value: str, root: Path) -> str:
    """A path that leads nowhere, for a message: with what its characters say of why."""
    path = str(_resolve(value, root))
    if any(ord(character) < 32 or character == "\x7f" for character in value):
        return f"{path!r}: it holds control characters; in JSON a backslash begins an escape (\\t, \\n): write / or \\\\ in paths"
    return f"{path} (its backslashes are read as /)" if "\\" in value and "\\" not in path else path


def _field_problems(record: Mapping[str, Any]) -> list[str]:
    known = ("source", *ROLES, *OPTIONAL)
    problems = list(_unknown(record, known))
    for name in ("source", *ROLES):
        value = record.get(name)
        if name not in record:
            problems.append(f"{name} is missing")
        elif not isinstance(value, str):
            problems.append(f"{name} = {value!r} is not a text")
        elif not value.strip():
            problems.append(f"{name} is empty")
    for name in ("edit_type", "target", "id", "split"):
        value = record.get(name)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            problems.append(f"{name} = {value!r} is not a text; leave it out if there is none")
    if isinstance(record.get("split"), str) and record["split"] not in SPLITS:
        problems.append(f"split = {record['split']!r} is none of {', '.join(SPLITS)}; leave it out to let dataset.validation_items choose")
    problems += [f"{name} holds a broken character: {v!r}" for name, v in record.items() if isinstance(v, str) and not is_unicode(v)]
    return problems


def _source_style(record: Mapping[str, Any]) -> str | None:
    """What the tool that made a tuple knew of the style of its source."""
    meta = record.get("meta")
    style = meta.get("source_style") if isinstance(meta, dict) else None
    return style if isinstance(style, str) else None


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON can hold half a surrogate pair, which no file name and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_file(path: Path) -> bool:
    """Whether a file is there; a text that cannot be a path names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a caption in the place of a path is too long for a name
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


def unwritable(name: str) -> str | None:
    """Why a file's name, as it would stand in a tuple, would not be found again; None where it would."""
    if not is_unicode(name):
        return "its name is not Unicode text, which no tuples file can hold; rename it"
    if "\\" in name and not Path(name).is_absolute():
        return "its name holds a backslash, which a tuples file reads as /; rename it"
    return None


def _make(record: Mapping[str, Any], root: Path) -> EditTuple:
    texts = {name: record[name].strip() for name in ROLES}
    target = record.get("target")
    # As written, not as resolved: the id is the same on every machine.
    contents = json.dumps([record["source"].replace("\\", "/"), *texts.values(), target and target.replace("\\", "/")])
    return EditTuple(
        id=record.get("id") or hashlib.sha256(contents.encode()).hexdigest()[:16],
        source=_resolve(record["source"], root),
        edit_type=record.get("edit_type"),
        target=_resolve(target, root) if target else None,
        split=record.get("split"),
        **texts,
    )
